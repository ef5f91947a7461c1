"""The frozen base: its family, its transformer, its scheduler's timestep shift. The encoders stay on disk."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import diffusers
import torch

from ..errors import UserError
from ..families.base import Family, load_family
from .config import Recipe
from .quantization import check_machine, quantization_config

FIELD = "pretrained_model_name_or_path"


def read_base(recipe: Recipe) -> tuple[Family, float]:
    """The base's family and the timestep shift to train with, from its configs alone.

    The shift is the recipe's, or else that of the base's scheduler.

    Raises:
        UserError: a base that cannot be read, or that no family knows or supports.
    """
    config = _read(recipe, diffusers.DiffusionPipeline.load_config, revision=recipe.revision)
    family = load_family(str(_class_name(config, "transformer")), recipe.family)
    if problem := family.pipeline_problem(SimpleNamespace(config=config)):
        raise UserError(problem)
    if recipe.flow.shift is not None:
        return family, recipe.flow.shift
    scheduler = getattr(diffusers, str(_class_name(config, "scheduler")), None)
    if scheduler is None:
        raise UserError(f"{FIELD}: {recipe.pretrained_model_name_or_path!r} has no scheduler; set flow.shift")
    loaded = _read(recipe, scheduler.from_pretrained, subfolder="scheduler", revision=recipe.revision)
    return family, family.flow_shift(loaded)


def load_transformer(recipe: Recipe, family: Family, dtype: torch.dtype) -> Any:
    """The base's transformer on the CPU, or quantised on the GPU; what its class keeps in float32 stays so.

    Raises:
        UserError: weights that cannot be read, or that cannot be quantised here.
    """
    options: dict[str, Any] = {"revision": recipe.revision, "variant": recipe.variant, "dtype": dtype}
    if recipe.quantization is not None:
        check_machine(recipe.quantization)
        options["quantization_config"] = quantization_config(recipe.quantization, dtype)
    return _read(recipe, family.load_transformer, **options)


def _class_name(config: dict[str, Any], component: str) -> str | None:
    """The class of a component as `model_index.json` names it."""
    return (config.get(component) or [None, None])[1]


def _read(recipe: Recipe, load: Any, **options: Any) -> Any:
    name = recipe.pretrained_model_name_or_path
    try:
        return load(name, **options)
    except UserError:
        raise
    except (OSError, ValueError, RuntimeError) as error:
        reason = " ".join(str(error).split())[:300]
        raise UserError(f"{FIELD}: cannot read {name!r} as a diffusers pipeline ({reason})") from None
