"""Gradient checkpointing runs blocks again in backward, when the pass is over. Each block is given its pass to keep.

diffusers calls `transformer._gradient_checkpointing_func(block, *inputs)`. Its public setter would overwrite whatever
the user set, so the attribute is wrapped for the duration of one forward; `tests/branch/test_checkpointing.py` tells
when it moves.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from .state import BranchState, Pass

ATTRIBUTE = "_gradient_checkpointing_func"


class _Checkpointing:
    """diffusers' checkpointing function, with every block's pass kept for its second run."""

    def __init__(self, original: Callable[..., Any], state: BranchState, current: Pass):
        self.original = original
        self.state = state
        self.current = current

    def __call__(self, block: Callable[..., Any], *inputs: Any) -> Any:
        def run(*block_inputs: Any) -> Any:
            with self.state.running(self.current):
                return block(*block_inputs)

        return self.original(run, *inputs)


def wrap_checkpointing(transformer: Any, state: BranchState, current: Pass) -> None:
    """Have checkpointed blocks of this forward see `current` again in backward; a no-op without checkpointing."""
    if getattr(transformer, "gradient_checkpointing", False) and torch.is_grad_enabled():
        original = getattr(transformer, ATTRIBUTE)
        if not isinstance(original, _Checkpointing):
            setattr(transformer, ATTRIBUTE, _Checkpointing(original, state, current))


def unwrap_checkpointing(transformer: Any) -> None:
    """Put the transformer's own checkpointing function back."""
    wrapped = getattr(transformer, ATTRIBUTE, None)
    if isinstance(wrapped, _Checkpointing):
        setattr(transformer, ATTRIBUTE, wrapped.original)
