"""The judge's network: where the world's subjects are in a picture, and what they look like.

It is no teacher: convolutions instead of a transformer, trained on pictures of its own by
`tools/world/pretrain_judge.py`. A small U-Net says of every pixel which kind it shows and how far the centre of its
subject is, so that touching subjects of one kind come apart; a second net reads the looks off a crop around each.

Shape letters: B pictures, K kinds, V values of all looks (31), H and W height and width, S a crop's side.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from ..json_files import read_json
from . import base
from .subjects import KINDS, LOOKS

SIDE = 64
"""Pictures are judged at this shorter side, in pixels."""
OFFSET_UNIT = 16.0
"""Pixels that an offset of 1 stands for."""
CROP, MARGIN = 48, 1.15
LOOK_NAMES = ("body", "second", "texture", "emblem", "plate")
LOOK_SIZES = tuple(len(values) for values in LOOKS)


@dataclass(frozen=True)
class Pixels:
    """What the finder says of every pixel.

    Attributes:
        logits: (B, 1 + K, H, W), of the background and of the kinds in the order of `KINDS`.
        offsets: (B, 2, H, W), from the pixel to its subject's centre, right and down, in pixels.
    """

    logits: Tensor
    offsets: Tensor


@dataclass(frozen=True)
class Squares:
    """Where crops are taken: centres x and y and sides in pixels, turns in radians; each float32 (B,)."""

    x: Tensor
    y: Tensor
    side: Tensor
    turn: Tensor


def _convolution(inputs: int, outputs: int, stride: int = 1) -> nn.Sequential:
    return nn.Sequential(nn.Conv2d(inputs, outputs, 3, stride, 1), nn.GroupNorm(8, outputs), nn.SiLU())


def _pair(inputs: int, outputs: int, stride: int = 1) -> nn.Sequential:
    return nn.Sequential(_convolution(inputs, outputs, stride), _convolution(outputs, outputs))


class Finder(nn.Module):
    """Kind and offset to the centre for every pixel: a U-Net over pictures whose sides are multiples of 8."""

    def __init__(self, widths: tuple[int, ...]):
        super().__init__()
        pairs = list(zip(widths, widths[1:], strict=False))
        self.first = _convolution(3, widths[0])
        self.down = nn.ModuleList(_pair(wide, wider, stride=2) for wide, wider in pairs)
        self.up = nn.ModuleList(_convolution(wide + wider, wide) for wide, wider in reversed(pairs))
        self.head = nn.Conv2d(widths[0], 1 + len(KINDS) + 2, 1)

    def forward(self, pictures: Tensor) -> Pixels:
        """pictures: float (B, 3, H, W) in [-1, 1]."""
        levels = [self.first(pictures)]
        for layer in self.down:
            levels.append(layer(levels[-1]))
        hidden = levels.pop()
        for layer, skip in zip(self.up, reversed(levels), strict=True):
            larger = functional.interpolate(hidden, scale_factor=2, mode="bilinear", align_corners=False)
            hidden = layer(torch.cat([larger, skip], dim=1))
        logits, offsets = self.head(hidden).split([1 + len(KINDS), 2], dim=1)
        return Pixels(logits, offsets * OFFSET_UNIT)


class Reader(nn.Module):
    """Logits of the looks' values from crops with their mask."""

    def __init__(self, widths: tuple[int, ...]):
        super().__init__()
        stages = [_convolution(4, widths[0])]
        stages += [_pair(wide, wider, stride=2) for wide, wider in zip(widths, widths[1:], strict=False)]
        self.stages = nn.Sequential(*stages)
        self.head = nn.Linear(2 * widths[-1], sum(LOOK_SIZES))

    def forward(self, crops: Tensor) -> Tensor:
        """crops: float (B, 4, S, S), colours in [-1, 1] and the mask in [0, 1]. Returns logits (B, V)."""
        hidden = self.stages(crops)
        return self.head(torch.cat([hidden.mean((2, 3)), hidden.amax((2, 3))], dim=1))


class JudgeNetwork(nn.Module):
    """Both nets, of the widths that `judge.json` names."""

    def __init__(self, finder: list[int], reader: list[int]):
        super().__init__()
        self.finder, self.reader = Finder(tuple(finder)), Reader(tuple(reader))


def squares_around(masks: Tensor) -> Squares:
    """Upright squares around masks bool (B, H, W), each with at least one pixel, and a margin."""
    edges = []
    for axis in (1, 2):  # seen along the width, then along the height
        seen = masks.any(axis)
        first, last = seen.int().argmax(1), seen.shape[1] - seen.flip(1).int().argmax(1)
        edges.append((first.float(), last.float()))
    (left, right), (top, bottom) = edges
    side = torch.maximum(right - left, bottom - top) * MARGIN
    return Squares((left + right) / 2, (top + bottom) / 2, side, torch.zeros_like(side))


def cut_crops(pictures: Tensor, masks: Tensor, squares: Squares) -> Tensor:
    """Crops (B, 4, S, S) of pictures float (B, 3, H, W), a square each, the mask bool (B, H, W) as fourth channel."""
    height, width = pictures.shape[2:]
    cos, sin = squares.side * torch.cos(squares.turn), squares.side * torch.sin(squares.turn)
    across = torch.stack([cos / width, -sin / width, 2 * squares.x / width - 1], dim=1)
    down = torch.stack([sin / height, cos / height, 2 * squares.y / height - 1], dim=1)
    size = [len(pictures), 4, CROP, CROP]
    grid = functional.affine_grid(torch.stack([across, down], dim=1), size, align_corners=False)
    stacked = torch.cat([pictures, masks[:, None].to(pictures.dtype)], dim=1)
    return functional.grid_sample(stacked, grid, padding_mode="border", align_corners=False)


def load_network(assets: str | Path | None = None) -> tuple[JudgeNetwork, dict[str, Any]]:
    """The network of `judge.safetensors`, in float32 and for reading, and the contents of `judge.json`.

    Args:
        assets: the folder of both; None takes the shipped ones.
    """
    from safetensors.torch import load_file

    folder = Path(assets or base.ASSETS)
    about = read_json(folder / "judge.json")
    network = JudgeNetwork(**about["widths"])
    network.load_state_dict({key: value.float() for key, value in load_file(folder / "judge.safetensors").items()})
    return network.eval().requires_grad_(False), about
