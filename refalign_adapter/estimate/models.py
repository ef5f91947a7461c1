"""The models of a recipe on torch's "meta" device, from their configs alone: shapes and types, no weights."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

import torch
import transformers
from torch import nn

from ..data.cache.encoders import Encoders
from ..data.cache.options import DTYPES, CacheOptions
from ..errors import UserError, one_line
from ..families._base_model import read_base_model
from ..families._pipeline_folder import PipelineFolder, reading
from ..families.base import Family
from ..flow import Shift
from ..recipes.schema import Recipe
from ..teachers._hub import local_folder, read_config, read_processor
from ..teachers.base import Teacher
from ..teachers.lookup import find_teacher
from ..training.base_model import FIELD, shift_of

CONFIGS = ("config.json", "preprocessor_config.json", "processor_config.json")


@dataclass(frozen=True)
class Models:
    """What a recipe's configs say of its models.

    Attributes:
        family, shift: of the base, see `BaseModel`.
        transformer_class, transformer_config: the base's transformer.
        channels: of the transformer's latents.
        encoders: VAE, text encoder and teachers on meta, in the types in which a cache is made.
    """

    family: Family
    shift: Shift
    transformer_class: Any
    transformer_config: dict[str, Any]
    channels: int
    encoders: Encoders

    def transformer(self, dtype: torch.dtype) -> Any:
        """A new transformer on meta, its parameters in the types that loading in `dtype` gives them."""
        with torch.device("meta"):
            transformer = self.transformer_class.from_config(self.transformer_config)
        kept = self.transformer_class._keep_in_fp32_modules or ()
        for name, parameter in transformer.named_parameters():
            own = torch.float32 if any(part in kept for part in name.split(".")) else dtype
            parameter.data = parameter.data.to(own)
        return transformer


def read_models(recipe: Recipe, options: CacheOptions) -> Models:
    """Read the configs of base and teachers; nothing else is downloaded.

    Raises:
        UserError: a base or teacher that cannot be read or is not supported.
        ConfigError: sizes that the base cannot cut into tokens.
    """
    base = read_base_model(options.base_model, field=FIELD, revision=options.revision, family=recipe.family)
    shift = shift_of(recipe, base)
    with _told(recipe):
        vae, text_encoder = base.component("vae"), _text_encoder(base.folder, options)
    encoders = Encoders(
        base.family,
        SimpleNamespace(vae=vae, text_encoder=text_encoder),
        base.transformer,
        {
            target.objective: {name: read_teacher(name, target.layer) for name in target.models}
            for target in options.all_targets
        },
    )
    encoders.check_sizes(options)
    transformer = base.transformer
    return Models(
        base.family,
        shift,
        type(transformer),
        base.folder.config("transformer"),
        base.family.channels(transformer),
        encoders,
    )


def _text_encoder(base: PipelineFolder, options: CacheOptions) -> nn.Module:
    model_class: Any = base.component_class("text_encoder")
    base.config("text_encoder")  # refuses sizes that no model has
    config = model_class.config_class.from_pretrained(base.path / "text_encoder")
    dtype = DTYPES[options.text_encoder_dtype]
    with torch.device("meta"):
        model = model_class(config).to(dtype)
    # As transformers loads it: T5's kin overflow in float16 and keep some of their layers out of it.
    kept = (model_class._keep_in_fp32_modules or ()) if dtype == torch.float16 else ()
    for name, parameter in model.named_parameters():
        if any(part in kept for part in name.split(".")):
            parameter.data = parameter.data.float()
    return model


def read_teacher(name: str, layer: int = -1) -> Teacher:
    """A teacher on meta.

    Raises:
        UserError: one that is missing, gated, unreachable or unknown.
    """
    folder = local_folder(name, files=CONFIGS)
    model_type = read_config(folder)["model_type"]
    teacher_class = find_teacher(name, model_type)
    model_class = getattr(transformers, teacher_class.model_class)
    with reading(name, "teacher", "an encoder"), torch.device("meta"):
        model = model_class(model_class.config_class.from_pretrained(folder))
    return teacher_class(model, name=name, layer=layer, processor=read_processor(folder))


@contextmanager
def _told(recipe: Recipe) -> Iterator[None]:
    try:
        yield
    except UserError:
        raise
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        name, reason = recipe.pretrained_model_name_or_path, one_line(error, 300)
        raise UserError(f"{FIELD}: cannot read the configs of {name!r} ({reason})") from None
