"""The sizes that clips are brought to, frames × height × width, and which of them a clip goes to."""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from ..errors import shorten

EXAMPLE = "81x480x832"
CLOCK_TOLERANCE = 1e-3
"""Seconds by which a container's rounded time stamps may be late."""
SAME_SHAPE = 0.1
"""Difference of two aspect ratios' logarithms, about their relative difference, up to which they count as one shape:
480x832 and 720x1280 differ by 0.026, 480x832 and 480x480 by 0.55."""


@dataclass(frozen=True, order=True)
class Size:
    """What a clip is sampled and scaled to; written 81x480x832.

    Attributes:
        num_frames: frames.
        height, width: in pixels.
    """

    num_frames: int
    height: int
    width: int

    def __str__(self) -> str:
        return f"{self.num_frames}x{self.height}x{self.width}"


@dataclass(frozen=True)
class VideoFacts:
    """What a clip's file says of it.

    Attributes:
        height, width: of the frames as they are shown, in square pixels, after the row's crop.
        num_frames: frames of the file, or of the row's segment of it.
        fps: frames a second.
    """

    height: int
    width: int
    num_frames: int
    fps: float

    def frames_at(self, fps: float | None) -> int:
        """Frames that sampling it at `fps` gives, as `video.read_video` samples; None: all as they are."""
        if fps is None or not self.fps:
            return self.num_frames
        return max(0, math.ceil((self.num_frames / self.fps - CLOCK_TOLERANCE) * fps))


def size_problems(values: Any, field: str) -> Iterator[str]:
    """What is wrong with sizes as a recipe gives them, a line each."""
    if not values:
        yield f"{field} must name at least one size such as {EXAMPLE}, got {shorten(values)}; null = one size"
    for index, value in enumerate(values):
        if _numbers(value) is None:
            yield f"{field}.{index} must be frames x height x width such as {EXAMPLE}, got {shorten(value)}"


def parse_sizes(values: Iterable[str]) -> tuple[Size, ...]:
    """The sizes, in order, those given twice once; of valid texts only, see `size_problems`."""
    found = [_numbers(value) for value in values]
    return tuple(dict.fromkeys(Size(*numbers) for numbers in found if numbers))


def _numbers(value: Any) -> tuple[int, int, int] | None:
    found = re.fullmatch(r"([1-9]\d{0,5})x([1-9]\d{0,4})x([1-9]\d{0,4})", value) if isinstance(value, str) else None
    return (int(found[1]), int(found[2]), int(found[3])) if found else None


def choose_size(sizes: Sequence[Size], clip: VideoFacts, fps: float | None) -> Size:
    """The size that suits a clip best.

    Of the sizes that it is long enough for, those nearest to its shape, so that least is cut off; of these the
    longest; of these the largest that it need not be enlarged for, or else the smallest.

    Args:
        sizes: at least one.
        clip: what is known of it.
        fps: frames a second that it is sampled at; None: as it is.

    Returns:
        One of them; the shortest when it is too short for all.
    """
    frames = clip.frames_at(fps)
    fitting = [size for size in sizes if size.num_frames <= frames]
    fitting = fitting or [size for size in sizes if size.num_frames == min(size.num_frames for size in sizes)]
    nearest = min(_bend(size, clip) for size in fitting)

    def unsuited(size: Size) -> tuple[float, ...]:
        area, enlarged = size.height * size.width, enlargement(size, clip) > 1
        return (-size.num_frames, enlarged, area if enlarged else -area, _bend(size, clip))

    return min((size for size in fitting if _bend(size, clip) <= nearest + SAME_SHAPE), key=unsuited)


def _bend(size: Size, clip: VideoFacts) -> float:
    """How far the shapes are apart: the logarithm of what is cut off, 0 for equal shapes."""
    return abs(math.log(size.width * clip.height / (size.height * clip.width)))


def enlargement(size: Size, clip: VideoFacts) -> float:
    """The factor by which a clip is scaled to cover the size; below 1 it is made smaller."""
    return max(size.height / clip.height, size.width / clip.width)


def kept_share(size: Size, clip: VideoFacts) -> float:
    """Share of a clip's picture in (0, 1] that is left when it is scaled to cover the size and cropped."""
    return math.exp(-_bend(size, clip))


def size_misfits(size: Size, multiples: tuple[int, int, int]) -> Iterator[str]:
    """What of a size a base cannot cut into tokens, one line each; `multiples` as of `Family.size_multiples`."""
    time, rows, columns = multiples
    if size.num_frames < 1 or (size.num_frames - 1) % time:
        near = max(0, round((size.num_frames - 1) / time)) * time + 1
        yield f"num_frames must be a multiple of {time} plus 1, got {size.num_frames}; try {near}"
    for name, multiple in (("height", rows), ("width", columns)):
        value = getattr(size, name)
        if value < 1 or value % multiple:
            near = max(1, round(value / multiple)) * multiple
            yield f"{name} must be a multiple of {multiple}, got {value}; try {near}"
