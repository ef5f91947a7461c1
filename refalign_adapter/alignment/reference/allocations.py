"""What the reference alignment loss takes in memory, for estimates on "meta": it works tile by tile, on data.

Shape letters: B batch, M references, N tokens per reference, C teacher channels.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from .loss import TILE_ELEMENTS


class AllocatedLoss(torch.autograd.Function):
    """What `reference_alignment_loss` allocates for students (B, M, N, C): it keeps their gradient, and while it works
    unit vectors of one sample's references in float32, and two tiles of cosines: one is made before the last goes."""

    @staticmethod
    def forward(ctx: Any, student: Tensor, target: Tensor) -> Tensor:
        gradient = torch.empty_like(student)
        tokens = student.shape[-2]
        of_targets = student.new_empty(student.shape[1:], dtype=torch.float32)
        of_one = [torch.empty_like(of_targets[0]) for _ in range(3)]  # unit vectors, their slope, its projection
        tiles = student.new_empty(2, min(tokens**2, TILE_ELEMENTS["other"]), dtype=torch.float32)
        del of_targets, of_one, tiles
        ctx.save_for_backward(gradient)
        return student.new_empty((), dtype=torch.float32)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        return torch.empty_like(ctx.saved_tensors[0]), None
