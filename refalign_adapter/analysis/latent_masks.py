"""Masks of subjects in pixels, on the grid of the latents.

Shape letters: M subjects, F latent frames, H and W latent height and width.
"""

from __future__ import annotations

import numpy as np

from ..errors import UserError

HALF = 0.5


def latent_masks(masks: np.ndarray, grid: tuple[int, int, int], *, least: float = HALF) -> np.ndarray:
    """Pool masks as a causal video VAE pools pixels: the first frame alone, then groups of its temporal stride.

    Args:
        masks: (M, frames, height, width) bool; frames are k · (F − 1) + 1, height and width multiples of H and W.
        grid: (F, H, W) of the latents.
        least: share of a latent's pixels, in (0, 1], that must be the subject's.

    Returns:
        (M, F, H, W) bool; all False where the subject is too small or not seen.

    Raises:
        UserError: masks that do not fall on the grid.
    """
    shares = np.asarray(masks, dtype=float)
    frames, rows, columns = grid
    if shares.ndim != 4 or not _falls_on(shares.shape[1:], grid):
        raise UserError(
            f"masks must be (M, k · {frames - 1} + 1 frames, height a multiple of {rows}, width of {columns}) for "
            f"latents {grid}, got {shares.shape}"
        )
    subjects, _, height, width = shares.shape
    shares = shares.reshape(subjects, -1, rows, height // rows, columns, width // columns).mean((3, 5))
    first, rest = shares[:, :1], shares[:, 1:]
    if frames > 1:
        rest = rest.reshape(subjects, frames - 1, -1, rows, columns).mean(2)
    return np.concatenate([first, rest], axis=1) >= least


def _falls_on(pixels: tuple[int, ...], grid: tuple[int, int, int]) -> bool:
    (length, height, width), (frames, rows, columns) = pixels, grid
    in_time = length == 1 if frames == 1 else length > 1 and (length - 1) % (frames - 1) == 0
    return in_time and height > 0 and width > 0 and height % rows == 0 and width % columns == 0
