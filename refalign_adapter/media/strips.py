"""Pictures in a row: frames of a video, references beside each other."""

from __future__ import annotations

from collections.abc import Sequence

from PIL import Image

PAPER = (255, 255, 255)


def frame_strip(frames: Sequence[Image.Image], count: int) -> Image.Image:
    """At most `count` frames, evenly spaced from the first to the last, side by side."""
    count = min(count, len(frames))
    places = [round(index * (len(frames) - 1) / max(count - 1, 1)) for index in range(count)]
    return row([frames[place] for place in places], gap=2)


def row(images: Sequence[Image.Image], gap: int) -> Image.Image:
    """Images side by side on white, `gap` pixels apart."""
    width = sum(image.width for image in images) + gap * (len(images) - 1)
    joined = Image.new("RGB", (width, max(image.height for image in images)), PAPER)
    left = 0
    for image in images:
        joined.paste(image, (left, 0))
        left += image.width + gap
    return joined
