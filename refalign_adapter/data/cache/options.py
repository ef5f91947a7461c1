"""What a cache is made of and how: the options that decide its content."""

from __future__ import annotations

import dataclasses
import os
from dataclasses import dataclass
from typing import Any

import torch

from ...config import DEFAULT_TEACHER
from ...config_checks import canvas_problems
from ...errors import ConfigError
from ...media.sizes import Size
from ..sources.manifest import SourcesValue
from .targets import ReferenceTarget, Target

DTYPES = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}
TEACHER_GRIDS = ("match", "native")

COMPARED = (
    "base_model",
    "height",
    "width",
    "num_frames",
    "fps",
    "max_references",
    "augment_references",
    "reference_variants",
    "keep_background",
    "max_sequence_length",
    "teacher_layer",
    "teacher_grid",
    "reference_scale",
    "reference_size",
    "drop_background",
    "buckets",
)
"""Options in which a cache and the training that reads it must agree."""

ADDED = {"reference_scale": 1.0, "reference_size": None, "drop_background": False, "buckets": []}
"""Options that older caches do not mention, and how those were made."""


@dataclass(frozen=True)
class CacheOptions:
    """How rows become cached samples.

    Args:
        base_model: diffusers folder or Hub id whose VAE and text encoder are used.
        cache_dir: folder of the cache.
        train_data: the training rows, as JSON types, see `manifest`: a path, a mapping, or a list of those.
        validation_data: the held-out rows, in the same ways; None: there are none.
        revision, variant: of the base model on the Hub.
        family: the base's family, see `load_family`; None finds it by the base's config.
        height, width, num_frames: of the videos in pixels and frames; with buckets, those of the first.
        buckets: sizes, in place of that one; a clip goes to the one that suits it best, see `choose_size`.
        fps: frames a second that clips are sampled at; None takes consecutive frames.
        max_references: references of a row at most.
        augment_references: whether references of regular pairs are augmented; those of cross pairs never are.
        reference_variants: augmented versions of each reference of a regular pair.
        keep_background: whether what a reference's mask leaves out stays within its bounding box.
        reference_scale: height and width of a reference's canvas as a share of the video's, in (0, 1], see
            `canvas.reference_size`.
        reference_size: (height, width) of that canvas in pixels, whatever the video's; None: it is such a share.
        drop_background: whether the cache says which tokens of a reference show white padding only.
        max_sequence_length: text tokens that captions are cut and padded to.
        teachers: ids or folders of vision encoders whose features of the references are cached.
        teacher_layer: which hidden states they give, see `Teacher`.
        teacher_grid: "match" encodes references on the DiT's token grid, "native" on each teacher's own.
        dtype: fp32, fp16 or bf16: what is stored.
        text_encoder_dtype: fp32, fp16 or bf16: what the text encoder computes in; the VAE always computes in fp32.
        seed: of the augmentations.
        num_workers: processes that decode clips while this one encodes; 0 decodes here.
        targets: what is cached for objectives beside reference alignment.

    Raises:
        ConfigError: lists every problem at once.
    """

    base_model: str
    cache_dir: str
    train_data: SourcesValue | None = None
    validation_data: SourcesValue | None = None
    revision: str | None = None
    variant: str | None = None
    family: str | None = None
    height: int = 480
    width: int = 832
    num_frames: int = 81
    fps: float | None = 16.0
    max_references: int = 4
    augment_references: bool = True
    reference_variants: int = 1
    keep_background: bool = False
    max_sequence_length: int = 512
    teachers: tuple[str, ...] = (DEFAULT_TEACHER,)
    teacher_layer: int = -1
    teacher_grid: str = "match"
    dtype: str = "bf16"
    text_encoder_dtype: str = "bf16"
    seed: int = 0
    num_workers: int = 0
    reference_scale: float = 1.0
    drop_background: bool = False
    buckets: tuple[Size, ...] = ()
    reference_size: tuple[int, int] | None = None
    targets: tuple[Target, ...] = ()

    def __post_init__(self) -> None:
        object.__setattr__(self, "teachers", tuple(self.teachers))
        self._settle_sizes()
        problems = []
        for name in ("height", "width", "num_frames", "max_references", "reference_variants", "max_sequence_length"):
            if getattr(self, name) < 1:
                problems.append(f"{name} must be at least 1, got {getattr(self, name)}")
        if self.fps is not None and not self.fps > 0:
            problems.append(f"fps must be positive, got {self.fps}")
        problems += canvas_problems(self.reference_scale, self.reference_size)
        if self.teacher_grid not in TEACHER_GRIDS:
            problems.append(f"teacher_grid must be one of {', '.join(TEACHER_GRIDS)}, got {self.teacher_grid!r}")
        for name in ("dtype", "text_encoder_dtype"):
            if getattr(self, name) not in DTYPES:
                problems.append(f"{name} must be one of {', '.join(DTYPES)}, got {getattr(self, name)!r}")
        if problems:
            raise ConfigError(problems)
        # 8 and 8.0 must not make two caches.
        object.__setattr__(self, "fps", None if self.fps is None else float(self.fps))

    def _settle_sizes(self) -> None:
        """A single bucket is the same as none: it must not make another cache."""
        for name, value in dataclasses.asdict(self.buckets[0]).items() if self.buckets else ():
            object.__setattr__(self, name, value)
        object.__setattr__(self, "buckets", self.buckets if len(self.buckets) > 1 else ())

    @property
    def sizes(self) -> tuple[Size, ...]:
        """What clips are brought to, one or several."""
        return self.buckets or (Size(self.num_frames, self.height, self.width),)

    @property
    def all_targets(self) -> tuple[Target, ...]:
        """Of all objectives, reference alignment's first where references have any."""
        references = ReferenceTarget(self.teachers, self.teacher_layer, self.teacher_grid)
        return (references, *self.targets) if self.teachers else self.targets

    def at(self, size: Size) -> CacheOptions:
        """The same with this size alone."""
        return dataclasses.replace(self, buckets=(size,))

    @property
    def manifests(self) -> dict[str, SourcesValue]:
        """Split ("train", "validation") -> where its rows are, of those that are given."""
        named = {"train": self.train_data, "validation": self.validation_data}
        return {split: value for split, value in named.items() if value}

    def compared(self) -> dict[str, Any]:
        """The options in which a cache and its reader must agree, as JSON types."""
        values = {name: getattr(self, name) for name in COMPARED}
        size = None if self.reference_size is None else list(self.reference_size)
        return values | {
            "base_model": model_id(self.base_model),
            "buckets": list(map(str, self.buckets)),
            "reference_size": size,
        }


def model_id(name: str) -> str:
    """A Hub id as it is, a folder by its own name: what is made with it stays valid when it moves."""
    return os.path.basename(os.path.abspath(name)) if os.path.isdir(name) else name
