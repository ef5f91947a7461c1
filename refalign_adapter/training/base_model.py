"""The frozen base: its family, its transformer, its scheduler's timestep shift. The encoders stay on disk."""

from __future__ import annotations

from typing import Any

import torch

from ..errors import UserError
from ..families._base_model import BaseModel, read_base_model
from ..families._pipeline_folder import open_pipeline, reading
from ..families.base import Family
from ..flow import Shift
from ..media.canvas import fixed_size_problems
from ..recipes.schema import Recipe
from .quantization import check_machine, quantization_config

FIELD = "pretrained_model_name_or_path"


def read_base(recipe: Recipe) -> tuple[Family, Shift]:
    """The base's family and the timestep shift to train with, from its configs alone.

    The shift is the recipe's, or else that of the base's scheduler.

    Raises:
        UserError: a base that cannot be read, that no family knows or supports, or that cannot cut `reference_size`
            into tokens.
    """
    base = read_base_model(
        recipe.pretrained_model_name_or_path, field=FIELD, revision=recipe.revision, family=recipe.family
    )
    if recipe.adapter.reference_size and (multiples := base.size_multiples()) is not None:
        for problem in fixed_size_problems(recipe.adapter.reference_size, multiples[1:]):
            raise UserError(f"adapter.{problem}")
    return base.family, shift_of(recipe, base)


def shift_of(recipe: Recipe, base: BaseModel) -> Shift:
    """The recipe's timestep shift, whatever the video, or else that of the base's scheduler.

    Raises:
        UserError: neither of them.
    """
    given = recipe.flow.shift
    return base.flow_shift() if given is None else lambda tokens: given


def load_transformer(recipe: Recipe, family: Family, dtype: torch.dtype) -> Any:
    """The base's transformer on the CPU, or quantised on the GPU; what its class keeps in float32 stays so.

    Raises:
        UserError: weights that cannot be read, or that cannot be quantised here.
    """
    name = recipe.pretrained_model_name_or_path
    options: dict[str, Any] = {"variant": recipe.variant, "dtype": dtype}
    if recipe.quantization is not None:
        check_machine(recipe.quantization)
        options["quantization_config"] = quantization_config(recipe.quantization, dtype)
    wanted: dict[str, Any] = {"weights": ("transformer",), "variant": recipe.variant, "classes": family.classes}
    base = open_pipeline(name, field=FIELD, revision=recipe.revision, **wanted)
    with reading(name, FIELD):
        return family.load_transformer(str(base.path), **options)
