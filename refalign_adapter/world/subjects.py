"""The subjects of the synthetic world: a kind, which captions name, and looks, which only references can tell.

Looks are a body colour, a second colour, a texture and an emblem on a plate: 3,528 combinations for each of 12 kinds.
One combination in eight is kept for evaluation and never drawn for training.

Coordinates: u to the right and v down, both in [-1, 1] over a subject's own square.
"""

import zlib
from dataclasses import dataclass
from functools import lru_cache
from math import prod

import numpy as np
from PIL import Image, ImageDraw

COLOURS = {
    "red": (224, 52, 48),
    "orange": (245, 134, 32),
    "yellow": (250, 210, 50),
    "lime": (150, 205, 50),
    "green": (34, 145, 70),
    "teal": (20, 165, 160),
    "sky": (92, 188, 245),
    "blue": (40, 84, 210),
    "purple": (130, 62, 190),
    "magenta": (214, 56, 170),
    "pink": (250, 160, 190),
    "brown": (142, 88, 52),
}
CONTRASTS = ("teal", "blue", "purple", "magenta", "yellow", "orange", "red", "lime", "sky", "green", "brown", "pink")
SECONDS = ("white", "dark", "contrast")
TEXTURES = ("stripes", "bars", "checks", "dots", "diagonals", "halves", "rings")
EMBLEMS = ("ring", "cross", "diamond", "triangle", "bar", "square", "moon")
PLATES = ("light", "black")
LOOKS = (tuple(COLOURS), SECONDS, TEXTURES, EMBLEMS, PLATES)
LOOKS_PER_KIND = prod(len(values) for values in LOOKS)
SPLITS = ("train", "eval")
LIGHT = (250, 250, 246)
DARK = (38, 34, 48)


def _ellipse(u: float, v: float, radius_u: float, radius_v: float | None = None) -> np.ndarray:
    turn = np.linspace(0, 2 * np.pi, 48, endpoint=False)
    return np.stack([u + radius_u * np.cos(turn), v + (radius_v or radius_u) * np.sin(turn)], axis=1)


def _polygon(*points: tuple[float, float]) -> np.ndarray:
    return np.array(points, dtype=float)


def _star(points: int, outer: float, inner: float) -> np.ndarray:
    turn = np.arange(2 * points) * np.pi / points - np.pi / 2
    radius = np.where(np.arange(2 * points) % 2 == 0, outer, inner)
    return np.stack([radius * np.cos(turn), radius * np.sin(turn) + 0.06], axis=1)


def _heart() -> np.ndarray:
    turn = np.linspace(0, 2 * np.pi, 64, endpoint=False)
    v = 13 * np.cos(turn) - 5 * np.cos(2 * turn) - 2 * np.cos(3 * turn) - np.cos(4 * turn)
    return np.stack([0.92 * np.sin(turn) ** 3, -v / 17 - 0.05], axis=1)


def _ghost() -> np.ndarray:
    turn = np.linspace(np.pi, 2 * np.pi, 32)
    top = np.stack([0.72 * np.cos(turn), 0.78 * np.sin(turn) - 0.12], axis=1)
    waves = np.linspace(0.72, -0.72, 25)
    return np.concatenate([top, np.stack([waves, 0.76 + 0.13 * np.cos(waves / 0.72 * 3 * np.pi)], axis=1)])


KINDS: dict[str, list[np.ndarray]] = {
    "ball": [_ellipse(0, 0, 0.86)],
    "box": [_polygon((-0.76, -0.76), (0.76, -0.76), (0.76, 0.76), (-0.76, 0.76))],
    "star": [_star(5, 0.98, 0.58)],
    "heart": [_heart()],
    "flower": [_ellipse(0.56 * np.cos(a), 0.56 * np.sin(a), 0.38) for a in np.arange(6) * np.pi / 3]
    + [_ellipse(0, 0, 0.6)],
    "fish": [_polygon((0.35, 0.0), (0.96, -0.52), (0.96, 0.52)), _ellipse(-0.18, 0, 0.78, 0.66)],
    "cat": [
        _polygon((-0.84, -0.92), (-0.78, 0.0), (-0.05, -0.5)),
        _polygon((0.84, -0.92), (0.78, 0.0), (0.05, -0.5)),
        _ellipse(0, 0.12, 0.86, 0.76),
    ],
    "ghost": [_ghost()],
    "mushroom": [
        _polygon((-0.42, 0.1), (0.42, 0.1), (0.5, 0.9), (-0.5, 0.9)),
        np.concatenate([_ellipse(0, 0.2, 0.95, 1.08)[24:], _polygon((0.95, 0.2), (-0.95, 0.2))]),
    ],
    "house": [
        _polygon((-0.68, -0.15), (0.68, -0.15), (0.68, 0.86), (-0.68, 0.86)),
        _polygon((-0.94, -0.1), (0, -0.96), (0.94, -0.1)),
    ],
    "rocket": [
        _polygon((-0.4, 0.2), (-0.82, 0.9), (0.82, 0.9), (0.4, 0.2)),
        _polygon((0, -0.95), (0.36, -0.6), (0.48, 0.0), (0.44, 0.74), (-0.44, 0.74), (-0.48, 0.0), (-0.36, -0.6)),
    ],
    "cloud": [
        _ellipse(-0.52, 0.2, 0.44),
        _ellipse(0.52, 0.2, 0.44),
        _ellipse(0, -0.16, 0.56),
        _ellipse(0, 0.3, 0.6, 0.4),
    ],
}


@dataclass(frozen=True)
class Subject:
    """One subject: its kind and the number of its looks, from 0 to `LOOKS_PER_KIND` - 1. Written as `star-0412`."""

    kind: str
    number: int

    def __str__(self) -> str:
        return f"{self.kind}-{self.number:04d}"

    @property
    def looks(self) -> tuple[str, ...]:
        """Body colour, second colour, texture, emblem, plate."""
        places = np.unravel_index(self.number, [len(values) for values in LOOKS])
        return tuple(values[place] for values, place in zip(LOOKS, places, strict=True))

    @property
    def split(self) -> str:
        """`eval` for one combination in eight, `train` for the others; fixed for ever by the subject's name."""
        return "eval" if zlib.crc32(str(self).encode()) % 8 == 0 else "train"


@dataclass(frozen=True)
class Light:
    """Light on a subject: gain, strength and direction (radians) of the shading, and warmth (red against blue)."""

    gain: float = 1.0
    shading: float = 0.0
    direction: float = 0.0
    warmth: float = 0.0

    @classmethod
    def random(cls, generator: np.random.Generator) -> "Light":
        """Draw a light from daylight's range."""
        gain, shading, direction, warmth = generator.uniform((0.86, 0.06, 0.0, -0.06), (1.08, 0.2, 2 * np.pi, 0.06))
        return cls(gain, shading, direction, warmth)


def random_subject(generator: np.random.Generator, split: str, kind: str) -> Subject:
    """Draw a subject of a kind among the looks of a split (`train` or `eval`), each equally likely."""
    while True:
        subject = Subject(kind, int(generator.integers(LOOKS_PER_KIND)))
        if subject.split == split:
            return subject


def draw_subject(subject: Subject, light: Light, size: int = 96) -> Image.Image:
    """Draw a subject upright in its square.

    Returns:
        An RGBA image (size, size). Colours go on beyond the silhouette, so that resampling brings no fringe in.
    """
    outline, body = _silhouette(subject.kind, size)
    inside = np.asarray(body, dtype=np.float32)[..., None] / 255
    base = np.array(COLOURS[subject.looks[0]], dtype=np.float32)
    pixels = inside * _painted(subject, size) + (1 - inside) * 0.35 * base
    u, v = _grid(size)
    shade = light.gain + light.shading * (u * np.cos(light.direction) + v * np.sin(light.direction))
    pixels = pixels * shade[..., None] * np.array([1 + light.warmth, 1, 1 - light.warmth], dtype=np.float32)
    image = Image.fromarray(np.clip(pixels + 0.5, 0, 255).astype(np.uint8))
    image.putalpha(outline)
    return image


def _grid(size: int) -> tuple[np.ndarray, np.ndarray]:
    line = (np.arange(size, dtype=np.float32) + 0.5) / size * 2 - 1
    return np.broadcast_to(line[None, :], (size, size)), np.broadcast_to(line[:, None], (size, size))


def _pixels(points: np.ndarray, size: int) -> list[tuple[float, float]]:
    return [tuple(point) for point in (points + 1) / 2 * (size - 1)]


@lru_cache(maxsize=64)
def _silhouette(kind: str, size: int) -> tuple[Image.Image, Image.Image]:
    """Coverage with the outline and without it: two L images, supersampled four times."""
    large = 4 * size
    images = []
    for grow in (0.08, 0.0):
        image = Image.new("L", (large, large))
        draw = ImageDraw.Draw(image)
        for points in KINDS[kind]:
            corners = _pixels(points * 0.92, large)
            draw.polygon(corners, fill=255)
            if grow:
                draw.line([*corners, corners[0], corners[1]], fill=255, width=int(grow * large), joint="curve")
        images.append(image.resize((size, size), Image.Resampling.BOX))
    return images[0], images[1]


@lru_cache(maxsize=64)
def _texture(name: str, size: int) -> np.ndarray:
    """Weight (size, size) in [0, 1] of the second colour, anti-aliased."""
    large = 4 * size
    u, v = _grid(large)
    wave = 2 * np.pi / 0.56
    columns, rows = (np.round((axis + shift) / 0.5) * 0.5 - shift for axis, shift in ((u, 0.25), (v, 0.25)))
    shapes = {
        "stripes": np.sin(wave * v) > 0,
        "bars": np.sin(wave * u) > 0,
        "checks": (np.sin(wave * 0.8 * u) > 0) ^ (np.sin(wave * 0.8 * v) > 0),
        "dots": (u - columns) ** 2 + (v - rows) ** 2 < 0.16**2,
        "diagonals": np.sin(wave * 0.72 * (u + v)) > 0,
        "halves": u > 0,
        "rings": np.sin(wave * 0.85 * np.hypot(u, v) - 1.0) > 0,
    }
    image = Image.fromarray(shapes[name].astype(np.uint8) * 255)
    return np.asarray(image.resize((size, size), Image.Resampling.BOX), dtype=np.float32) / 255


@lru_cache(maxsize=64)
def _badge(emblem: str, plate: str, size: int) -> np.ndarray:
    """The plate with its emblem and the two eyes, RGBA as float32 (size, size, 4)."""
    large = 4 * size
    image = Image.new("RGBA", (large, large))
    draw = ImageDraw.Draw(image)
    ground, figure = (LIGHT, DARK) if plate == "light" else (DARK, LIGHT)
    place = np.array([0.0, 0.24])
    draw.polygon(_pixels(_ellipse(0, 0.24, 0.38), large), fill=figure)
    draw.polygon(_pixels(_ellipse(0, 0.24, 0.35), large), fill=ground)
    for points, is_figure in _EMBLEM_SHAPES[emblem]:
        draw.polygon(_pixels(points * 0.24 + place, large), fill=figure if is_figure else ground)
    for u in (-0.24, 0.24):
        draw.polygon(_pixels(_ellipse(u, -0.3, 0.15, 0.17), large), fill=DARK)
        draw.polygon(_pixels(_ellipse(u, -0.3, 0.12, 0.14), large), fill=LIGHT)
        draw.polygon(_pixels(_ellipse(u + 0.03, -0.27, 0.07), large), fill=DARK)
    return np.asarray(image.resize((size, size), Image.Resampling.BOX), dtype=np.float32)


_EMBLEM_SHAPES: dict[str, list[tuple[np.ndarray, bool]]] = {
    "ring": [(_ellipse(0, 0, 0.95), True), (_ellipse(0, 0, 0.48), False)],
    "cross": [
        (_polygon((-1, -0.34), (1, -0.34), (1, 0.34), (-1, 0.34)), True),
        (_polygon((-0.34, -1), (0.34, -1), (0.34, 1), (-0.34, 1)), True),
    ],
    "diamond": [(_polygon((0, -1.1), (0.8, 0), (0, 1.1), (-0.8, 0)), True)],
    "triangle": [(_polygon((0, -0.95), (1, 0.75), (-1, 0.75)), True)],
    "bar": [(_polygon((-1.1, -0.32), (1.1, -0.32), (1.1, 0.32), (-1.1, 0.32)), True)],
    "square": [(_polygon((-0.78, -0.78), (0.78, -0.78), (0.78, 0.78), (-0.78, 0.78)), True)],
    "moon": [(_ellipse(0, 0, 1.0), True), (_ellipse(0.45, -0.1, 0.78), False)],
}


def _painted(subject: Subject, size: int) -> np.ndarray:
    """The subject's paint over its whole square, without silhouette or light: float32 (size, size, 3), 0 to 255."""
    colour, second, texture, emblem, plate = subject.looks
    base = np.array(COLOURS[colour], dtype=np.float32)
    contrast = COLOURS[CONTRASTS[list(COLOURS).index(colour)]]
    other = np.array({"white": LIGHT, "dark": 0.5 * base, "contrast": contrast}[second], dtype=np.float32)
    weight = _texture(texture, size)[..., None]
    badge = _badge(emblem, plate, size)
    cover = badge[..., 3:] / 255
    return (base + weight * (other - base)) * (1 - cover) + badge[..., :3] * cover
