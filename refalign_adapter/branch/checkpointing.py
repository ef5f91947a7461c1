"""Gradient checkpointing runs blocks again in backward, when the pass is over. Each block is given its pass to keep.

diffusers calls `transformer._gradient_checkpointing_func(block, *inputs)`. Its public setter would overwrite whatever
the user set, so the attribute is wrapped for the duration of one forward; `tests/branch/test_checkpointing.py` tells
when it moves.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import Any

import torch

from .state import Pass

ATTRIBUTE = "_gradient_checkpointing_func"
Enter = Callable[[Any], AbstractContextManager[None]]


class _Checkpointing:
    """diffusers' checkpointing function, with every block's pass kept for its second run."""

    def __init__(self, original: Callable[..., Any], current: Pass, enter: Enter):
        self.original = original
        self.current = current
        self.enter = enter

    def __call__(self, block: Callable[..., Any], *inputs: Any) -> Any:
        def run(*block_inputs: Any) -> Any:
            with self.enter(block):
                return block(*block_inputs)

        return self.original(run, *inputs)


def wrap_checkpointing(transformer: Any, current: Pass, enter: Enter) -> None:
    """Have checkpointed blocks of this forward run inside `enter(block)`, in backward too; a no-op without.

    Args:
        transformer: the DiT.
        current: the pass that begins.
        enter: a context in which a block runs as it does in that pass.
    """
    if getattr(transformer, "gradient_checkpointing", False) and torch.is_grad_enabled():
        setattr(transformer, ATTRIBUTE, _Checkpointing(getattr(transformer, ATTRIBUTE), current, enter))


def unwrap_checkpointing(transformer: Any, current: Pass) -> None:
    """Put back the checkpointing function that there was before this pass."""
    wrapped = getattr(transformer, ATTRIBUTE, None)
    if isinstance(wrapped, _Checkpointing) and wrapped.current is current:
        setattr(transformer, ATTRIBUTE, wrapped.original)
