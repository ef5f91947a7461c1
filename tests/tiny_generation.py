"""Small videos from fixed noise, and what the transformer was called with meanwhile."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from tiny_adapter import SIZE, picture

LATENTS = (1, 16, 2, 4, 6)
"""Of a video of `SIZE`."""

IMAGES = [picture(0), picture(1, (10, 60))]


def noise(seed: int = 0, batch: int = 1) -> torch.Tensor:
    return torch.randn(batch, *LATENTS[1:], generator=torch.Generator().manual_seed(seed))


def generate(pipe: Any, *arguments: Any, **changes: Any) -> torch.Tensor:
    """Latents of a small video from fixed noise, after 2 steps."""
    given = {"latents": noise(), "output_type": "latent", "num_inference_steps": 2} | SIZE | changes
    return pipe(*arguments, **given).frames


@contextmanager
def calls_of(transformer: Any) -> Iterator[list[tuple[int, ...]]]:
    """Shapes of the latents that each call inside the context embeds, (B, C, F, H, W), reference frames included."""
    seen: list[tuple[int, ...]] = []
    handle = transformer.patch_embedding.register_forward_hook(lambda _, args, __: seen.append(tuple(args[0].shape)))
    try:
        yield seen
    finally:
        handle.remove()
