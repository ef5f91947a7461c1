"""Gradient checkpointing whose kept activations wait for backward in host memory.

Of each block, checkpointing keeps its inputs. All but the first, the hidden states, are one tensor for all blocks
(text, timestep, rotary tables) and stay where they are; the hidden states, B × tokens × width for every block, go.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import Tensor
from torch.autograd.graph import save_on_cpu
from torch.utils.checkpoint import checkpoint


def offloaded_checkpoint(block: Callable[..., Any], hidden_states: Tensor, *shared: Any) -> Any:
    """Run a block, keep nothing of it but its hidden states, in host memory, and run it again in backward.

    For diffusers' `enable_gradient_checkpointing`. On a GPU the copies go through pinned memory, in the order of the
    stream, so that nothing waits for them; torch rounds each up to a power of two bytes. On the CPU nothing is copied.

    Args:
        block: the block or a function of the same arguments.
        hidden_states: (B, tokens, width), its first argument.
        shared: its other arguments.
    """

    def run(own: Tensor) -> Any:
        return block(own, *shared)

    # What the block itself saves is checkpointing's to drop: its hooks lie inside these and see it first.
    with save_on_cpu(pin_memory=hidden_states.is_cuda):
        return checkpoint(run, hidden_states, use_reentrant=False)
