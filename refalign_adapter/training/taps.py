"""Video tokens out of a transformer's call, by hooks of this call alone, whatever the references do.

Shape letters: B batch, F, R and K a video's frames, rows and columns of tokens.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator
from contextlib import ExitStack, contextmanager
from functools import partial
from typing import Any

from torch import Tensor, nn

from ..families.base import Family


@contextmanager
def video_tokens(
    transformer: Any, family: Family, blocks: Collection[int], grid: tuple[int, int, int]
) -> Iterator[dict[int, Tensor]]:
    """Inside the context, a call of the transformer puts its video tokens into the dictionary that is given.

    The hooks are there inside it alone: torch.compile would make a graph of each.

    Args:
        transformer: with or without a branch, whose hooks are on it already.
        family: its family.
        blocks: indices of the blocks after which tokens are taken; without any there is no hook at all.
        grid: F, R, K of the video.

    Yields:
        Block -> (B, F, R, K, dim) of the latest call, with its graph.
    """
    tokens: dict[int, Tensor] = {}
    with ExitStack() as handles:
        if blocks:
            # References that run alone do so before the video's own call comes to this hook.
            handles.enter_context(transformer.register_forward_pre_hook(lambda *_: tokens.clear()))
        layers = family.blocks(transformer)
        for index in sorted(blocks):
            handles.enter_context(layers[index].register_forward_hook(partial(_take, tokens, index, grid)))
        yield tokens


def _take(
    tokens: dict[int, Tensor], index: int, grid: tuple[int, int, int], block: nn.Module, args: tuple, output: Tensor
) -> None:
    if index in tokens:
        return  # a checkpointed block comes by again in backward: the first visit has the graph
    frames, rows, columns = grid
    count = frames * rows * columns
    if output.shape[1] == count:
        tokens[index] = output.unflatten(1, grid)
    elif output.shape[1] > count:  # references at the end; a view would keep theirs, offloaded or not
        tokens[index] = output[:, :count].clone().unflatten(1, grid)
