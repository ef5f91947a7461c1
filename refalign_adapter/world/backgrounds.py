"""Backgrounds of the world: two gradients that meet at a horizon, and a few things that belong there."""

import numpy as np
from PIL import Image, ImageDraw

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
