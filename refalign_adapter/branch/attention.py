"""What the hooks on a transformer do whatever the attention: a pass begins and ends with its call, come what may."""

from __future__ import annotations

import inspect
from abc import ABC, abstractmethod
from collections.abc import Sequence
from contextlib import AbstractContextManager
from functools import partial
from typing import Any

from torch import nn

from ..errors import UserError
from ..families.base import Family
from .checkpointing import unwrap_checkpointing, wrap_checkpointing
from .lora_scope import LoraScope
from .processors import KeyValueProcessor, install
from .reference_cache import ReferenceCache
from .rewired import Rewired
from .state import BranchState, Pass, References


class ReferenceAttention(ABC):
    """Hooks of one transformer by which references reach it.

    Args:
        transformer: the DiT.
        family: its family.
        state: shared with the branch.
        scope: of the adapter's LoRA.
        capture_blocks: indices of the blocks whose reference tokens can be captured.
    """

    def __init__(
        self, transformer: Any, family: Family, state: BranchState, scope: LoraScope, capture_blocks: Sequence[int]
    ):
        self.transformer = transformer
        self.family = family
        self.state = state
        self.scope = scope
        self.capture_blocks = tuple(capture_blocks)
        self.signature = inspect.signature(type(transformer).forward)
        self.patch_size = family.patch_size(transformer)
        # Of several branches on one transformer, the one that begins last ends first.
        self.handles = [
            transformer.register_forward_pre_hook(self._begin, with_kwargs=True),
            transformer.register_forward_hook(self._end, with_kwargs=True, always_call=True, prepend=True),
        ]
        self._capture_handles: list[Any] = []
        self._rewired: dict[type, Rewired] = {}

    def install(self, block: nn.Module, *, ends: bool = False) -> KeyValueProcessor:
        """Put a `KeyValueProcessor` in front of a block's self-attention; `ends` as there."""
        attention: Any = self.family.self_attention(block)
        kind = type(getattr(attention.processor, "base", attention.processor))
        if kind not in self._rewired:
            self._rewired[kind] = Rewired(kind)
        return install(attention, KeyValueProcessor, self.family, ends, self._rewired[kind])

    def remove(self) -> None:
        """Take all hooks off."""
        self.set_capture(False)
        for handle in self.handles:
            handle.remove()
        self.handles.clear()

    def set_capture(self, capture: bool) -> None:
        """Put the hooks that capture reference tokens on the aligned blocks, or take them off.

        They are there while they are needed only: each is a block's own, and torch.compile would make a graph of each.
        """
        for handle in self._capture_handles:
            handle.remove()
        blocks = self.family.blocks(self.transformer)
        self._capture_handles = [
            blocks[index].register_forward_hook(partial(self._capture, index))
            for index in (self.capture_blocks if capture else ())
        ]

    def _begin(self, transformer: Any, args: tuple, kwargs: dict[str, Any]) -> tuple[tuple, dict[str, Any]]:
        current = self._new_pass()
        self.state.begin(current)
        arguments = self.signature.bind(transformer, *args, **kwargs)
        self.prepare(current, arguments)  # may run a pass of its own, before this one's LoRAs are chosen
        current.undo.enter_context(self.scope.passing(transformer, current.writes))
        wrap_checkpointing(transformer, current, partial(self.run_block, current))
        return arguments.args[1:], arguments.kwargs

    def _new_pass(self) -> Pass:
        pending = self.state.pending
        references = pending if isinstance(pending, References) else None
        self.state.latest = Pass(references=references, capture=self.state.capture)
        return self.state.latest

    def _end(self, transformer: Any, args: tuple, kwargs: dict[str, Any], output: Any) -> Any:
        current = self.state.end()
        if current is None:
            return output
        unwrap_checkpointing(transformer, current)
        return output if output is None else self.finish(current, output)  # None: the forward raised

    @abstractmethod
    def prepare(self, current: Pass, arguments: inspect.BoundArguments) -> None:
        """Let the pass's references in before the transformer's forward; may change its arguments."""

    def finish(self, current: Pass, output: Any) -> Any:
        """The transformer's output without what references added to it."""
        return output

    @abstractmethod
    def run_block(self, current: Pass, block: nn.Module) -> AbstractContextManager[None]:
        """Inside the context, a checkpointed block runs as it does in this pass, also in backward."""

    @abstractmethod
    def captured(self, current: Pass, output: Any) -> Any:
        """A block's reference tokens from its output, to be kept; None: this pass has none."""

    def cache(self, references: References, frames: int, grid: tuple[int, int] | None = None) -> ReferenceCache:
        """Run references alone and keep what later passes need of them, with its graph where gradients are on.

        Args:
            references: what to run.
            frames: of the video, in tokens.
            grid: its rows and columns of tokens; None: not known.

        Raises:
            UserError: this attention has nothing to keep, or it must know what it is not told.
        """
        raise UserError(
            "references: attention 'joint' runs references along with the video, there is nothing to keep of them; "
            "train an adapter with attention='isolated'"
        )

    def _capture(self, index: int, block: nn.Module, args: tuple, output: Any) -> None:
        current = self.state.current
        if current is None or not current.capture or index in current.features:
            return  # a checkpointed block comes by again in backward: the first visit has the graph
        if (tokens := self.captured(current, output)) is not None:
            current.features[index] = tokens
