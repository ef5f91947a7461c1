"""`read_images`: pictures from paths or a folder, as `reference_images` takes them."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path

from PIL import Image

from ..errors import UserError
from .images import read_image

SUFFIXES = (".png", ".jpg", ".jpeg", ".webp", ".avif", ".bmp", ".gif", ".tif", ".tiff")
"""Names of pictures in a folder; what else lies there is passed over."""


def read_images(source: str | os.PathLike[str] | Sequence[str | os.PathLike[str]]) -> list[Image.Image]:
    """Read pictures, RGB, upright, transparency laid on white.

    A side beyond 4,096 pixels is made smaller by a whole number: no canvas of references needs more.

    Args:
        source: a folder, whose pictures are taken by name in alphabetical order; a file; or a list of files.

    Returns:
        One picture a file, in order.

    Raises:
        UserError: nothing is there, a folder has no picture, or a file is none; the line names it.
    """
    if isinstance(source, str | os.PathLike):
        folder = Path(source).expanduser()
        if not folder.is_dir():
            return [read_image(folder, "images")]
        paths = sorted(path for path in folder.iterdir() if path.suffix.lower() in SUFFIXES)
        if not paths:
            raise UserError(f"images: {str(folder)!r} has no picture ({', '.join(SUFFIXES)}); name a folder with some")
        return [read_image(path, f"images[{index}]") for index, path in enumerate(paths)]
    if not isinstance(source, Sequence) or not all(isinstance(path, str | os.PathLike) for path in source):
        raise UserError(f"images: expected a folder, a file or a list of files, got {type(source).__name__}")
    return [read_image(Path(path).expanduser(), f"images[{index}]") for index, path in enumerate(source)]
