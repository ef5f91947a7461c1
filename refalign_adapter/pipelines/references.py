"""Reference images as a caller gives them to one padded batch of canvases.

Shape letters: B prompts, M references (padded to the largest number among the prompts), H and W a canvas's height and
width in pixels, h and w its rows and columns of tokens.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from ..errors import ConfigError, UserError
from ..media.canvas import content_tokens, prepare_reference
from ..media.images import read_image, to_rgb

FIELD = "reference_images"
ReferenceImage = str | os.PathLike[str] | Image.Image | np.ndarray | Tensor
"""A path, a PIL image, an array with 3, 4 or no channels last, or a tensor with 1, 3 or 4 channels first. Numbers are
uint8, or floats in [0, 1]. Transparency is laid on white."""


@dataclass(frozen=True)
class Canvases:
    """References as they are encoded.

    Attributes:
        pixels: (B, M, 3, H, W) float32 in [−1, 1], white where padded.
        mask: (B, M) bool, True where a reference is real.
        tokens: (B, M, h, w) bool, True where a token shows more than white padding; None: all are kept.
    """

    pixels: Tensor
    mask: Tensor
    tokens: Tensor | None = None

    @property
    def leaves_out(self) -> bool:
        """Whether any token of a real reference is left out."""
        return self.tokens is not None and not bool(self.tokens[self.mask].all())

    @property
    def differ(self) -> bool:
        """Whether prompts differ in how many reference tokens they have."""
        kept = self.mask if self.tokens is None else (self.tokens & self.mask[:, :, None, None]).flatten(1)
        return len(set(kept.sum(1).tolist())) > 1


def count_prompts(images: Any) -> int:
    """How many prompts a list of images, or of lists of them, is for."""
    nested = isinstance(images, (list, tuple)) and any(isinstance(item, (list, tuple)) for item in images)
    return len(images) if nested else 1


def group_by_prompt(images: Any, prompts: int, most: int) -> list[list[ReferenceImage]] | None:
    """One list of references per prompt; None when there are none at all.

    Args:
        images: None, one image or a list of images for a single prompt, a list of such lists for several.
        prompts: B.
        most: references that a prompt may have.

    Raises:
        ConfigError: lists that do not match the prompts, or too many references for a prompt.
    """
    if images is None:
        return None
    if _is_image(images):
        images = [images]
    if not isinstance(images, Sequence):
        raise UserError(f"{FIELD}: expected a list of images, got {type(images).__name__}")
    nested = [item for item in images if isinstance(item, (list, tuple))]
    if nested and len(nested) != len(images):
        raise UserError(f"{FIELD}: expected a list of images or a list of lists, got a mixture of both")
    groups = [list(item) for item in nested] if nested else [list(images)]
    if not any(groups):
        return None
    if len(groups) != prompts:
        got = f"{len(groups)} lists" if nested else "one flat list"
        raise UserError(f"{FIELD}: {prompts} prompts need {prompts} lists of images, one each, got {got}")
    problems = [
        f"{FIELD}{f'[{index}]' if prompts > 1 else ''}: {len(group)} references are too many, at most {most}; "
        "leave some out, or raise the pipeline's max_references"
        for index, group in enumerate(groups)
        if len(group) > most
    ]
    if problems:
        raise ConfigError(problems)
    return groups


def load_canvases(
    groups: Sequence[Sequence[ReferenceImage]], height: int, width: int, grid: tuple[int, int] | None = None
) -> Canvases:
    """Scale every reference to fit its canvas, centred on white, and pad the prompts to the same number.

    Args:
        groups: per prompt, its references.
        height, width: H and W.
        grid: (h, w), to leave out tokens that show nothing but white padding; None keeps all.

    Raises:
        ConfigError: every image that cannot be read, with its place.
    """
    most = max(len(group) for group in groups)
    canvases = torch.ones(len(groups), most, 3, height, width)
    mask = torch.zeros(len(groups), most, dtype=torch.bool)
    tokens = None if grid is None else torch.zeros(len(groups), most, *grid, dtype=torch.bool)
    problems = []
    for prompt, group in enumerate(groups):
        for index, image in enumerate(group):
            place = f"{FIELD}[{prompt}][{index}]" if len(groups) > 1 else f"{FIELD}[{index}]"
            try:
                canvas = prepare_reference(to_image(image, place), height=height, width=width)
            except UserError as error:
                problems.append(str(error))
                continue
            canvases[prompt, index] = torch.from_numpy(np.array(canvas)).permute(2, 0, 1) / 127.5 - 1
            mask[prompt, index] = True
            if tokens is not None:
                tokens[prompt, index] = torch.from_numpy(content_tokens(canvas, *tokens.shape[2:]))
    if problems:
        raise ConfigError(problems)
    return Canvases(canvases, mask, tokens)


def to_image(image: ReferenceImage, field: str = FIELD) -> Image.Image:
    """One reference as an upright RGB image, transparency on white.

    Raises:
        UserError: a file that cannot be read, or a type, shape or range that is no image; opens with `field`.
    """
    if isinstance(image, (str, os.PathLike)):
        if "://" in os.fspath(image):
            raise UserError(f"{field}: {os.fspath(image)[:200]!r} is an address; download it and give its path")
        return read_image(Path(image).expanduser(), field)
    if isinstance(image, Tensor):
        image = _channels_last(image, field)
    if isinstance(image, np.ndarray):
        image = _from_array(image, field)
    if not isinstance(image, Image.Image):
        raise UserError(f"{field}: expected a path, PIL image, array or tensor, got {type(image).__name__}")
    return to_rgb(image, "this image", field)


def _is_image(value: Any) -> bool:
    if isinstance(value, (np.ndarray, Tensor)):
        return value.ndim <= 3
    return isinstance(value, (str, os.PathLike, Image.Image))


def _channels_last(image: Tensor, field: str) -> np.ndarray:
    if image.ndim != 3 or image.shape[0] not in (1, 3, 4):
        raise UserError(f"{field}: a tensor must be (3, height, width), got {tuple(image.shape)}")
    image = image.detach().cpu()
    array = (image.float() if image.is_floating_point() else image).permute(1, 2, 0).numpy()
    return array[:, :, 0] if array.shape[2] == 1 else array


def _from_array(array: np.ndarray, field: str) -> Image.Image:
    if 0 in array.shape or not (array.ndim == 2 or (array.ndim == 3 and array.shape[2] in (3, 4))):
        raise UserError(f"{field}: an array must be (height, width, 3), got {array.shape}")
    if array.dtype != np.uint8:
        if not np.issubdtype(array.dtype, np.floating) or not (array.min() >= 0 and array.max() <= 1):
            raise UserError(
                f"{field}: an array must be uint8 or floats in [0, 1], "
                f"got {array.dtype} from {array.min()} to {array.max()}"
            )
        array = (array * 255).round().astype(np.uint8)
    return Image.fromarray(np.ascontiguousarray(array))
