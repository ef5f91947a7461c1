"""2-D grids of features, which are never resampled as one flat row of tokens.

Shape letters: h and w the grid, T the width of a feature.
"""

import math

import torch
from torch import Tensor
from torch.nn.functional import interpolate

from .errors import UserError

Grid = tuple[int, int]
"""(rows, columns)."""


def resample_grid(features: Tensor, grid: Grid) -> Tensor:
    """Features (..., h, w, T) to (..., *grid, T): bilinear in 2-D, antialiased along an axis that shrinks.

    The same object comes back when the grid is already that one. Accumulates in float32 (float64 stays float64).

    Raises:
        UserError: a grid that is not two positive integers.
    """
    grid = check_grid(grid)
    *leading, height, width, channels = features.shape
    if (height, width) == grid:
        return features
    maps = features.reshape(math.prod(leading), height, width, channels).movedim(-1, 1)
    maps = maps.to(torch.promote_types(features.dtype, torch.float32))
    resampled = interpolate(maps, grid, mode="bilinear", align_corners=False, antialias=True)
    return resampled.to(features.dtype).movedim(1, -1).reshape(*leading, *grid, channels).contiguous()


def check_grid(grid: Grid) -> Grid:
    """Rows and columns, both positive.

    Raises:
        UserError: anything else.
    """
    if len(grid) != 2 or not all(isinstance(side, int) and side > 0 for side in grid):
        raise UserError(f"grid must be (rows, columns), two positive integers, got {tuple(grid)!r}")
    return grid[0], grid[1]
