"""Masks as run lengths, the way COCO and OpenS2V write them: decoded, measured and compared by pycocotools.

Shape letters: K masks, H and W height and width in pixels.
"""

from __future__ import annotations

from collections.abc import Sequence
from importlib import import_module
from typing import Any

import numpy as np

from ..errors import UserError, shorten
from .rows import RunLengthMask

MAX_PIXELS = 100_000_000
"""Of a mask; a size is what a record says, and memory is taken for it before its run lengths are looked at."""
MAX_CHARACTERS = 7
"""Of one run length; five bits each, these hold any that a mask can have."""


def decode_mask(mask: RunLengthMask) -> np.ndarray:
    """The mask as bool (H, W), True on the subject.

    Raises:
        UserError: run lengths that do not fill the mask's size, or pycocotools is not installed.
    """
    check_mask(mask)
    return _pycocotools().decode(_coco(mask)).astype(bool)


def check_mask(mask: RunLengthMask) -> None:
    """Refuse what pycocotools, which looks at nothing, would read memory for that is not its own, or never end with.

    Raises:
        UserError: run lengths that do not fill the mask's size.
    """
    try:
        if not 0 < mask.height * mask.width <= MAX_PIXELS or min(mask.height, mask.width) < 1:
            raise ValueError(f"1 to {MAX_PIXELS:,} are read")
        if (filled := int(_run_lengths(mask.counts).sum())) != mask.height * mask.width:
            raise ValueError(f"they fill {filled:,}")
    except ValueError as error:
        size = f"{shorten(mask.width)}x{shorten(mask.height)}"
        raise UserError(f"mask: the run lengths do not fit {size} pixels ({error})") from None


def _run_lengths(counts: str) -> np.ndarray:
    """COCO's compressed counts as numbers: five bits a character, the sixth says that more follow; from the fourth
    number on they are differences to the last but one."""
    bits = np.frombuffer(counts.encode("ascii", "backslashreplace"), np.uint8).astype(np.int64) - 48
    if not bits.size or bits.min() < 0 or bits.max() > 63:
        raise ValueError("they are damaged")
    ends = np.flatnonzero(bits < 32)
    if not ends.size or ends[-1] != bits.size - 1:
        raise ValueError("they end in the middle")
    starts = np.concatenate([[0], ends[:-1] + 1])
    if (ends - starts).max() >= MAX_CHARACTERS:
        raise ValueError("they are damaged")
    shifts = 5 * (np.arange(bits.size) - np.repeat(starts, ends - starts + 1))
    lengths = np.add.reduceat((bits & 31) << shifts, starts)
    lengths -= np.where(bits[ends] & 16, 32 << shifts[ends], 0)
    for first in (1, 2):
        lengths[first::2] = np.cumsum(lengths[first::2])
    if lengths.min() < 0:
        raise ValueError("they are damaged")
    return lengths


def mask_areas(masks: Sequence[RunLengthMask]) -> list[int]:
    """Pixels that each mask marks; see `check_mask` for masks from outside."""
    return [int(area) for area in _pycocotools().area([_coco(mask) for mask in masks])] if masks else []


def mask_overlaps(masks: Sequence[RunLengthMask]) -> np.ndarray:
    """Intersection over union of every two masks, float (K, K) in [0, 1]; masks of different sizes do not overlap.

    See `check_mask` for masks from outside.
    """
    coco = [_coco(mask) for mask in masks]
    overlaps = np.zeros((len(masks), len(masks)))
    if coco:
        overlaps[:] = np.maximum(_pycocotools().iou(coco, coco, [0] * len(coco)), 0)
    return overlaps


def encode_mask(mask: np.ndarray) -> RunLengthMask:
    """Bool (H, W) as run lengths."""
    counts = _pycocotools().encode(np.asfortranarray(mask.astype(np.uint8)))["counts"]
    height, width = mask.shape
    return RunLengthMask(height, width, counts.decode())


def _coco(mask: RunLengthMask) -> dict[str, Any]:
    return {"size": [mask.height, mask.width], "counts": mask.counts.encode()}


def _pycocotools() -> Any:
    try:
        return import_module("pycocotools.mask")
    except ImportError:
        raise UserError(
            "masks: run lengths need pycocotools, which is not installed; pip install 'refalign-adapter[train]'"
        ) from None
