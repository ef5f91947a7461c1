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
from contextlib import AbstractContextManager
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..errors import UserError
from .attention import ReferenceAttention
from .state import Pass


class JointAttention(ReferenceAttention):
    """References in the video's own sequence.

    Args:
        clean: whether their tokens are at timestep 0.
    """

    def __init__(self, *args: Any, clean: bool = False):
        super().__init__(*args)
        self.clean = clean
        attention = self.family.self_attention(self.family.blocks(self.transformer)[0])
        self.attention_arguments = list(inspect.signature(type(attention).forward).parameters)[1:]
        for block in self.family.blocks(self.transformer):
            self._hook_block(block)

    def _hook_block(self, block: nn.Module) -> None:
        attention = self.family.self_attention(block)
        self.handles.append(attention.register_forward_pre_hook(self._mask_padding, with_kwargs=True))
        if (cross := self.family.cross_attention(block)) is not None:
            self.handles.append(cross.register_forward_pre_hook(self._keep_video))
            self.handles.append(cross.register_forward_hook(self._pad_references))

    def prepare(self, current: Pass, arguments: inspect.BoundArguments) -> None:
        references = current.references
        if references is None:
            return
        video: Tensor = arguments.arguments[self.family.video_argument]
        _check_fit(video, references.latents)
        if references.tokens is not None:
            raise UserError("tokens: joint attention takes whole references; isolated attention can leave some out")
        frames, rows, columns = self.patch_size
        tokens = (video.shape[3] // rows) * (video.shape[4] // columns)
        current.tokens = references.count * tokens
        of_video = video.shape[2] // frames * tokens
        if references.mask is not None:
            shown = references.mask.repeat_interleave(tokens, 1)
            always = shown.new_ones(video.shape[0], of_video)
            current.key_mask = torch.cat([always, shown], 1)[:, None, None, :]
        if self.clean:
            name = self.family.timestep_argument
            timestep = self.family.clean_references(
                arguments.arguments[name], video.shape[0], of_video, current.tokens
            )
            arguments.arguments[name] = timestep
        arguments.arguments[self.family.video_argument] = torch.cat([video, references.latents.to(video)], 2)

    def finish(self, current: Pass, output: Any) -> Any:
        if current.references is None:
            return output
        count = current.references.count
        if isinstance(output, tuple):
            return (output[0][:, :, :-count], *output[1:])
        output.sample = output.sample[:, :, :-count]
        return output

    def run_block(self, current: Pass, block: nn.Module) -> AbstractContextManager[None]:
        return self.state.running(current)

    def captured(self, current: Pass, output: Any) -> Any:
        if current.references is None:
            return None
        tokens = output[:, -current.tokens :].clone()  # a view would keep the video's tokens, offloaded or not
        return tokens.unflatten(1, (current.references.count, -1))

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


def _check_fit(video: Tensor, latents: Tensor) -> None:
    wanted = (video.shape[0], video.shape[1], *video.shape[3:])
    got = (latents.shape[0], latents.shape[1], *latents.shape[3:])
    if wanted != got:
        raise UserError(
            f"references must fit the video's batch, channels, height and width {wanted}, got {got}; "
            "joint attention needs references on the video's own canvas"
        )
