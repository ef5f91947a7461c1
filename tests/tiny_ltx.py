"""LTX-Video 0.9 in small: the real classes, random weights, the scheduler that is released with it."""

import copy
import math
from functools import cache
from typing import Any

import torch
from diffusers import AutoencoderKLLTXVideo, FlowMatchEulerDiscreteScheduler, LTXPipeline, LTXVideoTransformer3DModel
from tiny_models import tiny_text
from transformers import T5Config, T5EncoderModel

TRANSFORMER = {
    "num_attention_heads": 2,
    "attention_head_dim": 28,
    "in_channels": 16,
    "out_channels": 16,
    "cross_attention_dim": 56,
    "caption_channels": 32,
    "num_layers": 3,
}
SCHEDULER = {
    "use_dynamic_shifting": True,
    "base_shift": 0.95,
    "max_shift": 2.05,
    "base_image_seq_len": 1024,
    "max_image_seq_len": 4096,
    "shift_terminal": 0.1,
}
LTX_SHIFTS = {1024: math.exp(0.95), 2560: math.exp(1.5), 4096: math.exp(2.05), 5632: math.exp(2.6)}
"""Tokens -> the shift of that scheduler: of 2048 tokens more or less, the exponent is 1.1 / 1.5 more or less."""


@cache
def _vae(timestep_conditioning: bool) -> AutoencoderKLLTXVideo:
    generator = torch.Generator().manual_seed(4)
    channels = (8, 8, 8, 8)
    with torch.random.fork_rng([]):
        torch.manual_seed(1)
        vae = AutoencoderKLLTXVideo(
            latent_channels=16,
            block_out_channels=channels,
            decoder_block_out_channels=channels,
            layers_per_block=(1,) * 5,
            decoder_layers_per_block=(1,) * 5,
            timestep_conditioning=timestep_conditioning,
        ).eval()
    vae.latents_mean.normal_(generator=generator)
    vae.latents_std.uniform_(0.5, 1.5, generator=generator)
    return vae


@cache
def _text_encoder() -> T5EncoderModel:
    vocabulary = len(tiny_text()[1])
    config = T5Config(
        vocab_size=vocabulary, d_model=32, d_kv=8, d_ff=64, num_layers=2, num_heads=4, feed_forward_proj="gated-gelu"
    )
    with torch.random.fork_rng([]):
        torch.manual_seed(2)
        return T5EncoderModel(config).eval()


def tiny_ltx_pipeline(seed: int = 0, timestep_conditioning: bool = False, **overrides: Any) -> LTXPipeline:
    """A text-to-video pipeline of width 56 with 3 blocks; `overrides` are fields of the transformer's config."""
    with torch.random.fork_rng([]):
        torch.manual_seed(seed)
        transformer = LTXVideoTransformer3DModel(**TRANSFORMER | overrides)
    return LTXPipeline(
        scheduler=FlowMatchEulerDiscreteScheduler(**SCHEDULER),
        vae=copy.deepcopy(_vae(timestep_conditioning)),
        text_encoder=copy.deepcopy(_text_encoder()),
        tokenizer=tiny_text()[1],
        transformer=transformer,
    )
