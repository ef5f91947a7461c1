"""A subject cut out at one scale: its mask's centre in the middle, its area always the same share of the square."""

import numpy as np
from PIL import Image

SIDE = 32
SHARE = 0.35
"""Of the square that the mask's area covers: what turns then still lies inside."""


def canonical(frame: np.ndarray, mask: np.ndarray, side: int = SIDE) -> tuple[np.ndarray, np.ndarray]:
    """Cut a subject out.

    Args:
        frame: uint8 (H, W, 3).
        mask: bool (H, W) with something in it.
        side: of the square, in pixels.

    Returns:
        float64 (side, side, 3) in [0, 1], and bool (side, side), the mask.
    """
    rows, columns = np.nonzero(mask)
    scale = np.sqrt(len(rows) / SHARE) / side
    top, left = rows.mean() + 0.5 - scale * side / 2, columns.mean() + 0.5 - scale * side / 2
    window = (scale, 0, left, 0, scale, top)  # a pixel of the square to one of the frame, as PIL wants it
    cut = [
        image.transform((side, side), Image.Transform.AFFINE, window, Image.Resampling.BILINEAR)
        for image in (Image.fromarray(frame), Image.fromarray(mask.astype(np.uint8) * 255))
    ]
    return np.asarray(cut[0]) / 255, np.asarray(cut[1]) > 127
