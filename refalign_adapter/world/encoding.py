"""Drawn clips as a cache would hold them, made at once: for measures that run the model on held-out scenes.

Shape letters: M references, C latent channels, h and w latent height and width.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from ..analysis.latent_masks import latent_masks
from ..batch import CachedSample
from ..families.wan import FAMILY
from .portraits import draw_reference
from .prepared import prepared, prepared_references
from .scenes import Clip
from .subjects import KINDS, random_subject

BATCH = 16


@dataclass(frozen=True)
class Encoded:
    """A clip for the measures.

    Attributes:
        sample: the clip with its own references.
        masks: bool (M, F, h, w), where each subject is in the latents.
        replacements: (M, C, h, w), references of the same kinds with other looks.
    """

    sample: CachedSample
    masks: np.ndarray
    replacements: Tensor


@torch.no_grad()
def encode_clips(pipe: Any, clips: Sequence[Clip], *, text_tokens: int, seed: int = 0) -> list[Encoded]:
    """Encode clips, their captions and references, and draw and encode others to replace those.

    Args:
        pipe: of the world's base.
        clips: of one size.
        text_tokens: the adapter's `max_sequence_length`.
        seed: of the other references.
    """
    videos = torch.cat([FAMILY.encode_video(pipe, _signal(part)) for part in _parts([clip.frames for clip in clips])])
    own = [reference for clip in clips for reference in prepared_references(clip)]
    others = [_other_look(clip, place, seed) for clip in clips for place in range(len(clip.subjects))]
    encoded = torch.cat([FAMILY.encode_images(pipe, _signal(part)) for part in _parts([*own, *others])])
    text = FAMILY.encode_text(pipe, [clip.caption for clip in clips], text_tokens)
    _, _, frames, rows, columns = videos.shape
    counts = [len(clip.subjects) for clip in clips]
    references, replacements = (half.split(counts) for half in encoded.split(len(own)))
    return [
        Encoded(
            CachedSample(
                str(row),
                videos[row],
                {name: value[row] for name, value in text.items()},
                references[row][None],
                {},
                torch.arange(counts[row]),
            ),
            latent_masks(clip.frame_masks, (frames, rows, columns)),
            replacements[row],
        )
        for row, clip in enumerate(clips)
    ]


def _other_look(clip: Clip, place: int, seed: int) -> Image.Image:
    subject = clip.subjects[place]
    generator = np.random.default_rng([seed, 31, list(KINDS).index(subject.kind), subject.number])
    other = subject
    while other == subject:
        other = random_subject(generator, subject.split, subject.kind)
    height, width = clip.frames.shape[1:3]
    return prepared(draw_reference(other, generator, height, width))


def _parts(pictures: Sequence[Any]) -> list[np.ndarray]:
    """Pictures or videos in stacks."""
    return [np.stack(pictures[start : start + BATCH]) for start in range(0, len(pictures), BATCH)]


def _signal(pixels: np.ndarray) -> Tensor:
    """uint8 (B, …, H, W, 3) to float32 (B, 3, …, H, W) in [-1, 1]."""
    return torch.from_numpy(pixels).movedim(-1, 1).float() / 127.5 - 1
