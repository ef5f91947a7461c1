"""One reference image to what the model sees: the subject cut out, augmented where that belongs, on a white canvas.

The paper (RefAlign, arXiv 2603.25743) pads references with white to the video's size and augments those that are cut
from the video itself (regular pairs); it names the augmentations but not their ranges, so the ranges here are ours.

Shape letters: H and W height and width in pixels.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
from PIL import Image, ImageEnhance, ImageFilter, ImageOps

from ..errors import UserError

Box = tuple[float, float, float, float]
"""(left, top, right, bottom) in pixels."""

WHITE = (255, 255, 255)
NEARLY_WHITE = 250
"""Lossy files do not keep a white margin at 255."""


def reference_size(
    height: int, width: int, scale: float, multiples: tuple[int, int], fixed: Sequence[int] | None = None
) -> tuple[int, int]:
    """Height and width in pixels of the canvas that a reference is placed on.

    Args:
        height, width: of the video in pixels.
        scale: the canvas's share of them, in (0, 1].
        multiples: pixel rows and columns that make one token, see `Family.size_multiples`.
        fixed: height and width that it has whatever the video's, see `fixed_size_problems`; None: it has that share.

    Returns:
        The nearest size that can be cut into tokens, at least one of them.
    """
    if fixed is not None:
        return fixed[0], fixed[1]

    def nearest(side: int, multiple: int) -> int:
        return max(1, round(side * scale / multiple)) * multiple

    return nearest(height, multiples[0]), nearest(width, multiples[1])


def fixed_size_problems(fixed: Sequence[int] | None, multiples: tuple[int, int]) -> Iterator[str]:
    """Why a base cannot cut a reference's own canvas into tokens, in one line; nothing when it can.

    Args:
        fixed: `RefAlignConfig.reference_size`, height and width in pixels, or None.
        multiples: as in `reference_size`.
    """
    if fixed is None or not any(side % multiple for side, multiple in zip(fixed, multiples, strict=True)):
        return
    near = [max(1, round(side / multiple)) * multiple for side, multiple in zip(fixed, multiples, strict=True)]
    yield (
        f"reference_size must be a multiple of what a token covers, {list(multiples)} pixels, got {list(fixed)}; "
        f"try {near}"
    )


def content_tokens(canvas: Image.Image | np.ndarray, rows: int, columns: int) -> np.ndarray:
    """Which tokens of a canvas show anything but white padding.

    Args:
        canvas: RGB (H, W), or uint8 (H, W, 3).
        rows, columns: tokens along H and W, which they divide.

    Returns:
        bool (rows, columns), False where every pixel is white; all True on a canvas that is white all over.

    Raises:
        UserError: a canvas that cannot be cut into so many tokens.
    """
    pixels = np.asarray(canvas)
    height, width = pixels.shape[:2]
    if height % rows or width % columns:
        raise UserError(f"references: a canvas of {width}x{height} pixels cannot be cut into {columns}x{rows} tokens")
    seen = (pixels != WHITE).any(-1).reshape(rows, height // rows, columns, width // columns).any((1, 3))
    return seen if seen.any() else np.ones_like(seen)


@dataclass(frozen=True)
class AugmentationRanges:
    """From what an augmentation is drawn, uniformly; each but the flip and the blur always applies.

    Attributes:
        rotation: largest angle in degrees, either way.
        scale: smallest and largest size, as a share of the size at which the subject fits the canvas.
        flip: probability of a horizontal mirror image.
        shear: largest shear angle in degrees, either way, along each axis.
        blur: probability of a Gaussian blur.
        blur_radius: its largest standard deviation, in percent of the canvas's shorter side.
        brightness, contrast, saturation: largest change of the factor 1, either way.
        hue: largest shift as a share of the colour circle, either way.
    """

    rotation: float = 20.0
    scale: tuple[float, float] = (0.7, 1.0)
    flip: float = 0.5
    shear: float = 8.0
    blur: float = 0.5
    blur_radius: float = 0.3
    brightness: float = 0.2
    contrast: float = 0.2
    saturation: float = 0.2
    hue: float = 0.02


AUGMENTATION = AugmentationRanges()


def prepare_reference(
    image: Image.Image,
    *,
    height: int,
    width: int,
    mask: np.ndarray | None = None,
    box: Box | None = None,
    keep_background: bool = False,
    augmentation_seed: int | None = None,
) -> Image.Image:
    """The reference as it is encoded: cropped, maybe augmented, scaled to fit, centred on white.

    Args:
        image: RGB, of any size.
        height, width: of the canvas in pixels, see `reference_size`.
        mask: bool of the image's size, True on the subject; without one, white margins are cut off, so that a cut-out
            picture of a subject fills the canvas at inference as its masked image did in training.
        box: (left, top, right, bottom) in pixels; what is outside is dropped.
        keep_background: whether pixels outside the mask, but inside its bounding box, stay; else they become white.
        augmentation_seed: None leaves the subject as it is; a number draws the augmentation of `augment_reference`.

    Returns:
        RGB (H, W).

    Raises:
        UserError: a mask of another size than the image, or a mask or box without a pixel in it.
    """
    subject = cut_out(image, mask=mask, box=box, keep_background=keep_background)
    if augmentation_seed is not None:
        subject = augment_reference(subject, augmentation_seed, height=height, width=width)
    return place_on_canvas(subject, height, width)


def cut_out(
    image: Image.Image, *, mask: np.ndarray | None, box: Box | None, keep_background: bool = False
) -> Image.Image:
    """Crop to the box, then to what the mask covers or, without one, to what is not white margin.

    RGBA, transparent where the background is dropped.

    Raises:
        UserError: see `prepare_reference`.
    """
    inside = np.ones((image.height, image.width), bool) if mask is None else mask.astype(bool)
    if inside.shape != (image.height, image.width):
        height, width = inside.shape
        raise UserError(f"mask: {width}x{height} pixels do not match the image's {image.width}x{image.height}")
    left, top, right, bottom = _pixels(box, image) if box is not None else (0, 0, image.width, image.height)
    seen = inside[top:bottom, left:right] if mask is not None else _not_white(image, (left, top, right, bottom))
    rows, columns = np.flatnonzero(seen.any(1)), np.flatnonzero(seen.any(0))
    if not len(rows):
        raise UserError("mask: marks nothing inside the image's box" if mask is not None else f"box: {box} is empty")
    crop = (left + int(columns[0]), top + int(rows[0]), left + int(columns[-1]) + 1, top + int(rows[-1]) + 1)
    subject = image.convert("RGB").crop(crop)
    alpha = np.ones_like(inside) if keep_background else inside
    subject.putalpha(Image.fromarray(alpha.astype(np.uint8) * 255).crop(crop))
    return subject


def _not_white(image: Image.Image, box: tuple[int, int, int, int]) -> np.ndarray:
    """Where the box is not white; everywhere in a box that is white all over."""
    coloured = np.asarray(image.convert("RGB").crop(box)).min(-1) < NEARLY_WHITE
    return coloured if coloured.any() else np.ones_like(coloured)


def _pixels(box: Box, image: Image.Image) -> tuple[int, int, int, int]:
    """The box rounded outwards to whole pixels and clipped to the image."""
    left, top = max(0, int(np.floor(box[0]))), max(0, int(np.floor(box[1])))
    right, bottom = min(image.width, int(np.ceil(box[2]))), min(image.height, int(np.ceil(box[3])))
    if left >= right or top >= bottom:
        raise UserError(f"box: {box} has no pixel of the image of {image.width}x{image.height}")
    return left, top, right, bottom


def place_on_canvas(subject: Image.Image, height: int, width: int) -> Image.Image:
    """Scale RGBA to the largest size that fits, keeping its aspect ratio, and centre it on white; RGB (H, W)."""
    subject = subject.resize(_fitted(subject.size, height, width), Image.Resampling.LANCZOS)
    canvas = Image.new("RGB", (width, height), WHITE)
    canvas.paste(subject, ((width - subject.width) // 2, (height - subject.height) // 2), subject.getchannel("A"))
    return canvas


def _fitted(size: tuple[int, int], height: int, width: int) -> tuple[int, int]:
    scale = min(width / size[0], height / size[1])
    return min(width, max(1, round(size[0] * scale))), min(height, max(1, round(size[1] * scale)))


def augment_reference(
    subject: Image.Image, seed: int, *, height: int, width: int, ranges: AugmentationRanges = AUGMENTATION
) -> Image.Image:
    """Random colours, rotation, shear, flip, scale and blur of a cut-out subject; no part of it is lost.

    Args:
        subject: RGBA, transparent around the subject.
        seed: the same seed draws the same augmentation.
        height, width: of the canvas that it is to be placed on.
        ranges: what to draw from.

    Returns:
        RGBA that contains the whole warped subject; its margin is what makes it smaller on the canvas.
    """
    generator = np.random.default_rng(seed)
    if subject.width > width or subject.height > height:
        subject = subject.resize(_fitted(subject.size, height, width), Image.Resampling.LANCZOS)
    subject = _jitter_colours(subject, generator, ranges)
    subject = _warp(subject, generator, ranges)
    radius = generator.uniform(0, ranges.blur_radius / 100 * min(height, width))
    if generator.random() < ranges.blur:
        # The subject is scaled to the canvas afterwards.
        shown = min(width / subject.width, height / subject.height)
        subject = _blur(subject, radius / shown)
    return subject


def _jitter_colours(subject: Image.Image, generator: np.random.Generator, ranges: AugmentationRanges) -> Image.Image:
    alpha, colours = subject.getchannel("A"), subject.convert("RGB")
    steps = (
        (ImageEnhance.Brightness, ranges.brightness),
        (ImageEnhance.Contrast, ranges.contrast),
        (ImageEnhance.Color, ranges.saturation),
    )
    for enhancer, most in steps:
        colours = enhancer(colours).enhance(1 + generator.uniform(-most, most))
    shift = round(256 * generator.uniform(-ranges.hue, ranges.hue))
    hue, saturation, value = colours.convert("HSV").split()
    hue = Image.fromarray(((np.asarray(hue, np.int16) + shift) % 256).astype(np.uint8))
    colours = Image.merge("HSV", (hue, saturation, value)).convert("RGB")
    colours.putalpha(alpha)
    return colours


def _warp(subject: Image.Image, generator: np.random.Generator, ranges: AugmentationRanges) -> Image.Image:
    """Flip, shear, rotate about the centre; the result holds all of it, with a margin that makes up for the scale."""
    angle = np.deg2rad(generator.uniform(-ranges.rotation, ranges.rotation))
    shears = np.tan(np.deg2rad(generator.uniform(-ranges.shear, ranges.shear, size=2)))
    scale = generator.uniform(*ranges.scale)
    mirror = -1.0 if generator.random() < ranges.flip else 1.0
    rotation = np.array([[np.cos(angle), -np.sin(angle)], [np.sin(angle), np.cos(angle)]])
    matrix = rotation @ np.array([[1, shears[0]], [shears[1], 1]]) @ np.diag([mirror, 1])
    # The half extents of a rectangle's image under a linear map are |matrix| times the rectangle's half extents.
    across, down = np.ceil(np.abs(matrix) @ np.array(subject.size) / scale).astype(int).tolist()
    inverse = np.linalg.inv(matrix)
    subject = ImageOps.expand(subject, 2, (*WHITE, 0))  # so that edges are interpolated towards transparency
    offset = np.array(subject.size) / 2 - inverse @ np.array([across, down]) / 2
    data = (*inverse[0], offset[0], *inverse[1], offset[1])
    return subject.transform((across, down), Image.Transform.AFFINE, data, Image.Resampling.BICUBIC)


def _blur(subject: Image.Image, radius: float) -> Image.Image:
    """Blur colours weighted by opacity, so that what was dropped does not bleed in."""
    return subject.convert("RGBa").filter(ImageFilter.GaussianBlur(radius)).convert("RGBA")


def cover(image: Image.Image, height: int, width: int, pixel_aspect: float = 1.0) -> Image.Image:
    """Scale until the image covers height x width and crop around the centre, in one resampling.

    Args:
        image: the picture.
        height, width: in pixels.
        pixel_aspect: width of one of the image's pixels over its height.
    """
    scale = max(height / image.height, width / (image.width * pixel_aspect))
    across, down = width / (scale * pixel_aspect), height / scale
    left, top = (image.width - across) / 2, (image.height - down) / 2
    box = (max(left, 0), max(top, 0), min(left + across, image.width), min(top + down, image.height))
    return image.resize((width, height), Image.Resampling.LANCZOS, box=box)
