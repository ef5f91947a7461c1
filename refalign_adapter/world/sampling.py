"""How videos of the world are sampled, and a batch of them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from PIL import Image


@dataclass(frozen=True)
class Sampling:
    """How videos are sampled.

    Attributes:
        num_inference_steps, guidance_scale, image_guidance_scale: of the reference pipeline's call.
        arguments: more of its arguments, such as guidance_refresh.
        references: whether the scenes' references are given; without them videos are the base's own.
    """

    num_inference_steps: int = 25
    guidance_scale: float = 2.0
    image_guidance_scale: float = 3.0
    arguments: Mapping[str, Any] = field(default_factory=dict)
    references: bool = True


def sample_videos(
    pipe: Any,
    prompts: Sequence[str],
    references: Sequence[Sequence[Image.Image]],
    sampling: Sampling,
    *,
    seeds: Sequence[int],
    size: Mapping[str, int],
) -> np.ndarray:
    """A batch of videos, float (B, F, H, W, 3) in [0, 1].

    Args:
        pipe: a reference pipeline of the world's base.
        prompts: B texts.
        references: of each.
        sampling: how.
        seeds: of each video's noise.
        size: height, width and num_frames.
    """
    pipe.set_progress_bar_config(disable=True)
    return np.asarray(
        pipe(
            list(prompts),
            reference_images=[list(images) for images in references] if sampling.references else None,
            height=size["height"],
            width=size["width"],
            num_frames=size["num_frames"],
            num_inference_steps=sampling.num_inference_steps,
            guidance_scale=sampling.guidance_scale,
            image_guidance_scale=sampling.image_guidance_scale,
            generator=[torch.Generator().manual_seed(seed) for seed in seeds],
            output_type="np",
            **sampling.arguments,
        ).frames
    )
