"""Videos of drawn scenes, generated with their references and read by the judge.

Shape letters: V videos, M subjects of each, F frames, H and W height and width, L looks, P values of all looks.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from ..analysis.motion import path_of
from .paths import in_caption_order
from .prepared import prepared_references
from .reading import Judge, Reading
from .sampling import Sampling, sample_videos
from .scenes import Clip, draw_clip
from .subjects import LOOKS

SPREAD = 1_000_003
"""Seeds of one video are so far apart that no other's is met."""


@dataclass(frozen=True)
class Watched:
    """Generated videos and what the judge reads in them.

    Attributes:
        clips: V drawn clips of M subjects each, whose captions and references were taken; one for several seeds comes
            several times.
        numbers: (V,) of the clips, what is independent of each other.
        videos: uint8 (V, F, H, W, 3).
        masks: bool (V, M, F, H, W).
        read: int64 (V, M, F, L), -1 where a subject was not found.
        probabilities: (V, M, P) over all frames.
    """

    clips: list[Clip]
    numbers: np.ndarray
    videos: np.ndarray
    masks: np.ndarray
    read: np.ndarray
    probabilities: np.ndarray

    @property
    def truth(self) -> np.ndarray:
        """int64 (V, M, L), the looks of the subjects in the references."""
        return np.array([[looks_of(subject.looks) for subject in clip.subjects] for clip in self.clips])

    @property
    def paths(self) -> np.ndarray:
        """(V, M, F, 3), see `path_of`."""
        return np.array([[path_of(mask) for mask in masks] for masks in self.masks])


def held_out_clips(count: int, subjects: int, *, seed: int, same_kind: bool = False, **size: Any) -> list[Clip]:
    """Clips of held-out subjects; size is height, width and num_frames."""
    return [
        draw_clip(seed, number, split="eval", subjects=subjects, same_kind=same_kind, **size)
        for number in range(count)
    ]


def watch(
    pipe: Any, judge: Judge, clips: Sequence[Clip], sampling: Sampling, *, seeds: Sequence[int], batch_size: int = 8
) -> Watched:
    """Generate a video of every clip with every seed, and read it.

    Args:
        pipe: a reference pipeline of the world's base.
        judge: reads them.
        clips: of equally many subjects and of one size.
        sampling: how.
        seeds: of the noise, which depends on seed and clip alone.
        batch_size: videos at a time.
    """
    jobs = [(seed, number) for seed in seeds for number in range(len(clips))]
    videos = [
        video
        for start in range(0, len(jobs), batch_size)
        for video in _generate(pipe, clips, sampling, jobs[start : start + batch_size])
    ]
    watched = [clips[number] for _, number in jobs]
    return read_videos(judge, watched, np.array([number for _, number in jobs]), videos)


def read_videos(judge: Judge, clips: Sequence[Clip], numbers: np.ndarray, videos: Sequence[np.ndarray]) -> Watched:
    """Read videos uint8 (F, H, W, 3) of clips; subjects of one kind are named by what they do."""
    readings, orders = [], []
    for clip, video in zip(clips, videos, strict=True):
        reading = judge.read(video, [subject.kind for subject in clip.subjects])
        readings.append(reading)
        orders.append(in_caption_order(np.array([path_of(mask) for mask in reading.masks]), clip))
    return Watched(
        list(clips),
        numbers,
        np.stack(videos),
        *(np.stack(values) for values in zip(*map(_ordered, readings, orders), strict=True)),
    )


def looks_of(looks: Sequence[str]) -> list[int]:
    """Places of looks among their values."""
    return [values.index(look) for values, look in zip(LOOKS, looks, strict=True)]


def _ordered(reading: Reading, order: Sequence[int]) -> tuple[np.ndarray, ...]:
    places = list(order)
    return reading.masks[places], reading.looks[places], reading.over_frames()[places]


def _generate(
    pipe: Any, clips: Sequence[Clip], sampling: Sampling, jobs: Sequence[tuple[int, int]]
) -> Iterator[np.ndarray]:
    some = [clips[number] for _, number in jobs]
    frames, height, width, _ = some[0].frames.shape
    videos = sample_videos(
        pipe,
        [clip.caption for clip in some],
        [prepared_references(clip) for clip in some],
        sampling,
        seeds=[seed * SPREAD + number for seed, number in jobs],
        size={"num_frames": frames, "height": height, "width": width},
    )
    yield from np.clip(videos * 255 + 0.5, 0, 255).astype(np.uint8)
