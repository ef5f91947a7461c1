"""Joint attention (RefAlign, arXiv 2603.25743): references ride at the end of the video's own sequence.

Without a copy of the model's code: reference latents are appended on the frame axis, so that patch embedding, rotary
positions (the temporal index goes on after the video), timestep modulation and self-attention treat them as further
frames; their tokens skip cross-attention; their frames are cut off the output.

Shape letters: B batch, C latent channels, F latent frames, M references, H and W latent height and width, N tokens per
reference.
"""

from __future__ import annotations

import inspect
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..errors import UserError
from ..families.base import Family
from .checkpointing import unwrap_checkpointing, wrap_checkpointing
from .state import BranchState, Pass, References


class JointAttention:
    """Hooks of one transformer for joint attention.

    Args:
        transformer: the DiT.
        family: its family.
        state: shared with the branch.
        capture_blocks: indices of the blocks whose reference tokens are captured.
    """

    def __init__(self, transformer: Any, family: Family, state: BranchState, capture_blocks: tuple[int, ...]):
        self.family = family
        self.state = state
        self.signature = inspect.signature(type(transformer).forward)
        self.patch_size = family.patch_size(transformer)
        attention = family.self_attention(family.blocks(transformer)[0])
        self.attention_arguments = list(inspect.signature(type(attention).forward).parameters)[1:]
        self.handles = [
            transformer.register_forward_pre_hook(self._begin, with_kwargs=True),
            transformer.register_forward_hook(self._end, with_kwargs=True, always_call=True),
        ]
        for index, block in enumerate(family.blocks(transformer)):
            self._hook_block(block, index, capture=index in capture_blocks)

    def _hook_block(self, block: nn.Module, index: int, capture: bool) -> None:
        attention = self.family.self_attention(block)
        self.handles.append(attention.register_forward_pre_hook(self._mask_padding, with_kwargs=True))
        if (cross := self.family.cross_attention(block)) is not None:
            self.handles.append(cross.register_forward_pre_hook(self._keep_video))
            self.handles.append(cross.register_forward_hook(self._pad_references))
        if capture:
            self.handles.append(block.register_forward_hook(partial(self._capture, index)))

    def remove(self) -> None:
        """Take all hooks off."""
        for handle in self.handles:
            handle.remove()
        self.handles.clear()

    def _begin(self, transformer: Any, args: tuple, kwargs: dict[str, Any]) -> tuple[tuple, dict[str, Any]]:
        current = Pass(references=self.state.pending, capture=self.state.capture)
        if current.references is not None:
            args, kwargs = self._append(transformer, current, current.references, args, kwargs)
        wrap_checkpointing(transformer, self.state, current)
        self.state.current = self.state.latest = current
        return args, kwargs

    def _append(
        self, transformer: Any, current: Pass, references: References, args: tuple, kwargs: dict[str, Any]
    ) -> tuple[tuple, dict[str, Any]]:
        bound = self.signature.bind(transformer, *args, **kwargs)
        video: Tensor = bound.arguments[self.family.video_argument]
        _check_fit(video, references.latents)
        frames, rows, columns = self.patch_size
        tokens = (video.shape[3] // rows) * (video.shape[4] // columns)
        current.tokens = references.count * tokens
        if references.mask is not None:
            shown = references.mask.repeat_interleave(tokens, 1)
            always = shown.new_ones(video.shape[0], video.shape[2] // frames * tokens)
            current.key_mask = torch.cat([always, shown], 1)[:, None, None, :]
        bound.arguments[self.family.video_argument] = torch.cat([video, references.latents.to(video)], 2)
        return bound.args[1:], bound.kwargs

    def _end(self, transformer: Any, args: tuple, kwargs: dict[str, Any], output: Any) -> Any:
        current, self.state.current = self.state.current, None
        unwrap_checkpointing(transformer)
        if output is None or current is None or current.references is None:  # None: the forward raised
            return output
        count = current.references.count
        if isinstance(output, tuple):
            return (output[0][:, :, :-count], *output[1:])
        output.sample = output.sample[:, :, :-count]
        return output

    def _mask_padding(self, attention: nn.Module, args: tuple, kwargs: dict[str, Any]) -> Any:
        current = self.state.current
        if current is None or current.key_mask is None:
            return None
        given = dict(zip(self.attention_arguments, args, strict=False))
        return (), {**given, **kwargs, "attention_mask": current.key_mask}

    def _keep_video(self, attention: nn.Module, args: tuple) -> Any:
        current = self.state.current
        if current is None or current.tokens == 0:
            return None
        return args[0][:, : -current.tokens], *args[1:]

    def _pad_references(self, attention: nn.Module, args: tuple, output: Tensor) -> Tensor | None:
        current = self.state.current
        if current is None or current.tokens == 0:
            return None
        return F.pad(output, (0, 0, 0, current.tokens))

    def _capture(self, index: int, block: nn.Module, args: tuple, output: Any) -> None:
        current = self.state.current
        if current is None or current.references is None or not current.capture:
            return
        if (
            index not in current.features
        ):  # a checkpointed block comes by again in backward: the first visit has the graph
            current.features[index] = output[:, -current.tokens :].unflatten(1, (current.references.count, -1))


def _check_fit(video: Tensor, latents: Tensor) -> None:
    wanted = (video.shape[0], video.shape[1], *video.shape[3:])
    got = (latents.shape[0], latents.shape[1], *latents.shape[3:])
    if wanted != got:
        raise UserError(
            f"references must fit the video's batch, channels, height and width {wanted}, got {got}; "
            "joint attention needs references on the video's own canvas"
        )
