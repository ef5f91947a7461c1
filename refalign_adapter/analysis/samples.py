"""Generated videos beside their references: frames on a strip, and an animated picture of several samples."""

from __future__ import annotations

import textwrap
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import av
from PIL import Image, ImageDraw, ImageFont

from ..atomic import atomic_file
from ..media.strips import PAPER, row

GAP = 6
INK, LINE = (51, 65, 92), (208, 214, 224)


@dataclass(frozen=True)
class Sample:
    """One generated video: what it was made from and where it is."""

    prompt: str
    references: tuple[Path, ...]
    video: Path


def read_frames(video: Path) -> list[Image.Image]:
    """All frames of a video as RGB images."""
    with av.open(str(video)) as container:
        return [frame.to_image() for frame in container.decode(video=0)]


def write_animation(
    path: Path, samples: Sequence[Sample], *, columns: int = 2, size: int = 128, fps: float = 6
) -> None:
    """Write a GIF of samples in a grid: references on the left, the video on the right, the prompt below.

    Args:
        path: the file; replaced as a whole.
        samples: their videos have equally many frames, or stop at the shortest one's.
        columns: samples side by side.
        size: height of references and videos, in pixels.
        fps: frames a second; the last frame is held for a second.
    """
    videos = [read_frames(sample.video) for sample in samples]
    references = max(len(sample.references) for sample in samples)
    pages = [
        _grid(
            [_cell(sample, video[index], references, size) for sample, video in zip(samples, videos, strict=True)],
            columns,
        )
        for index in range(min(len(video) for video in videos))
    ]
    palette = _column(pages).quantize(256)
    images = [page.quantize(palette=palette, dither=Image.Dither.NONE) for page in pages]
    durations = [*[round(1000 / fps)] * (len(images) - 1), 1000]
    with atomic_file(path) as temporary:
        images[0].save(temporary, save_all=True, append_images=images[1:], duration=durations, loop=0)


def _cell(sample: Sample, frame: Image.Image, slots: int, size: int) -> Image.Image:
    """One sample at one frame; `slots` places for references, so that all cells are equally large."""
    pictures = []
    for path in sample.references:
        with Image.open(path) as image:
            pictures.append(_framed(_scaled(image.convert("RGB"), size)))
    video = _scaled(frame, size)
    empty = [Image.new("RGB", (size, size), PAPER)] * (slots - len(pictures))
    pictured = row([*empty, *pictures, video], GAP)
    font = ImageFont.load_default(12)
    lines = textwrap.wrap(sample.prompt, max(20, pictured.width // 7))[:2]
    cell = Image.new("RGB", (pictured.width, pictured.height + 36), PAPER)
    cell.paste(pictured, (0, 0))
    ImageDraw.Draw(cell).multiline_text((0, pictured.height + 3), "\n".join(lines), fill=INK, font=font)
    return cell


def _scaled(image: Image.Image, height: int) -> Image.Image:
    return image.resize((round(image.width * height / image.height), height), Image.Resampling.LANCZOS)


def _framed(image: Image.Image) -> Image.Image:
    """A thin line around a reference: its white ground would run into the page's."""
    image = image.copy()
    ImageDraw.Draw(image).rectangle((0, 0, image.width - 1, image.height - 1), outline=LINE)
    return image


def _column(images: Sequence[Image.Image]) -> Image.Image:
    """Images of one size below each other."""
    column = Image.new("RGB", (images[0].width, images[0].height * len(images)))
    for index, image in enumerate(images):
        column.paste(image, (0, index * image.height))
    return column


def _grid(cells: Sequence[Image.Image], columns: int) -> Image.Image:
    columns = min(columns, len(cells))
    width, height = (max(getattr(cell, side) for cell in cells) + 3 * GAP for side in ("width", "height"))
    page = Image.new("RGB", (columns * width, -(-len(cells) // columns) * height), PAPER)
    for index, cell in enumerate(cells):
        page.paste(cell, (index % columns * width + GAP, index // columns * height + GAP))
    return page
