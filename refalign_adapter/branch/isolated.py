"""Isolated attention: references run alone, as one-frame clips; video tokens read the keys and values they leave.

The transformer's own forward is called twice, with processors that keep keys and values in the references' pass and
read them in the video's. No reference sees the video, the prompt, the noise or another reference, so that one pass of
them serves all steps, and references cannot mix before the video reads them. A hook on the rotary embedding places
them after the video's frames, as RefAlign (arXiv 2603.25743) does, or at a frame of the adapter's own; their rows and
columns begin at 0, or where the video's end, as in Stand-In (arXiv 2508.07901).

Shape letters: B batch, C latent channels, F latent frames, M references, R real references of the batch, N tokens per
reference, T reference tokens of a sample that are kept.
"""

from __future__ import annotations

import inspect
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from ..errors import UserError
from .attention import ReferenceAttention
from .processors import OFF, READ, WRITE, KeyValueProcessor, SkippedProcessor, install, uninstall
from .reference_cache import ReferenceCache
from .state import Pass, References


class IsolatedAttention(ReferenceAttention):
    """References in a pass of their own.

    Args:
        reference_frame: temporal index of the first reference; None: the one after the video's last.
        beyond: whether rows and columns of references begin where the video's end.
    """

    def __init__(self, *args: Any, reference_frame: int | None = None, beyond: bool = False):
        super().__init__(*args)
        self.reference_frame, self.beyond = reference_frame, beyond
        self.processors: dict[nn.Module, KeyValueProcessor] = {}
        self.skipped: dict[nn.Module, list[tuple[nn.Module, SkippedProcessor]]] = {}
        self._next: Pass | None = None
        self._places: tuple[Tensor, tuple[int, int]] | None = None
        if (rotary := self.family.rotary_embedding(self.transformer)) is not None:
            self.handles.append(rotary.register_forward_hook(self._place))
        blocks = self.family.blocks(self.transformer)
        for index, block in enumerate(blocks):
            ends = index == len(blocks) - 1 and index not in self.capture_blocks
            self.processors[block] = self.install(block, ends=ends)
            self.skipped[block] = [
                (cross, install(cross, SkippedProcessor)) for cross in self.family.cross_attentions(block)
            ]

    def remove(self) -> None:
        super().remove()
        for block, processor in self.processors.items():
            uninstall(self.family.self_attention(block), processor)
        for cross, skipped in (pair for pairs in self.skipped.values() for pair in pairs):
            uninstall(cross, skipped)

    def cache(self, references: References, frames: int, grid: tuple[int, int] | None = None) -> ReferenceCache:
        if self.patch_size[0] != 1:
            raise UserError(f"references: this model's tokens span {self.patch_size[0]} frames, a reference has one")
        if self.beyond and grid is None:
            raise UserError(
                "size: with reference_place 'beyond' references stand where the video ends; give its latent (height, "
                "width)"
            )
        current = Pass(references=references, writes=True, capture=self.state.capture)
        first = frames if self.reference_frame is None else self.reference_frame
        corner = grid if self.beyond and grid is not None else (0, 0)
        clips = references.clips
        places = torch.arange(references.count, device=clips.device).expand(references.latents.shape[0], -1)
        self._next, self._places = current, (first + references.of_real(places), corner)
        arguments = self.family.reference_arguments(self.transformer, clips.to(self.transformer.dtype), *self._places)
        try:
            self.transformer(**arguments)
        finally:
            self._next = self._places = None
            written, current.written = current.written, []
        self.state.latest = current
        keys, values = zip(*written, strict=True)
        packing = _Packing(references, keys[0].shape[1])
        return ReferenceCache(
            tuple(map(packing, keys)),
            tuple(map(packing, values)),
            packing.mask,
            frames=frames if self.reference_frame is None else None,
            grid=grid if self.beyond else None,
        )

    def _new_pass(self) -> Pass:
        if self._next is None:
            return super()._new_pass()
        current, self._next = self._next, None
        return current

    def prepare(self, current: Pass, arguments: inspect.BoundArguments) -> None:
        if current.writes:
            current.key_mask = _kept(current.references)
        else:
            self._let_in(current, arguments.arguments)
        current.undo.callback(self._leave, current)
        for index, block in enumerate(self.processors):
            self._enter(current, index, block)

    def _let_in(self, current: Pass, arguments: dict[str, Any]) -> None:
        """Give the video's pass the keys and values it reads."""
        batch, frames, rows, columns = self.family.call_shape(self.transformer, arguments)
        cache, references = self.state.pending, current.references
        if references is not None:
            wanted, got = (batch, self.family.channels(self.transformer)), tuple(references.latents.shape[:2])
            if got != wanted:
                raise UserError(f"references must fit the video's batch and channels {wanted}, got {got}")
            cache = self.cache(references, frames, (rows, columns))
        if not isinstance(cache, ReferenceCache):
            return
        if cache.frames not in (None, frames):
            raise UserError(
                f"references: cached for a video of {cache.frames} latent frames, this one has {frames}; encode them "
                "again, or train an adapter with a reference_frame"
            )
        if cache.grid not in (None, (rows, columns)):
            raise UserError(
                f"references: cached for a video of {cache.grid[0]} x {cache.grid[1]} tokens (height x width), this "
                f"one has {rows} x {columns}; encode them again for its size"
            )
        if len(cache) not in (1, batch):
            raise UserError(f"references: cached for {len(cache)} samples, the video's batch has {batch}")
        current.cache = cache = cache if len(cache) == batch else cache.repeat(batch)
        if cache.mask is not None:
            current.key_mask = cache.mask.to(self.transformer.device)[:, None, None, :]

    def _enter(self, current: Pass, index: int, block: nn.Module) -> None:
        """Have one block's processors do what they do in this pass."""
        processor = self.processors[block]
        if current.writes:
            processor.set(WRITE, mask=current.key_mask)
        elif current.cache is not None:
            processor.set(READ, current.cache.keys[index], current.cache.values[index], current.key_mask)
        else:
            processor.set(OFF)
        self._skip(block, processor.mode)

    def _leave(self, current: Pass) -> None:
        """Empty all slots; what a references' pass wrote goes to the pass."""
        if current.writes:
            current.written = [(processor.keys, processor.values) for processor in self.processors.values()]
        for processor in self.processors.values():
            processor.set(OFF)
        for block in self.skipped:
            self._skip(block, OFF)

    def _skip(self, block: nn.Module, mode: str) -> None:
        for _, skipped in self.skipped[block]:
            skipped.mode = mode

    @contextmanager
    def run_block(self, current: Pass, block: nn.Module) -> Iterator[None]:
        if self.state.is_running(current):
            yield  # all is set
            return
        if block not in self.processors:  # of text alone: nothing but the LoRA's scope matters in it
            with self.state.running(current), self.scope.passing(block, current.writes):
                yield
            return
        processor = self.processors[block]
        before = processor.mode, processor.keys, processor.values, processor.mask
        with self.state.running(current), self.scope.passing(block, current.writes):
            self._enter(current, list(self.processors).index(block), block)
            try:
                yield
            finally:
                processor.set(*before)
                self._skip(block, processor.mode)

    def captured(self, current: Pass, output: Any) -> Any:
        return self.family.block_tokens(output) if current.writes else None

    def _place(self, rotary: nn.Module, args: tuple, output: Any) -> Any:
        """Rotary embeddings at the references' own places in place of the first frame's."""
        current = self.state.current
        if current is None or not current.writes or self._places is None:
            return None
        return self.family.rotary_at(self.transformer, args[0], *self._places)


def _kept(references: References | None) -> Tensor | None:
    """(R, 1, 1, N) bool of the tokens that references attend to in their own pass; None: all."""
    if references is None or references.tokens is None:
        return None
    return references.of_real(references.tokens)[:, None, None, :]


class _Packing:
    """Which of the references' tokens each sample keeps, real ones first.

    Attributes:
        index: (B, T) into all written tokens; None: every sample keeps all of its M references.
        mask: (B, T) bool, True where a token is real; None: all are.
    """

    def __init__(self, references: References, tokens: int):
        self.batch = references.latents.shape[0]
        self.index: Tensor | None = None
        self.mask: Tensor | None = None
        if references.mask is None and references.tokens is None:
            return
        device = references.latents.device
        real = references.mask
        if real is None:
            real = torch.ones(self.batch, references.count, dtype=torch.bool, device=device)
        kept = real[:, :, None].expand(-1, -1, tokens)
        if references.tokens is not None:
            kept = kept & references.tokens
        clip = (real.flatten().cumsum(0) - 1).clamp_min(0).view_as(real)
        source = clip[:, :, None] * tokens + torch.arange(tokens, device=device)
        most = int(kept.flatten(1).sum(1).max())
        order = kept.flatten(1).logical_not().to(torch.int8).argsort(dim=1, stable=True)[:, :most]
        self.index = source.flatten(1).gather(1, order)
        mask = kept.flatten(1).gather(1, order)
        self.mask = None if mask.all() else mask

    def __call__(self, written: Tensor) -> Tensor:
        """(R, N, heads, head_dim) as written to (B, T, heads, head_dim)."""
        if self.index is None:
            return written.reshape(self.batch, -1, *written.shape[2:])
        return written.flatten(0, 1)[self.index]
