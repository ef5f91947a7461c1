"""Masks on the latents' grid: pooled in space, the first frame alone and then in groups."""

import numpy as np
import pytest

from refalign_adapter import UserError
from refalign_adapter.analysis.latent_masks import latent_masks


def naive(masks: np.ndarray, grid: tuple[int, int, int], stride: tuple[int, int, int], least: float) -> np.ndarray:
    pooled = np.zeros((len(masks), *grid), dtype=bool)
    time, down, across = stride
    for frame, row, column in np.ndindex(*grid):
        frames = slice(0, 1) if frame == 0 else slice(1 + time * (frame - 1), 1 + time * frame)
        place = (frames, slice(row * down, (row + 1) * down), slice(column * across, (column + 1) * across))
        pooled[:, frame, row, column] = masks[:, *place].mean((1, 2, 3)) >= least
    return pooled


@pytest.mark.parametrize(("grid", "stride"), [((3, 2, 3), (4, 8, 8)), ((3, 2, 2), (8, 4, 2)), ((1, 2, 2), (4, 2, 2))])
def test_a_cell_is_the_subjects_when_half_its_pixels_are(grid, stride):
    shape = (2, 1 + stride[0] * (grid[0] - 1), grid[1] * stride[1], grid[2] * stride[2])
    masks = np.random.default_rng(0).random(shape) < 0.5
    found = latent_masks(masks, grid)
    np.testing.assert_array_equal(found, naive(masks, grid, stride, 0.5))
    np.testing.assert_array_equal(latent_masks(masks, grid, least=0.55), naive(masks, grid, stride, 0.55))
    assert 0 < found.mean() < 1


def test_a_subject_that_is_too_small_is_not_there():
    masks = np.zeros((1, 5, 16, 16), dtype=bool)
    masks[:, :, :5, :5] = True
    assert not latent_masks(masks, (2, 2, 2)).any()
    assert latent_masks(masks, (2, 2, 2), least=0.3).sum() == 2


@pytest.mark.parametrize("shape", [(1, 4, 16, 16), (1, 1, 16, 16), (1, 5, 15, 16), (5, 16, 16)])
def test_masks_off_the_grid_are_refused(shape):
    with pytest.raises(UserError, match=r"masks must be \(M, k · 2 \+ 1 frames"):
        latent_masks(np.zeros(shape, dtype=bool), (3, 2, 2))
