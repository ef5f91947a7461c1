"""Reference images of the world: a subject drawn anew, or cut out of a clip's frame.

Drawn anew it has another pose, scale and light than in the clip (a cross pair); cut out it has the same (a regular
pair), which a model can copy without knowing the subject.
"""

from dataclasses import dataclass

import numpy as np
from PIL import Image

from .motions import Pose, place
from .subjects import Light, Subject, draw_subject

SIZE = (0.62, 0.88)
SUPERSAMPLING = 2
VISIBLE = 0.7
"""Of the area a subject shows where it shows most: what a frame must show to be cut from."""


@dataclass(frozen=True)
class Portrait:
    """A reference image.

    Attributes:
        image: RGB (height, width).
        mask: L of the same size, 255 on the subject and 0 elsewhere.
        pose: of the subject in the image.
    """

    image: Image.Image
    mask: Image.Image
    pose: Pose


def sprite_size(height: int, width: int) -> int:
    """Side in pixels at which subjects are drawn before they are placed."""
    return max(48, int(1.5 * min(height, width)))


def draw_reference(
    subject: Subject, generator: np.random.Generator, height: int, width: int, background: Image.Image | None = None
) -> Portrait:
    """Draw a subject alone in a random pose, size and light, on white or on a `background` twice as large."""
    size = float(generator.uniform(*SIZE))
    room = max(0.0, 0.5 - 0.56 * size)
    pose = Pose(
        x=0.5 + float(generator.uniform(-room, room)) * min(height, width) / width,
        y=0.5 + float(generator.uniform(-room, room)) * min(height, width) / height,
        size=size,
        angle=float(generator.uniform(-0.6, 0.6)),
        squash=float(generator.uniform(0.9, 1.1)),
        mirrored=bool(generator.integers(2)),
    )
    return draw_portrait(subject, pose, Light.random(generator), height, width, background)


def draw_portrait(
    subject: Subject, pose: Pose, light: Light, height: int, width: int, background: Image.Image | None = None
) -> Portrait:
    """Draw a subject alone at a pose in a light, on white or on a `background` twice as large."""
    sprite = draw_subject(subject, light, sprite_size(height, width))
    large = (width * SUPERSAMPLING, height * SUPERSAMPLING)
    layer = place(sprite, pose, large)
    canvas = background.copy() if background else Image.new("RGB", large, (255, 255, 255))
    canvas.paste(layer, mask=layer.getchannel("A"))
    coverage = np.asarray(layer.getchannel("A").reduce(SUPERSAMPLING))
    return Portrait(canvas.reduce(SUPERSAMPLING), _mask(coverage > 0), pose)


def cut_reference(
    frames: np.ndarray, masks: np.ndarray, poses: list[Pose], generator: np.random.Generator, *, background: bool
) -> Portrait:
    """Cut a subject out of one of the frames that show it well.

    Args:
        frames: uint8 (F, height, width, 3).
        masks: bool (F, height, width), where the subject is seen.
        poses: of the subject, one a frame.
        generator: draws the frame.
        background: whether the rest of the frame stays, or becomes white.
    """
    areas = masks.sum((1, 2))
    number = int(generator.choice(np.flatnonzero(areas >= VISIBLE * areas.max())))
    picture = frames[number] if background else np.where(masks[number][..., None], frames[number], 255)
    return Portrait(Image.fromarray(picture.astype(np.uint8)), _mask(masks[number]), poses[number])


def _mask(covered: np.ndarray) -> Image.Image:
    return Image.fromarray(np.where(covered, 255, 0).astype(np.uint8))
