"""Weights on their way out of a pipeline through diffusers: those that act on references alone are held back."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from ..branch.reference_branch import living_branches
from ..export.formats import require_scope_all

SAMPLE = 4
"""Values of a tensor by which it is recognised."""
UP = ".lora_B."
"""Up-projections start at zero, so that only training makes them what they are; others may share a seed."""


def check_exportable(layers: nn.Module | Mapping[str, Tensor] | None, target: str) -> None:
    """Refuse to hand an adapter's weights to a stock format that cannot hold its scope.

    Args:
        layers: what is to be written: a module, or tensors under any names, cast and moved or not.
        target: what the user called; it opens the message.

    Raises:
        UserError: some are those of an adapter that acts on references alone.
    """
    tensors = layers.state_dict() if isinstance(layers, nn.Module) else layers or {}
    given = _marks(tensors.values())
    for branch in living_branches():
        if given & _marks(parameter for name, parameter in branch.named_parameters() if UP in name):
            require_scope_all(branch.config, target)


def _marks(tensors: Iterable[Tensor]) -> set[tuple[Any, ...]]:
    """What tensors are recognised by, after a cast too; those that begin with zeros have nothing of their own."""
    marks = set()
    for tensor in tensors:
        values = tensor.detach().flatten()[:SAMPLE].to("cpu", torch.bfloat16).tolist()
        if any(values):
            marks.add((*tensor.shape, *values))
    return marks
