"""LTX-Video 0.9 text-to-video in diffusers: `LTXVideoTransformer3DModel`, `LTXPipeline`.

The transformer takes tokens, one for each place of the latents, and is told their grid. Positions are seconds and
pixels: a latent frame lasts 8 / 25 s at the pipeline's 25 frames a second, a row or column is 32 pixels.

Shape letters: B batch, C latent channels, F latent frames, H and W latent height and width, M references, R one-frame
clips of references, N tokens of a clip.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from ..batch import EMBEDDING
from ..errors import UserError
from ..flow import TIMESTEPS
from .base import Family, Text, check_fit, loading_options

EXAMPLE = "Lightricks/LTX-Video"
MASK = "encoder_attention_mask"
FRAME_RATE = 25.0
"""`LTXPipeline`'s default; its positions are made of it."""
COMPRESSION = (8, 32, 32)
"""Frames, rows and columns of pixels that make one of latents: every VAE's of LTX-Video."""
SCALE = (COMPRESSION[0] / FRAME_RATE, *COMPRESSION[1:])
"""Seconds and pixels of one latent frame, row and column."""


class LTXFamily(Family):
    """LTX-Video 0.9 and 0.9.1, and any configuration of the same class that `LTXPipeline` runs."""

    key = "ltx"
    transformer_classes = ("LTXVideoTransformer3DModel",)
    pipeline_class = "LTXPipeline"
    max_text_tokens = 128
    text_arguments = (EMBEDDING, MASK)
    prompt_arguments = (
        "prompt_embeds",
        "negative_prompt_embeds",
        "prompt_attention_mask",
        "negative_prompt_attention_mask",
    )
    batched_guidance = True
    timestep_per_token = True
    frame_rate = FRAME_RATE

    def transformer_problem(self, transformer: Any) -> str | None:
        config = transformer.config
        if (config.patch_size, config.patch_size_t) != (1, 1) or config.in_channels != config.out_channels:
            return (
                "base: this LTX-Video's tokens are not one place of the latents each; references need a text-to-video "
                f"one, such as {EXAMPLE}"
            )
        return None

    def pipeline_problem(self, pipe: Any) -> str | None:
        if pipe.config.get("_class_name") == "LTXConditionPipeline":
            return (
                "base: this LTX-Video is for LTXConditionPipeline, which counts frames in another way; use one for "
                f"LTXPipeline, such as {EXAMPLE}"
            )
        return None

    def describe(self, transformer: Any) -> dict[str, Any]:
        names = (
            "num_layers",
            "num_attention_heads",
            "attention_head_dim",
            "cross_attention_dim",
            "caption_channels",
            "in_channels",
        )
        return {"family": self.key, **{name: transformer.config[name] for name in names}}

    def blocks(self, transformer: Any) -> list[nn.Module]:
        return list(transformer.transformer_blocks)

    def text_width(self, transformer: Any) -> int:
        return transformer.config.caption_channels

    def patch_size(self, transformer: Any) -> tuple[int, int, int]:
        return 1, 1, 1

    def target_modules(self, transformer: Any) -> list[str]:
        attention = [
            f"{name}.{layer}" for name in ("attn1", "attn2") for layer in ("to_q", "to_k", "to_v", "to_out.0")
        ]
        return [*attention, "ff.net.0.proj", "ff.net.2"]

    def no_text(self, transformer: Any, like: Tensor, tokens: int = 1) -> Text:
        mask = torch.zeros(len(like), tokens, dtype=torch.bool, device=like.device)
        return {**super().no_text(transformer, like, tokens), MASK: mask}

    def forward_arguments(self, transformer: Any, latents: Tensor, sigmas: Tensor, text: Text) -> dict[str, Any]:
        return {
            "hidden_states": _packed(latents),
            "timestep": sigmas * TIMESTEPS,
            **text,
            **dict(zip(_GRID, latents.shape[2:], strict=True)),
            "rope_interpolation_scale": SCALE,
            "return_dict": False,
        }

    def prediction(self, transformer: Any, arguments: Mapping[str, Any], output: Any) -> Tensor:
        return _unpacked(super().prediction(transformer, arguments, output), _grid(arguments))

    def call_shape(self, transformer: Any, arguments: Mapping[str, Any]) -> tuple[int, int, int, int]:
        return len(arguments["hidden_states"]), *_grid(arguments)

    def reference_arguments(
        self, transformer: Any, clips: Tensor, frames: Tensor, corner: tuple[int, int] = (0, 0)
    ) -> dict[str, Any]:
        arguments = super().reference_arguments(transformer, clips, frames, corner)
        return arguments | {"video_coords": _places(frames, (clips.shape[3], clips.shape[4]), corner)}

    def append_references(
        self, transformer: Any, arguments: dict[str, Any], references: Tensor, *, clean: bool
    ) -> tuple[int, int]:
        if arguments.get("video_coords") is not None:
            raise UserError(
                "video_coords: joint attention makes positions of num_frames, height and width; leave it out"
            )
        batch, frames, rows, columns = self.call_shape(transformer, arguments)
        video = arguments["hidden_states"]
        check_fit(_unpacked(video, (frames, rows, columns)), references)
        of_video, of_one = frames * rows * columns, rows * columns
        self.append_timesteps(arguments, batch, of_video, references.shape[2] * of_one, clean=clean)
        arguments["hidden_states"] = torch.cat([video, _packed(references).to(video)], 1)
        arguments["num_frames"] = frames + references.shape[2]
        return of_video, of_one

    def cut_references(self, output: Any, count: int, tokens: int) -> Any:
        if isinstance(output, tuple):
            return (output[0][:, :-tokens], *output[1:])
        output.sample = output.sample[:, :-tokens]
        return output

    def load_transformer(self, name: str, **options: Any) -> nn.Module:
        from diffusers import LTXVideoTransformer3DModel

        options = loading_options(options)
        return LTXVideoTransformer3DModel.from_pretrained(
            name, subfolder="transformer", use_safetensors=True, **options
        )

    def load_pipeline(self, name: str, **options: Any) -> Any:
        from diffusers import LTXPipeline

        return LTXPipeline.from_pretrained(name, use_safetensors=True, **loading_options(options))

    def size_multiples(self, pipe: Any, patch_size: tuple[int, int, int]) -> tuple[int, int, int]:
        return COMPRESSION

    @torch.no_grad()
    def encode_video(self, pipe: Any, video: Tensor) -> Tensor:
        vae = pipe.vae
        latents = vae.encode(video.to(vae.device, vae.dtype)).latent_dist.mode().float()
        mean, std = (part.float().view(1, -1, 1, 1, 1).to(latents) for part in (vae.latents_mean, vae.latents_std))
        return (latents - mean) * vae.config.scaling_factor / std

    @torch.no_grad()
    def encode_text(self, pipe: Any, prompts: list[str], max_sequence_length: int) -> Text:
        if not prompts:
            raise UserError("prompt: expected at least one, got none")
        embeds, mask, _, _ = pipe.encode_prompt(
            prompt=list(prompts),
            do_classifier_free_guidance=False,
            max_sequence_length=max_sequence_length,
            device=pipe.text_encoder.device,  # the pipeline's other parts may be elsewhere
        )
        return {EMBEDDING: embeds * mask.unsqueeze(-1), MASK: mask}

    def pipeline_text(self, text: Text, negative: Text) -> dict[str, Tensor]:
        masks = {"prompt_attention_mask": text[MASK], "negative_prompt_attention_mask": negative[MASK]}
        return super().pipeline_text(text, negative) | masks

    def negative_arguments(self, encoded: Any) -> Text | None:
        return None if encoded[2] is None else dict(zip(self.text_arguments, encoded[2:], strict=True))

    def latents_shape(self, pipe: Any, transformer: Any, videos: int, size: tuple[int, int, int]) -> tuple[int, ...]:
        batch, channels, *grid = super().latents_shape(pipe, transformer, videos, size)
        return batch, math.prod(grid), channels

    def flow_shift(self, scheduler: Any, tokens: int) -> float:
        """exp(mu), mu being linear in the tokens, as `LTXPipeline` tells its scheduler.

        What that does besides, to stretch its sigmas so that the last is `shift_terminal`, leaves noise between 0 and
        that one untouched by sampling; training draws it too.
        """
        config = scheduler.config
        if not config.use_dynamic_shifting:
            return float(config.shift)
        rise = (config.max_shift - config.base_shift) / (config.max_image_seq_len - config.base_image_seq_len)
        return math.exp(config.base_shift + rise * (tokens - config.base_image_seq_len))


_GRID = ("num_frames", "height", "width")
"""The transformer's arguments for its tokens' grid."""


def _grid(arguments: Mapping[str, Any]) -> tuple[int, int, int]:
    """Frames, rows and columns of a call.

    Raises:
        UserError: it does not tell them.
    """
    frames, rows, columns = (arguments.get(name) for name in _GRID)
    if frames is None or rows is None or columns is None:
        raise UserError("references: the transformer's call needs num_frames, height and width, of latents")
    return frames, rows, columns


def _packed(latents: Tensor) -> Tensor:
    """(B, C, F, H, W) to (B, F · H · W, C)."""
    return latents.flatten(2).transpose(1, 2)


def _unpacked(tokens: Tensor, grid: tuple[int, int, int]) -> Tensor:
    """(B, F · H · W, C) to (B, C, F, H, W)."""
    return tokens.transpose(1, 2).unflatten(2, grid)


def _places(frames: Tensor, size: tuple[int, int], corner: tuple[int, int]) -> Tensor:
    """(R, 3, N) seconds and pixels of one-frame clips' tokens: frames (R,), rows and columns from a corner on."""
    rows, columns = (
        torch.arange(count, device=frames.device) + start for count, start in zip(size, corner, strict=True)
    )
    axes = (frames[:, None, None], rows[None, :, None], columns[None, None])
    parts = [axis.float() * scale for axis, scale in zip(axes, SCALE, strict=True)]
    return torch.stack([part.expand(len(frames), *size) for part in parts], 1).flatten(2)


FAMILY = LTXFamily()
