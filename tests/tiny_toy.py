"""The toy family of `data/plugin_package` with the other tiny models around it."""

from typing import Any

import torch
from diffusers import FlowMatchEulerDiscreteScheduler
from tiny_models import tiny_text, tiny_vae
from toy_video_dit import ToyPipeline, ToyTransformer3DModel


def tiny_toy_pipeline(seed: int = 0, **overrides: Any) -> ToyPipeline:
    """A text-to-video pipeline of width 48 with 3 blocks; `overrides` are fields of the transformer's config."""
    with torch.random.fork_rng([]):
        torch.manual_seed(seed)
        transformer = ToyTransformer3DModel(**overrides)
    encoder, tokenizer = tiny_text()
    scheduler = FlowMatchEulerDiscreteScheduler(shift=3.0)
    return ToyPipeline(tokenizer, encoder, tiny_vae(), scheduler, transformer)
