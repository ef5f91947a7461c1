"""Masks as run lengths, the way COCO and OpenS2V write them: decoded, measured and compared by pycocotools.

Shape letters: K masks, H and W height and width in pixels.
"""

from __future__ import annotations

from collections.abc import Sequence
from importlib import import_module
from typing import Any

import numpy as np

from ...errors import UserError, shorten
from .rows import RunLengthMask

MAX_PIXELS = 100_000_000
"""Of a mask; a size is what a record says, and memory is taken for it before its run lengths are looked at."""
MAX_CHARACTERS = 7
"""Of one run length; five bits each, these hold any that a mask has."""
_KINDS = bytes(46 if 48 <= code < 80 else 43 if 80 <= code < 112 else 33 for code in range(256))
"""Characters of run lengths: `.` ends one, `+` says that more follow, `!` is in none."""


def decode_mask(mask: RunLengthMask) -> np.ndarray:
    """The mask as bool (H, W), True on the subject.

    Raises:
        UserError: run lengths that do not fill the mask's size, or pycocotools is not installed.
    """
    check_mask(mask)
    return _pycocotools().decode(_coco(mask)).astype(bool)


def is_well_formed(mask: RunLengthMask) -> bool:
    """Whether pycocotools, which looks at nothing, keeps to its own memory with a mask and comes to an end."""
    possible = min(mask.height, mask.width) > 0 and mask.height * mask.width <= MAX_PIXELS
    kinds = mask.counts.encode("utf-8", "surrogatepass").translate(_KINDS)
    return possible and kinds.endswith(b".") and b"!" not in kinds and b"+" * MAX_CHARACTERS not in kinds


def check_mask(mask: RunLengthMask) -> None:
    """Refuse a mask that is not well formed or not of its size.

    Raises:
        UserError: its run lengths do not fill the mask's size.
    """
    lengths = _run_lengths(mask.counts) if is_well_formed(mask) else np.zeros(1)
    if lengths.min() < 0 or lengths.sum() != mask.height * mask.width or not lengths.any():
        size = f"{shorten(mask.width)}x{shorten(mask.height)}"
        raise UserError(f"mask: the run lengths do not fit {size} pixels, of which {MAX_PIXELS:,} are read")


def _run_lengths(counts: str) -> np.ndarray:
    """COCO's compressed counts as numbers: five bits a character, the sixth says that more follow; from the fourth
    number on they are differences to the last but one."""
    bits = np.frombuffer(counts.encode("ascii"), np.uint8).astype(np.int64) - 48
    ends = np.flatnonzero(bits < 32)
    starts = np.concatenate([[0], ends[:-1] + 1])
    shifts = 5 * (np.arange(bits.size) - np.repeat(starts, ends - starts + 1))
    lengths = np.add.reduceat((bits & 31) << shifts, starts)
    lengths -= np.where(bits[ends] & 16, 32 << shifts[ends], 0)
    for first in (1, 2):
        lengths[first::2] = np.cumsum(lengths[first::2])
    return lengths


def mask_areas(masks: Sequence[RunLengthMask]) -> list[int]:
    """Pixels that each mask marks; masks from outside must be well formed."""
    return [int(area) for area in _pycocotools().area([_coco(mask) for mask in masks])] if masks else []


def mask_overlaps(masks: Sequence[RunLengthMask]) -> np.ndarray:
    """Intersection over union of every two masks, float (K, K) in [0, 1]; masks of different sizes do not overlap.

    Masks from outside must be well formed.
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
