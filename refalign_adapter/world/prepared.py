"""Reference images as training prepares them: cut out by their masks, fitted to a white canvas of the clip's size."""

import numpy as np
from PIL import Image

from ..media.canvas import prepare_reference
from .portraits import Portrait
from .scenes import Clip


def prepared(portrait: Portrait) -> Image.Image:
    """RGB of the portrait's size."""
    image, mask = portrait.image, np.asarray(portrait.mask) > 0
    return prepare_reference(image, height=image.height, width=image.width, mask=mask)


def prepared_references(clip: Clip) -> list[Image.Image]:
    """All of a clip's."""
    return [
        prepared(Portrait(*parts)) for parts in zip(clip.references, clip.masks, clip.reference_poses, strict=True)
    ]
