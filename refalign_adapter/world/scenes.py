"""Clips of the world: one to three subjects, each with a motion, over a background, and the caption that says so.

The caption names the kinds, the motions and the background, never looks. Every clip comes from its own random stream,
made of the seed, the split and the clip's number, so a clip does not depend on how many others are drawn.

Coordinates: x to the right and y down, both in [0, 1] over the frame.
"""

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from PIL import Image, ImageDraw

from .subjects import KINDS, SPLITS, Light, Subject, draw_subject, random_subject

FIRST_SIZES = {1: (0.46, 0.56), 2: (0.40, 0.46), 3: (0.33, 0.37)}
LANES = {1: (0.5,), 2: (0.27, 0.73), 3: (0.19, 0.5, 0.81)}
REFERENCE_SIZE = (0.62, 0.88)
SUPERSAMPLING = 2


@dataclass(frozen=True)
class Pose:
    """Where a subject is: centre (x, y) and size as shares of the frame, angle in radians, mirrored or not."""

    x: float
    y: float
    size: float
    angle: float = 0.0
    squash: float = 1.0
    mirrored: bool = False


@dataclass(frozen=True)
class Clip:
    """One drawn clip with its references.

    Attributes:
        frames: uint8 (num_frames, height, width, 3).
        caption: what happens, where, and the kinds of the subjects.
        subjects: one per reference, in the caption's order.
        references: RGB images (height, width) on white: another pose, scale and light than in the frames.
        masks: L images of the references, 255 on the subject and 0 elsewhere.
    """

    frames: np.ndarray
    caption: str
    subjects: list[Subject]
    references: list[Image.Image]
    masks: list[Image.Image]


def _slide(sign: int) -> Callable[[float], tuple[float, float, float, float]]:
    return lambda t: (sign * (1.6 * t - 0.8), 0, 0, 1)


def _roll(sign: int) -> Callable[[float], tuple[float, float, float, float]]:
    return lambda t: (sign * (1.6 * t - 0.8), 0, sign * np.pi * (t - 0.5), 1)


# Time in [0, 1] to (shift across, shift down, added angle, size factor); a shift of 1 is the lane's reach.
MOTIONS: dict[str, Callable[[float], tuple[float, float, float, float]]] = {
    "slides to the right": _slide(1),
    "slides to the left": _slide(-1),
    "rolls to the right": _roll(1),
    "rolls to the left": _roll(-1),
    "bounces": lambda t: (0, 0.8 - 1.4 * np.sin(np.pi * t), 0, 1),
    "falls down": lambda t: (0, 1.7 * t * t - 0.9, 0, 1),
    "floats up": lambda t: (0, 0.9 - 1.8 * t, 0, 1),
    "spins": lambda t: (0, 0, 1.25 * np.pi * t, 1),
    "grows": lambda t: (0, 0, 0, 0.55 + 0.6 * t),
    "shrinks": lambda t: (0, 0, 0, 1.15 - 0.6 * t),
    "sways": lambda t: (0.35 * np.sin(2 * np.pi * t), 0, 0.3 * np.sin(2 * np.pi * t), 1),
    "circles": lambda t: (0.45 * np.cos(1.5 * np.pi * t), 0.55 * np.sin(1.5 * np.pi * t), 0, 1),
}
ROLLING = ("ball", "flower", "star", "box")

# Name in captions to (sky's top, sky's bottom, ground's top, ground's bottom, horizon).
BACKGROUNDS = {
    "in a meadow": ((120, 190, 245), (214, 236, 250), (128, 190, 84), (78, 146, 58), 0.62),
    "on a beach": ((108, 190, 240), (70, 150, 215), (240, 222, 170), (222, 194, 134), 0.64),
    "under the sea": ((40, 130, 180), (18, 84, 140), (150, 140, 110), (110, 104, 92), 0.82),
    "in the snow": ((176, 200, 224), (222, 232, 240), (246, 248, 252), (214, 224, 238), 0.6),
    "at night": ((16, 20, 56), (54, 48, 104), (36, 44, 58), (22, 28, 40), 0.76),
    "in a city": ((200, 206, 214), (230, 222, 208), (120, 122, 128), (92, 94, 102), 0.74),
    "in the desert": ((250, 206, 140), (252, 232, 190), (222, 160, 96), (186, 120, 70), 0.66),
    "in a room": ((236, 220, 206), (226, 206, 190), (170, 122, 86), (140, 98, 68), 0.72),
}


def draw_clip(
    seed: int, number: int, *, split: str, height: int, width: int, num_frames: int, subjects: int | None = None
) -> Clip:
    """Draw clip `number` of the world with this seed.

    Args:
        seed, number: which clip; the same pair gives the same clip.
        split: `train` or `eval`: which subjects may occur.
        height, width: of frames and references, in pixels.
        num_frames: frames in the clip.
        subjects: how many subjects, 1 to 3; None draws the number.
    """
    generator = np.random.default_rng([seed, SPLITS.index(split), number])
    count = int(generator.choice(3, p=(0.4, 0.42, 0.18))) + 1
    cast = _cast(generator, split, subjects or count)
    motions = [str(generator.choice(_motions_of(subject.kind))) for subject in cast]
    place = str(generator.choice(list(BACKGROUNDS)))
    background = draw_background(place, generator, height * SUPERSAMPLING, width * SUPERSAMPLING)
    sprite_size = max(48, int(1.5 * min(height, width)))
    sprites = [draw_subject(subject, Light.random(generator), sprite_size) for subject in cast]
    paths = _paths(generator, motions, num_frames)
    frames = [_frame(background, sprites, [path[step] for path in paths]) for step in range(num_frames)]
    pictures = [draw_reference(subject, generator, height, width) for subject in cast]
    caption = describe([subject.kind for subject in cast], motions, place)
    return Clip(np.stack(frames), caption, cast, [image for image, _ in pictures], [mask for _, mask in pictures])


def describe(kinds: list[str], motions: list[str], place: str) -> str:
    """The caption: `a ball rolls to the right while a star bounces and a fish spins, in a meadow`."""
    parts = [f"a {kind} {motion}" for kind, motion in zip(kinds, motions, strict=True)]
    rest = " and ".join(parts[1:])
    return f"{parts[0]}{f' while {rest}' if rest else ''}, {place}"


def draw_reference(
    subject: Subject, generator: np.random.Generator, height: int, width: int, background: Image.Image | None = None
) -> tuple[Image.Image, Image.Image]:
    """Draw a subject alone in a random pose, scale and light, on white or on a `background` twice as large each way.

    Returns:
        The RGB image (height, width) and its mask, an L image with 255 on the subject.
    """
    size = float(generator.uniform(*REFERENCE_SIZE))
    room = max(0.0, 0.5 - 0.56 * size)
    pose = Pose(
        x=0.5 + float(generator.uniform(-room, room)) * min(height, width) / width,
        y=0.5 + float(generator.uniform(-room, room)) * min(height, width) / height,
        size=size,
        angle=float(generator.uniform(-0.6, 0.6)),
        squash=float(generator.uniform(0.9, 1.1)),
        mirrored=bool(generator.integers(2)),
    )
    sprite = draw_subject(subject, Light.random(generator), max(48, int(1.5 * min(height, width))))
    large = (width * SUPERSAMPLING, height * SUPERSAMPLING)
    layer = _place(sprite, pose, large)
    canvas = background.copy() if background else Image.new("RGB", large, (255, 255, 255))
    canvas.paste(layer, mask=layer.getchannel("A"))
    coverage = np.asarray(layer.getchannel("A").reduce(SUPERSAMPLING))
    return canvas.reduce(SUPERSAMPLING), Image.fromarray(np.where(coverage > 0, 255, 0).astype(np.uint8))


def draw_background(place: str, generator: np.random.Generator, height: int, width: int) -> Image.Image:
    """Draw a background: two gradients that meet at a horizon, and a few things that belong there; RGB."""
    *colours, horizon = BACKGROUNDS[place]
    tint = generator.uniform(0.94, 1.05, size=3)
    sky_top, sky_bottom, ground_top, ground_bottom = (np.array(colour) * tint for colour in colours)
    horizon = horizon + float(generator.uniform(-0.05, 0.05))
    y = (np.arange(height) + 0.5)[:, None] / height
    sky = sky_top + (sky_bottom - sky_top) * np.clip(y / horizon, 0, 1)
    ground = ground_top + (ground_bottom - ground_top) * np.clip((y - horizon) / (1 - horizon), 0, 1)
    column = np.clip(np.where(y < horizon, sky, ground), 0, 255).astype(np.uint8)
    image = Image.fromarray(np.repeat(column[:, None, :], width, axis=1))
    _decorate(ImageDraw.Draw(image), place, generator, horizon, height, width)
    return image


def _decorate(
    draw: ImageDraw.ImageDraw, place: str, generator: np.random.Generator, horizon: float, height: int, width: int
) -> None:
    def oval(x: float, y: float, across: float, down: float, fill: tuple[int, int, int]) -> None:
        draw.ellipse([(x - across) * width, (y - down) * height, (x + across) * width, (y + down) * height], fill=fill)

    def block(left: float, top: float, right: float, bottom: float, fill: tuple[int, int, int]) -> None:
        draw.rectangle([left * width, top * height, right * width, bottom * height], fill=fill)

    xs = generator.uniform(0, 1, size=6)
    ys = generator.uniform(0, 1, size=6)
    if place == "in a meadow":
        oval(xs[0], horizon + 0.08, 0.5, 0.16, (142, 200, 92))
        oval(0.15 + 0.7 * xs[1], 0.14, 0.08, 0.08, (255, 236, 130))
    elif place == "on a beach":
        block(0, horizon - 0.14, 1, horizon, (46, 128, 196))
        oval(0.15 + 0.7 * xs[1], 0.13, 0.08, 0.08, (255, 240, 150))
    elif place == "under the sea":
        for x, y in zip(xs[:5], ys, strict=False):
            oval(x, 0.75 * y, 0.02, 0.02, (130, 196, 222))
    elif place == "in the snow":
        for x in xs[:2]:
            draw.polygon(
                [
                    ((x - 0.3) * width, horizon * height),
                    (x * width, (horizon - 0.28) * height),
                    ((x + 0.3) * width, horizon * height),
                ],
                fill=(158, 178, 204),
            )
    elif place == "at night":
        for x, y in zip(xs[:5], ys, strict=False):
            oval(x, 0.6 * y, 0.012, 0.012, (240, 236, 200))
        oval(0.2 + 0.6 * xs[5], 0.15, 0.07, 0.07, (246, 240, 206))
    elif place == "in a city":
        for index, (x, y) in enumerate(zip(xs[:4], ys, strict=False)):
            left = index * 0.26 + 0.05 * x - 0.04
            block(left, horizon - 0.2 - 0.3 * y, left + 0.2, horizon, (150, 158, 176))
    elif place == "in the desert":
        oval(xs[0], horizon + 0.1, 0.55, 0.18, (232, 176, 108))
        oval(0.15 + 0.7 * xs[1], 0.15, 0.09, 0.09, (255, 246, 214))
    else:
        left = 0.1 + 0.5 * xs[0]
        block(left, 0.12, left + 0.3, 0.42, (250, 246, 238))
        block(left + 0.03, 0.15, left + 0.27, 0.39, (150, 200, 236))


def _cast(generator: np.random.Generator, split: str, count: int) -> list[Subject]:
    """Subjects of different kinds, so that a caption says which is which."""
    kinds = generator.choice(list(KINDS), size=count, replace=False)
    return [random_subject(generator, split, str(kind)) for kind in kinds]


def _motions_of(kind: str) -> list[str]:
    return [name for name in MOTIONS if kind in ROLLING or not name.startswith("rolls")]


def _paths(generator: np.random.Generator, motions: list[str], num_frames: int) -> list[list[Pose]]:
    """A list of poses per subject. Each subject has a lane of its own, so that subjects hardly cover each other."""
    lanes = generator.permutation(LANES[len(motions)])
    paths = []
    for lane, motion in zip(lanes, motions, strict=True):
        size = float(generator.uniform(*FIRST_SIZES[len(motions)]))
        y, tilt = (float(value) for value in generator.uniform((0.46, -0.25), (0.58, 0.25)))
        reach = (min(lane, 1 - lane) - 0.3 * size, min(y, 1 - y) - 0.45 * size)
        mirrored = bool(generator.integers(2))
        shifts = [MOTIONS[motion](step / max(num_frames - 1, 1)) for step in range(num_frames)]
        paths.append(
            [
                Pose(lane + across * reach[0], y + down * reach[1], size * factor, tilt + angle, mirrored=mirrored)
                for across, down, angle, factor in shifts
            ]
        )
    return paths


def _frame(background: Image.Image, sprites: list[Image.Image], poses: list[Pose]) -> np.ndarray:
    canvas = background.copy()
    for sprite, pose in zip(sprites, poses, strict=True):
        layer = _place(sprite, pose, canvas.size)
        canvas.paste(layer, mask=layer.getchannel("A"))
    return np.asarray(canvas.reduce(SUPERSAMPLING))


def _place(sprite: Image.Image, pose: Pose, canvas: tuple[int, int]) -> Image.Image:
    """The sprite on an empty RGBA canvas (width, height) at a pose; size is a share of the canvas's shorter side."""
    width, height = canvas
    target = pose.size * min(width, height)
    scale_x, scale_y = target * pose.squash / sprite.width, target / pose.squash / sprite.height
    cos, sin = np.cos(pose.angle), np.sin(pose.angle)
    inverse = np.array([[cos / scale_x, sin / scale_x], [-sin / scale_y, cos / scale_y]])
    if pose.mirrored:
        inverse[0] *= -1
    centre = np.array([pose.x * width, pose.y * height])
    offset = np.array(sprite.size) / 2 - inverse @ centre
    data = (*inverse[0], offset[0], *inverse[1], offset[1])
    return sprite.transform(canvas, Image.Transform.AFFINE, data, Image.Resampling.BICUBIC)
