"""What subjects of the world do: named motions, the poses that follow from them, and a sprite at a pose.

Coordinates: x to the right and y down, both in [0, 1] over the frame.
"""

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from PIL import Image

FIRST_SIZES = {1: (0.46, 0.56), 2: (0.40, 0.46), 3: (0.33, 0.37)}
LANES = {1: (0.5,), 2: (0.27, 0.73), 3: (0.19, 0.5, 0.81)}


@dataclass(frozen=True)
class Pose:
    """Where a subject is: centre (x, y) and size as shares of the frame, angle in radians, mirrored or not."""

    x: float
    y: float
    size: float
    angle: float = 0.0
    squash: float = 1.0
    mirrored: bool = False


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


def motions_of(kind: str) -> list[str]:
    """The motions that a kind can make: only some roll."""
    return [name for name in MOTIONS if kind in ROLLING or not name.startswith("rolls")]


def same_path(motion: str) -> str:
    """A name that motions share whose subjects go the same way: what rolls and what slides differ in turning only."""
    return motion.replace("rolls", "slides")


def draw_paths(generator: np.random.Generator, motions: list[str], num_frames: int) -> list[list[Pose]]:
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


def place(sprite: Image.Image, pose: Pose, canvas: tuple[int, int]) -> Image.Image:
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
