"""Wan 2.1 and Wan 2.2 5B text-to-video in diffusers: `WanTransformer3DModel`, `WanPipeline`.

Wan 2.2 TI2V-5B's pipeline gives every token a timestep of its own. In text-to-video they are all the same; training
gives one for each sample, of which the transformer makes the same.

Shape letters: B batch, C latent channels, F latent frames, H and W latent height and width.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from ..batch import EMBEDDING
from ..errors import UserError
from ..flow import TIMESTEPS
from .base import Family, Text, loading_options

EXAMPLE = "Wan-AI/Wan2.1-T2V-1.3B-Diffusers"
THETA = 10_000.0
"""Base of the rotary angles; no configuration of the model changes it."""


class WanFamily(Family):
    """Wan 2.1 T2V, 1.3B and 14B, Wan 2.2 TI2V-5B, and any configuration of the same class for text-to-video."""

    key = "wan"
    transformer_classes = ("WanTransformer3DModel",)
    pipeline_class = "WanPipeline"
    timestep_per_token = True

    def transformer_problem(self, transformer: Any) -> str | None:
        config = transformer.config
        if config.image_dim is not None or config.added_kv_proj_dim is not None:
            return f"base: this is an image-to-video Wan; references need a text-to-video one, such as {EXAMPLE}"
        if config.in_channels != config.out_channels:
            return (
                f"base: this Wan takes {config.in_channels} channels and predicts {config.out_channels} (an editing "
                f"or control model); references need a text-to-video one, such as {EXAMPLE}"
            )
        return None

    def pipeline_problem(self, pipe: Any) -> str | None:
        if pipe.config.get("boundary_ratio") is not None or getattr(pipe, "transformer_2", None) is not None:
            return (
                "base: Wan 2.2 A14B has two transformers, which adapters do not cover yet; use Wan 2.1 T2V or "
                "Wan 2.2 TI2V-5B"
            )
        return None

    def describe(self, transformer: Any) -> dict[str, Any]:
        config = transformer.config
        names = ("num_layers", "num_attention_heads", "attention_head_dim", "ffn_dim", "in_channels", "text_dim")
        return {
            "family": self.key,
            "patch_size": list(config.patch_size),
            **{name: getattr(config, name) for name in names},
        }

    def blocks(self, transformer: Any) -> list[nn.Module]:
        return list(transformer.blocks)

    def rotary_embedding(self, transformer: Any) -> nn.Module:
        return transformer.rope

    def rotary_at(
        self, transformer: Any, latents: Tensor, frames: Tensor, corner: tuple[int, int] = (0, 0)
    ) -> tuple[Tensor, Tensor]:
        rope, (_, patch_rows, patch_columns) = transformer.rope, transformer.config.patch_size
        rows = torch.arange(latents.shape[3] // patch_rows, device=frames.device) + corner[0]
        columns = torch.arange(latents.shape[4] // patch_columns, device=frames.device) + corner[1]
        of_rows = 2 * (transformer.config.attention_head_dim // 6)  # as many channels as columns have; frames the rest
        angles = (
            _angles(frames, transformer.config.attention_head_dim - 2 * of_rows)[:, None, None],
            _angles(rows, of_rows)[None, :, None],
            _angles(columns, of_rows)[None, None],
        )

        def table(function: Callable[[Tensor], Tensor]) -> Tensor:
            # float32 in between, as in the model's own table, whatever type that was cast to since
            parts = [function(part).repeat_interleave(2, -1).float().to(rope.freqs_cos.dtype) for part in angles]
            parts = [part.expand(len(frames), len(rows), len(columns), -1) for part in parts]
            return torch.cat(parts, -1).flatten(1, 2).unsqueeze(2)

        return table(torch.cos), table(torch.sin)

    def text_width(self, transformer: Any) -> int:
        return transformer.config.text_dim

    def patch_size(self, transformer: Any) -> tuple[int, int, int]:
        return tuple(transformer.config.patch_size)

    def target_modules(self, transformer: Any) -> list[str]:
        attention = [
            f"{name}.{layer}" for name in ("attn1", "attn2") for layer in ("to_q", "to_k", "to_v", "to_out.0")
        ]
        return [*attention, "ffn.net.0.proj", "ffn.net.2"]

    def forward_arguments(self, transformer: Any, latents: Tensor, sigmas: Tensor, text: Text) -> dict[str, Any]:
        return {"hidden_states": latents, "timestep": sigmas * TIMESTEPS, **text, "return_dict": False}

    def load_transformer(self, name: str, **options: Any) -> nn.Module:
        from diffusers import WanTransformer3DModel

        options = loading_options(options)
        return WanTransformer3DModel.from_pretrained(name, subfolder="transformer", use_safetensors=True, **options)

    def load_pipeline(self, name: str, **options: Any) -> Any:
        from diffusers import WanPipeline

        return WanPipeline.from_pretrained(name, use_safetensors=True, **loading_options(options))

    def size_multiples(self, pipe: Any, patch_size: tuple[int, int, int]) -> tuple[int, int, int]:
        space = pipe.vae.config.scale_factor_spatial
        return pipe.vae.config.scale_factor_temporal, space * patch_size[1], space * patch_size[2]

    @torch.no_grad()
    def encode_video(self, pipe: Any, video: Tensor) -> Tensor:
        vae = pipe.vae
        latents = vae.encode(video.to(vae.device, vae.dtype)).latent_dist.mode().float()
        mean, std = (
            torch.tensor(values, device=latents.device).view(1, -1, 1, 1, 1)
            for values in (vae.config.latents_mean, vae.config.latents_std)
        )
        return (latents - mean) / std

    @torch.no_grad()
    def encode_text(self, pipe: Any, prompts: list[str], max_sequence_length: int) -> Text:
        if not prompts:
            raise UserError("prompt: expected at least one, got none")
        embeds, _ = pipe.encode_prompt(
            prompt=list(prompts),
            do_classifier_free_guidance=False,
            max_sequence_length=max_sequence_length,
            device=pipe.text_encoder.device,  # the pipeline's other parts may be elsewhere
        )
        return {EMBEDDING: embeds}

    def flow_shift(self, scheduler: Any, tokens: int) -> float:
        config = scheduler.config
        return float(config.get("flow_shift") or config.get("shift") or 1.0)


def _angles(positions: Tensor, channels: int) -> Tensor:
    """(n, channels / 2) rotary angles at positions (n,): computed, as the model's table has none below 0."""
    dtype = torch.float32 if positions.device.type == "mps" else torch.float64
    turns = torch.arange(0, channels, 2, dtype=dtype, device=positions.device) / channels
    return torch.outer(positions.to(dtype), 1.0 / (THETA**turns))


FAMILY = WanFamily()
