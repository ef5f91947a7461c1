"""A row's references as pictures: read from their files, or taken out of a video's frames, with their masks."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from ...errors import UserError
from ...hashes import file_digest, hash_of
from ...media.canvas import Box, prepare_reference
from ...media.images import read_image, read_mask_file
from ...media.video import read_frame
from .masks import decode_mask
from .rows import Reference


@dataclass(frozen=True)
class Picture:
    """A reference as it was photographed.

    Attributes:
        image: RGB.
        mask: bool, of the image's size unless the data set is wrong, True on the subject; or None.
        box: around the subject in the image's pixels; or None.
        mask_by_alpha: whether the mask's alpha channel marks, not its colours.
    """

    image: Image.Image
    mask: np.ndarray | None
    box: Box | None
    mask_by_alpha: bool = False


def open_picture(reference: Reference) -> Picture:
    """Read a reference.

    Raises:
        UserError: its image, frame or mask cannot be read.
    """
    return next(open_pictures([reference]))


def open_pictures(references: Sequence[Reference]) -> Iterator[Picture]:
    """Read the references of a row one by one; a frame that several are cut from is decoded once.

    Raises:
        UserError: an image, frame or mask that cannot be read.
    """
    images: dict[Hashable, Image.Image] = {}
    for reference in references:
        marked = bool(reference.mask or reference.box or reference.rle)
        shown = reference.image, reference.frame, reference.crop, reference.long_side, marked
        if shown not in images:
            images[shown] = _read_image(reference, marked)
        read = read_mask_file(reference.mask) if reference.mask else None
        mask = decode_mask(reference.rle) if reference.rle else read and read.mask
        yield Picture(images[shown], mask, reference.box, bool(read and read.by_alpha))


def _read_image(reference: Reference, marked: bool) -> Image.Image:
    if reference.frame is None:
        image = read_image(reference.image, whole=marked or reference.long_side is not None)
    else:
        image = read_frame(reference.image, reference.frame, crop=reference.crop)
    if reference.long_side and max(image.size) > reference.long_side:
        scale = reference.long_side / max(image.size)
        width, height = (max(1, int(side * scale)) for side in image.size)
        image = image.resize((width, height), Image.Resampling.LANCZOS)
    return image


def draw_reference(
    reference: Reference,
    picture: Picture,
    *,
    height: int,
    width: int,
    keep_background: bool = False,
    augmentation_seed: int | None = None,
) -> Image.Image:
    """What the model sees of a reference, see `prepare_reference`: RGB (height, width).

    Raises:
        UserError: its mask or box does not fit; the message names the reference.
    """
    try:
        return prepare_reference(
            picture.image,
            height=height,
            width=width,
            mask=picture.mask,
            box=picture.box,
            keep_background=keep_background,
            augmentation_seed=augmentation_seed,
        )
    except UserError as error:
        frame = "" if reference.frame is None else f" frame {reference.frame:g}"
        raise UserError(f"reference {str(reference.image)!r}{frame}: {error}") from None


def reference_facts(reference: Reference, digest: Callable[[str | Path], str] = file_digest) -> dict[str, Any]:
    """JSON facts that decide a reference's picture, the bytes of its files among them.

    Args:
        reference: the reference.
        digest: hashes a file.

    Raises:
        UserError: a file that cannot be read.
    """
    facts: dict[str, Any] = {
        "image": digest(reference.image),
        "mask": digest(reference.mask) if reference.mask else None,
        "box": [float(side) for side in reference.box] if reference.box else None,
    }
    if reference.frame is not None:
        facts["frame"] = reference.frame
    if reference.crop:
        facts["crop"] = list(reference.crop)
    if reference.long_side:
        facts["long_side"] = reference.long_side
    if reference.rle:
        facts["rle"] = [reference.rle.height, reference.rle.width, reference.rle.counts]
    return facts


def augmentation_key(facts: dict[str, Any]) -> str:
    """What the draw of a reference's augmentation depends on: a picture's bytes, or which part of a video it is."""
    is_picture = set(facts) == {"image", "mask", "box"}
    return facts["image"] if is_picture else hash_of(facts)
