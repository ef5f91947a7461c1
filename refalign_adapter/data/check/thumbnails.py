"""Small pictures of data rows as training sees them: frames of the clip, canvases of the references."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
from PIL import Image, ImageOps
from torch.utils.data import Dataset

from ...errors import UserError
from ...media.sizes import Size
from ...media.strips import frame_strip
from ..cache.options import CacheOptions
from ..cache.prepare import draw_canvases, read_clip
from ..sources.rows import Row
from .inspection import canvas_of

LONG_SIDE = 240
"""Pixels of a frame's or canvas's longer side."""
FRAMES = 4
VARIANTS = 3
"""Augmented versions of a reference that are shown at most; more of them tell nothing new."""
QUALITY = 88


@dataclass(frozen=True)
class Thumbnail:
    """A picture that was written: the file's name, and width and height in pixels."""

    file: str
    width: int
    height: int


@dataclass(frozen=True)
class RowThumbnails:
    """A row's pictures.

    Attributes:
        frames: frames of the clip side by side; None when it cannot be read.
        references: of each the canvas as it is, then its augmented versions; empty when it cannot be drawn.
    """

    frames: Thumbnail | None
    references: tuple[tuple[Thumbnail, ...], ...]


class ThumbnailWriter(Dataset[RowThumbnails]):
    """Draws and writes a row's thumbnails; made to run in a DataLoader's worker processes.

    Its index is (name of the row's files, row, size of its clip, or None where that cannot be read).

    Args:
        options: how references are drawn.
        folder: where the files go.
    """

    def __init__(self, options: CacheOptions, folder: Path):
        self.options, self.folder = options, folder

    def __getitem__(self, index: tuple[str, Row, Size | None]) -> RowThumbnails:
        name, row, size = index
        frames = None if size is None else self._frames(f"{name}_frames", row, size)
        references = [self._reference(f"{name}_{place}", row, place, size) for place in range(len(row.references))]
        return RowThumbnails(frames, tuple(references))

    def _frames(self, name: str, row: Row, size: Size) -> Thumbnail | None:
        try:
            return self._write(name, _strip(read_clip(row, size, self.options.fps)))
        except UserError:  # it was there when the row was checked
            return None

    def _reference(self, name: str, row: Row, place: int, size: Size | None) -> tuple[Thumbnail, ...]:
        alone, canvas = replace(row, references=(row.references[place],)), canvas_of(size, self.options)
        try:
            canvases = list(draw_canvases(alone, replace(self.options, augment_references=False), canvas))
            if self.options.augment_references and row.pair == "regular":
                canvases += list(draw_canvases(alone, self.options, canvas)[:VARIANTS])
        except UserError:  # a finding says why
            return ()
        return tuple(self._write(f"{name}_{version}", _small(item[0])) for version, item in enumerate(canvases))

    def _write(self, name: str, image: Image.Image) -> Thumbnail:
        image.save(self.folder / f"{name}.jpg", quality=QUALITY)
        return Thumbnail(f"{name}.jpg", image.width, image.height)


def _strip(frames: np.ndarray) -> Image.Image:
    return frame_strip([_small(frame) for frame in _few(frames)], FRAMES)


def _few(frames: np.ndarray) -> np.ndarray:
    """The frames that a strip shows, evenly spaced; the others need not be scaled."""
    return frames[np.linspace(0, len(frames) - 1, min(FRAMES, len(frames))).round().astype(int)]


def _small(pixels: np.ndarray) -> Image.Image:
    return ImageOps.contain(Image.fromarray(pixels), (LONG_SIDE, LONG_SIDE), Image.Resampling.LANCZOS)
