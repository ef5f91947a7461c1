"""A base's configs, read once: its family, its models without weights, what its sizes must be multiples of."""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from types import SimpleNamespace
from typing import Any

import torch

from ..errors import UserError
from ..flow import Shift
from ._pipeline_folder import PipelineFolder, open_pipeline, reading
from .base import Family
from .lookup import load_family


@dataclass(frozen=True)
class BaseModel:
    """What the configs of a text-to-video pipeline say; no weights are read.

    Attributes:
        folder: the pipeline's.
        family: of its transformer.
        transformer: on torch's "meta" device.
    """

    folder: PipelineFolder
    family: Family
    transformer: Any

    @property
    def patch_size(self) -> tuple[int, int, int]:
        """Latent frames, rows and columns that make one token."""
        return self.family.patch_size(self.transformer)

    def size_multiples(self) -> tuple[int, int, int] | None:
        """What frames less one, height and width must be multiples of, see `Family.size_multiples`; None without a
        VAE."""
        vae = self.component("vae")
        return None if vae is None else self.family.size_multiples(SimpleNamespace(vae=vae), self.patch_size)

    def component(self, name: str) -> Any:
        """One of diffusers' models in it on the "meta" device, such as the VAE; None without one.

        Raises:
            UserError: a config that cannot be read.
        """
        model_class: Any = self.folder.component_class(name)
        if model_class is None:
            return None
        with reading(self.folder.name, self.folder.field), torch.device("meta"):
            return model_class.from_config(self.folder.config(name))

    def flow_shift(self) -> Shift:
        """The timestep shift that its scheduler is configured with, by the number of a video's tokens.

        Raises:
            UserError: there is no scheduler.
        """
        scheduler: Any = self.folder.component_class("scheduler")
        if scheduler is None:
            raise UserError(f"{self.folder.field}: {self.folder.name!r} has no scheduler; set flow.shift")
        with reading(self.folder.name, self.folder.field):
            loaded = scheduler.from_pretrained(self.folder.path, subfolder="scheduler")
        return partial(self.family.flow_shift, loaded)


def read_base_model(
    name: str, *, field: str, revision: str | None = None, family: str | Family | None = None
) -> BaseModel:
    """Read a base's configs; from the Hub, nothing else is fetched.

    Args:
        name: a folder, or the Hub's `user/name`.
        field: what the user called it; it opens the line of every error.
        revision: branch, tag or commit on the Hub.
        family: see `load_family`; None goes by the transformer's class.

    Raises:
        UserError: a base that cannot be read, or that no family knows or supports.
    """
    classes = () if family is None else load_family(None, family).classes
    folder = open_pipeline(name, field=field, revision=revision, classes=classes)
    transformer_class: Any = folder.component_class("transformer")
    found = load_family(getattr(transformer_class, "__name__", "None"), family)
    if problem := found.pipeline_problem(SimpleNamespace(config=folder.index)):
        raise UserError(problem)
    with reading(name, field), torch.device("meta"):
        transformer = transformer_class.from_config(folder.config("transformer"))
    load_family(transformer, family)  # refuses variants
    return BaseModel(folder, found, transformer)
