"""Pictures and masks in: formats by their content, 8 or 16 bits a value, transparency on white."""

from __future__ import annotations

import os
import stat
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import numpy as np
from PIL import Image, ImageOps, UnidentifiedImageError

from ..errors import UserError

FORMATS = ("PNG", "JPEG", "WEBP", "AVIF", "BMP", "GIF", "TIFF")
"""What is opened; Pillow knows more, some of which other programs read for it."""
MAX_PIXELS = 100_000_000
"""Of a picture; beyond that, a reference that fills some hundred tokens costs gigabytes."""
ENOUGH = 4096
"""Pixels of a long side that no canvas needs more of; what is used whole is made smaller as soon as it is decoded."""
MAX_LABELS = 32
"""Different values up to which a mask's are taken for labels; blurred edges and lossy files have more."""
ONE_LABEL = 0.7
"""Share of what is marked that the brightest value must have, for the others to be its edge."""
SMALL_MASK = 64
"""Marked pixels below which edges outweigh what they are the edges of."""
ALPHA = ("RGBA", "LA", "PA", "RGBa", "La")
_HEIC = (b"ftypheic", b"ftypheix", b"ftyphevc", b"ftypmif1", b"ftypmsf1", b"ftypheim", b"ftypheis")


def read_image(path: str | Path, field: str = "image", *, whole: bool = False) -> Image.Image:
    """Read an image as RGB, upright, transparency laid on white.

    Args:
        path: a file.
        field: what errors call it.
        whole: whether every pixel is needed, as with a mask or a box beside it; else a picture with a side beyond
            `ENOUGH` is made smaller by a whole number.

    Raises:
        UserError: the file is missing, empty, no image of `FORMATS`, has too many pixels, or values beyond 16 bits.
    """
    with _opened(path, field) as image:
        if not whole and image.format == "JPEG":
            image.draft(None, (ENOUGH, ENOUGH))
        image.load()
        see_through = image.mode in ALPHA or "transparency" in image.info
        if not whole and (factor := max(image.size) // ENOUGH) > 1 and not see_through:
            image = _eight_bits(image, path, field)
            # Numbers of a palette have no mean.
            image = (image.convert("RGB") if image.mode in ("1", "P") else image).reduce(factor)
        return to_rgb(image, path, field)


def to_rgb(image: Image.Image, name: object = "", field: str = "image") -> Image.Image:
    """Any image as RGB, upright, transparency laid on white.

    Args:
        image: as Pillow opened it, or of one's own.
        name: what errors call it.
        field: where it was given.

    Raises:
        UserError: values that are neither 8 nor 16 bits.
    """
    image = _eight_bits(ImageOps.exif_transpose(image), name, field)
    if image.mode in ALPHA or "transparency" in image.info:
        image = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", image.size, (255, 255, 255, 255)), image)
    return image.convert("RGB")


@dataclass(frozen=True)
class MaskReading:
    """A mask and how it was read.

    Attributes:
        mask: bool (H, W), True on what is marked.
        by_alpha: whether the alpha channel marks, not the colours.
    """

    mask: np.ndarray
    by_alpha: bool


def read_mask(path: str | Path, field: str = "mask") -> np.ndarray:
    """Read a mask, see `read_mask_file`."""
    return read_mask_file(path, field).mask


def read_mask_file(path: str | Path, field: str = "mask") -> MaskReading:
    """Read a mask: what is brighter than half of the brightest pixel (0/1, 0/255 and 16 bits alike), or what is there
    at all, where an alpha channel says that.

    Raises:
        UserError: the file is missing, empty or no image, nothing in it is marked, or it can be read in two ways: with
            several labels, or with a mark both in its colours and in its alpha.
    """
    with _opened(path, field) as image:
        image.load()
        image = ImageOps.exif_transpose(image)
        alpha = _alpha(image)
        values = _grey(image, path, field)
    if alpha is not None and alpha.min() < alpha.max():
        shown = values[alpha > alpha.max() / 2]
        levels = np.unique(shown)
        if len(levels) == 2 and levels[0] * 4 < levels[1] and min(np.mean(shown == level) for level in levels) > 0.01:
            raise UserError(
                f"{field}: {str(path)!r} marks one thing by its colours and another by its alpha; save it as one grey "
                "channel"
            )
        return MaskReading(alpha > alpha.max() / 2, by_alpha=True)
    if not values.any():
        raise UserError(f"{field}: {str(path)!r} marks nothing; every pixel is black")
    _check_labels(values, path, field)
    return MaskReading(values > values.max() / 2, by_alpha=False)


def _check_labels(values: np.ndarray, path: object, field: str) -> None:
    marked = values[values > 0]
    levels = np.unique(marked)
    few = 1 < len(levels) <= MAX_LABELS and marked.size >= SMALL_MASK
    if few and np.mean(marked > 0.9 * levels[-1]) < ONE_LABEL:
        listed = ", ".join(f"{level:g}" for level in levels[:8])
        raise UserError(
            f"{field}: {str(path)!r} has several labels ({listed}), and none is said to be the subject; save the "
            "subject's alone, in white on black"
        )


def _alpha(image: Image.Image) -> np.ndarray | None:
    if image.mode in ALPHA or "transparency" in image.info:
        return np.asarray(image.convert("RGBA").getchannel("A"))
    return None


def _grey(image: Image.Image, path: object, field: str) -> np.ndarray:
    """A mask's values as they are where it has one channel, else its brightness; (H, W)."""
    if image.mode.startswith("I"):
        _check_range(image, path, field)
        return np.asarray(image)
    if image.mode == "F":
        raise _floats(path, field)
    return np.asarray((image.convert("RGB") if image.mode in (*ALPHA, "LAB") else image).convert("L"))


def _eight_bits(image: Image.Image, path: object, field: str) -> Image.Image:
    """Grey of 16 bits in 8, which `convert` would clip to white."""
    if image.mode == "F":
        raise _floats(path, field)
    if not image.mode.startswith("I"):
        return image
    _check_range(image, path, field)
    eight = Image.fromarray((np.asarray(image) / 257).round().astype(np.uint8))
    eight.info = {name: value for name, value in image.info.items() if name == "exif"}
    return eight


def _check_range(image: Image.Image, path: object, field: str) -> None:
    values = np.asarray(image)
    least, most = int(values.min()), int(values.max())
    if not 0 <= least <= most <= 65_535:
        raise UserError(
            f"{field}: {str(path)!r} has values from {least} to {most}, beyond 16 bits; save it with 8 or 16 bits each"
        )


def _floats(path: object, field: str) -> UserError:
    return UserError(
        f"{field}: {str(path)!r} has floating point values, whose range nobody says; save it with 8 or 16 bits a value"
    )


@contextmanager
def _opened(path: str | Path, field: str) -> Iterator[Image.Image]:
    """The image, its pixels not decoded yet; what goes wrong while it is open is a UserError."""
    try:
        _check_regular(path)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", Image.DecompressionBombWarning)  # MAX_PIXELS says it in one line
            opened = Image.open(path, formats=_known_formats())
        with opened as image:
            width, height = image.size
            if width * height > MAX_PIXELS:
                raise UserError(
                    f"{field}: {str(path)!r} has {width}x{height} pixels, more than {MAX_PIXELS:,}; scale it down"
                )
            yield image
    except FileNotFoundError:
        raise UserError(f"{field}: {str(path)!r} does not exist") from None
    except (UnidentifiedImageError, OSError, SyntaxError, ValueError, EOFError, Image.DecompressionBombError) as error:
        if isinstance(error, UserError):
            raise
        raise UserError(f"{field}: cannot read {str(path)!r} ({_reason(path, error)})") from None


def _check_regular(path: str | Path) -> None:
    status = os.stat(path)
    if not stat.S_ISREG(status.st_mode) and not stat.S_ISDIR(status.st_mode):
        raise ValueError("a pipe or device, not a file")


@cache
def _known_formats() -> tuple[str, ...]:
    Image.init()
    return tuple(name for name in FORMATS if name in Image.OPEN)  # older Pillow has no AVIF


def _reason(path: str | Path, error: Exception) -> str:
    if isinstance(error, Image.DecompressionBombError):
        return "far too many pixels; scale it down"
    if not isinstance(error, UnidentifiedImageError):
        return " ".join(str(getattr(error, "strerror", None) or error).split())[:200]
    with open(path, "rb") as file:
        start = file.read(32)
    if start[4:12] in _HEIC:
        return "HEIC, which is not read; convert it to JPEG or PNG"
    return f"no image that can be read; {', '.join(FORMATS)} are"
