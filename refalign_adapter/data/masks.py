"""Masks as run lengths, the way COCO and OpenS2V write them: decoded, measured and compared by pycocotools.

Shape letters: K masks, H and W height and width in pixels.
"""

from __future__ import annotations

from collections.abc import Sequence
from importlib import import_module
from typing import Any

import numpy as np

from ..errors import UserError
from .rows import RunLengthMask

MAX_PIXELS = 100_000_000
"""Of a mask; a size is what a record says, and memory is taken for it before its run lengths are looked at."""


def decode_mask(mask: RunLengthMask) -> np.ndarray:
    """The mask as bool (H, W), True on the subject.

    Raises:
        UserError: run lengths that do not fill the mask's size, or pycocotools is not installed.
    """
    try:
        if not 0 < mask.height * mask.width <= MAX_PIXELS or min(mask.height, mask.width) < 1:
            raise ValueError(f"more than {MAX_PIXELS:,}")
        values = _pycocotools().decode(_coco(mask))
    except ValueError as error:
        if isinstance(error, UserError):
            raise
        raise UserError(f"mask: the run lengths do not fit {mask.width}x{mask.height} pixels ({error})") from None
    return values.astype(bool)


def mask_areas(masks: Sequence[RunLengthMask]) -> list[int]:
    """Pixels that each mask marks."""
    return [int(area) for area in _pycocotools().area([_coco(mask) for mask in masks])] if masks else []


def mask_overlaps(masks: Sequence[RunLengthMask]) -> np.ndarray:
    """Intersection over union of every two masks, float (K, K) in [0, 1]; masks of different sizes do not overlap."""
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
