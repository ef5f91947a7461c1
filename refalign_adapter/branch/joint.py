"""Joint attention (RefAlign, arXiv 2603.25743): references ride at the end of the video's own sequence.

Without a copy of the model's code: reference latents are appended on the frame axis, so that patch embedding, rotary
positions (the temporal index goes on after the video), timestep modulation and self-attention treat them as further
frames; their tokens skip cross-attention; their frames are cut off the output. Where the adapter says so, they are at
timestep 0 instead of the video's, as in Lightricks' IC-LoRA.

Shape letters: B batch, C latent channels, F latent frames, M references, H and W latent height and width, N tokens per
reference.
"""

from __future__ import annotations

import inspect
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..errors import UserError
from .attention import ReferenceAttention
from .processors import MASK, OFF, KeyValueProcessor, uninstall
from .state import Pass


class JointAttention(ReferenceAttention):
    """References in the video's own sequence.

    Args:
        clean: whether their tokens are at timestep 0.
    """

    def __init__(self, *args: Any, clean: bool = False):
        super().__init__(*args)
        self.clean = clean
        self.processors: dict[nn.Module, KeyValueProcessor] = {}
        for block in self.family.blocks(self.transformer):
            self.processors[block] = self.install(block)
            for cross in self.family.cross_attentions(block):
                self.handles.append(cross.register_forward_pre_hook(self._keep_video, with_kwargs=True))
                self.handles.append(cross.register_forward_hook(self._pad_references))

    def remove(self) -> None:
        super().remove()
        for block, processor in self.processors.items():
            uninstall(self.family.self_attention(block), processor)

    def prepare(self, current: Pass, arguments: inspect.BoundArguments) -> None:
        references = current.references
        if references is None:
            return
        if references.tokens is not None:
            raise UserError("tokens: joint attention takes whole references; isolated attention can leave some out")
        of_video, of_one = self.family.append_references(
            self.transformer, arguments.arguments, references.latents, clean=self.clean
        )
        current.tokens = references.count * of_one
        if references.mask is not None:
            shown = references.mask.repeat_interleave(of_one, 1)
            always = shown.new_ones(len(shown), of_video)
            current.key_mask = torch.cat([always, shown], 1)[:, None, None, :]
            current.undo.callback(self._mask, None)
            self._mask(current.key_mask)

    def _mask(self, mask: Tensor | None) -> None:
        for processor in self.processors.values():
            processor.set(OFF if mask is None else MASK, mask=mask)

    def finish(self, current: Pass, output: Any) -> Any:
        if current.references is None:
            return output
        return self.family.cut_references(output, current.references.count, current.tokens)

    @contextmanager
    def run_block(self, current: Pass, block: nn.Module) -> Iterator[None]:
        with self.state.running(current):
            processor = self.processors.get(block)
            if self.state.is_running(current) or processor is None or current.key_mask is None:
                yield
                return
            processor.set(MASK, mask=current.key_mask)
            try:
                yield
            finally:
                processor.set(OFF)

    def captured(self, current: Pass, output: Any) -> Any:
        if current.references is None:
            return None
        # A view would keep the video's tokens, offloaded or not.
        tokens = self.family.block_tokens(output)[:, -current.tokens :].clone()
        return tokens.unflatten(1, (current.references.count, -1))

    def _keep_video(self, attention: nn.Module, args: tuple, kwargs: dict[str, Any]) -> Any:
        current = self.state.current
        if current is None or current.tokens == 0:
            return None
        if args:
            return (args[0][:, : -current.tokens], *args[1:]), kwargs
        return args, {**kwargs, "hidden_states": kwargs["hidden_states"][:, : -current.tokens]}

    def _pad_references(self, attention: nn.Module, args: tuple, output: Tensor) -> Tensor | None:
        current = self.state.current
        if current is None or current.tokens == 0:
            return None
        return F.pad(output, (0, 0, 0, current.tokens))
