"""What the cache holds for an objective: a tensor per teacher, of every reference or of every row's video.

A target of a new objective is a subclass of `Target` among `CacheOptions.targets`. Its tensors are parts of their own,
`cache_dir/target_<objective>/`; those of reference alignment are where they were before there were others. `meta.json`
says of each whether references or videos have it and what shape it has, so that a cache is read without its makers.

Shape letters: M references, F frames, H and W height and width in pixels, H' and W' those of a reference's canvas, h
and w a teacher's grid, T its width.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

from torch import Tensor

from ...batch import REFERENCE

Models = Mapping[str, Any]
"""Teacher id -> what it loaded."""


@dataclass(frozen=True)
class Sizes:
    """What the rows of one size are brought to.

    Attributes:
        video: F, H, W in frames and pixels.
        canvas: H' and W' of a reference in pixels.
        keep_background: whether what a reference's mask leaves out stays within its bounding box.
        tokens: rows and columns of tokens that the base's transformer makes of a reference.
        multiples: pixel frames, rows and columns behind one token of a video, see `Family.size_multiples`.
    """

    video: tuple[int, int, int]
    canvas: tuple[int, int]
    keep_background: bool
    tokens: tuple[int, int]
    multiples: tuple[int, int, int]


class Target(ABC):
    """One objective's targets.

    Attributes:
        objective: its name, see `alignment.objective.NAME`.
        of: what has one: "references", each augmented version of each; or "video", the row's clip.
        teachers: ids of the teachers that give one each.
        layer: which hidden states of these, see `Teacher`.
    """

    objective: ClassVar[str]
    of: ClassVar[Literal["references", "video"]]
    teachers: tuple[str, ...]
    layer: int = -1

    @property
    def models(self) -> Sequence[str]:
        """The teachers that are vision encoders to be loaded, Hub ids or folders; by default all."""
        return self.teachers

    @abstractmethod
    def facts(self, teacher: str, sizes: Sizes, models: Models) -> dict[str, Any]:
        """JSON facts that decide the tensor besides the pixels, their size, and what it is stored in."""

    @abstractmethod
    def shape(self, teacher: str, sizes: Sizes, models: Models) -> tuple[int, ...]:
        """Of one reference's or one row's tensor; the last side, its width, is the same for rows of all sizes."""

    @abstractmethod
    def encode(self, teacher: str, pixels: Tensor, sizes: Sizes, models: Models) -> Tensor:
        """The tensor of pixels in [0, 1].

        Args:
            teacher: which.
            pixels: (M, 3, H', W') references, for a tensor (M, …); or a video (3, F, H, W).
            sizes: of them.
            models: the loaded teachers, on the device that encodes.
        """


@dataclass(frozen=True)
class ReferenceTarget(Target):
    """Teachers' features (h, w, T) of every reference.

    Args:
        teachers: ids or folders of vision encoders.
        layer: which hidden states they give.
        grid: "match" shows them references on the DiT's token grid, "native" on each teacher's own.
    """

    objective: ClassVar[str] = REFERENCE
    of: ClassVar[Literal["references", "video"]] = "references"
    teachers: tuple[str, ...]
    layer: int = -1
    grid: str = "match"

    def facts(self, teacher: str, sizes: Sizes, models: Models) -> dict[str, Any]:
        height, width = sizes.canvas
        return {
            "height": height,
            "width": width,
            "keep_background": sizes.keep_background,
            "grid": self._grid(sizes, list),
            "teacher": models[teacher].fingerprint(),
        }

    def shape(self, teacher: str, sizes: Sizes, models: Models) -> tuple[int, ...]:
        model = models[teacher]
        grid = sizes.tokens if self.grid == "match" and model.any_size else model.native_grid
        return *grid, model.dim

    def encode(self, teacher: str, pixels: Tensor, sizes: Sizes, models: Models) -> Tensor:
        return models[teacher].encode(pixels, self._grid(sizes, tuple))

    def _grid(self, sizes: Sizes, kind: type) -> Any:
        return kind(sizes.tokens) if self.grid == "match" else None
