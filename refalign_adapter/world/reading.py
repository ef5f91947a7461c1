"""What the judge reads in a video of the world: where each subject is, and how it looks.

The judge is shipped with its own report (`judge.json`, made by `tools/world/judge_report.py`): what it says counts in
a verdict only for the looks that it reads right in 95 of 100 drawn frames of subjects that it never saw.

Shape letters: M subjects as the caption names them, F frames, L looks (5), V values of all looks (31), S sets of
probabilities, H and W height and width in pixels.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.nn import functional

from ..errors import UserError
from .judge import LOOK_NAMES, LOOK_SIZES, SIDE, JudgeNetwork, cut_crops, load_network, squares_around
from .subjects import KINDS, LOOKS, Subject
from .tracks import Instance, Track, choose, find_instances, follow

COUNTED_FROM = 0.95
"""Share of drawn held-out frames in which a look must be read right to count."""
_EDGES = np.cumsum((0, *LOOK_SIZES))
_TINY = 1e-6
Picture = Image.Image | np.ndarray


@dataclass(frozen=True)
class Reading:
    """What the judge read in a video.

    Attributes:
        kinds: M kinds, as they were asked for.
        masks: bool (M, F, H, W), False everywhere where a subject was not found.
        found: bool (M, F).
        centres: float64 (M, F, 2), x and y of the subjects' own squares as shares of width and height; NaN where not
            found.
        looks: int64 (M, F, L), places among the values of `LOOKS`; -1 where not found.
        probabilities: float64 (M, F, V), the values of all looks side by side; each look's sum to 1. Where a subject
            was not found, all values of a look are equally likely.
    """

    kinds: tuple[str, ...]
    masks: np.ndarray
    found: np.ndarray
    centres: np.ndarray
    looks: np.ndarray
    probabilities: np.ndarray

    def over_frames(self) -> np.ndarray:
        """Each subject's probabilities (M, V) over all its frames: their geometric mean, of each look's sum 1."""
        total = np.where(self.found[..., None], np.log(self.probabilities.clip(_TINY)), 0).sum(axis=1)
        return _normalised(np.exp(total / self.found.sum(axis=1).clip(1)[:, None]))


@dataclass(frozen=True)
class Judge:
    """The network, and the looks whose reading counts (names of `LOOK_NAMES`)."""

    network: JudgeNetwork
    counted: tuple[str, ...]

    @classmethod
    def load(cls, assets: str | Path | None = None) -> Judge:
        """The shipped judge, or that of another folder."""
        network, about = load_network(assets)
        return cls(network, tuple(about["counted"]))

    def read(self, frames: np.ndarray, kinds: Sequence[str]) -> Reading:
        """Find the subjects that a caption names, follow them through the video and read their looks.

        Kinds that are named once have their place. Those of one kind come from left to right by their mean centre, in
        the places where that kind is named; which of them is the caption's first is for the caller to say, by what
        `centres` do for instance.

        Args:
            frames: uint8 (F, H, W, 3), any size; they are judged at a shorter side of 64 pixels.
            kinds: M of `KINDS`, in the caption's order.

        Raises:
            UserError: frames or kinds are none.
        """
        _require(frames, kinds)
        pictures = _at_side(frames)
        tracks = choose(follow(self._instances(pictures)), kinds, len(frames))
        return _reading(tracks, kinds, pictures.shape, frames.shape)

    def read_inside(self, frames: np.ndarray, kinds: Sequence[str], masks: np.ndarray) -> Reading:
        """Read looks where the subjects are known to be.

        Args:
            frames: uint8 (F, H, W, 3).
            kinds: M of `KINDS`, only written down.
            masks: bool (M, F, H, W); a subject without a pixel in a frame is not found there.

        Raises:
            UserError: frames, kinds or masks are none, or do not fit each other.
        """
        _require(frames, kinds)
        if masks.shape != (expected := (len(kinds), *frames.shape[:3])):
            raise UserError(f"masks must be of shape (subjects, frames, height, width) {expected}, got {masks.shape}")
        pictures = _at_side(frames)
        small = _resized(torch.from_numpy(masks).float(), tuple(pictures.shape[2:])).numpy() > 0.5
        tracks: list[Track] = [[None] * len(frames) for _ in kinds]
        places = np.argwhere(small.any(axis=(2, 3)))
        drawn = [_drawn(small[place, frame]) for place, frame in places]
        for (place, frame), instance in zip(places, self._read(pictures, places[:, 1], drawn), strict=True):
            tracks[place][frame] = instance
        return _reading(tracks, kinds, pictures.shape, frames.shape)

    def read_reference(self, image: Picture, mask: Picture | None, kind: str) -> Reading:
        """Read a reference picture as a video of one frame with one subject.

        Args:
            image: RGB, or uint8 (H, W, 3).
            mask: of the subject, L or an array (H, W), not 0 on it; None lets the judge find it.
            kind: one of `KINDS`.
        """
        frames = np.asarray(image)[None]
        if mask is None:
            return self.read(frames, [kind])
        return self.read_inside(frames, [kind], np.asarray(mask)[None, None] > 0)

    def likeness(self, probabilities: np.ndarray, subjects: Sequence[Subject]) -> np.ndarray:
        """How well readings fit known subjects: the mean log-probability of their looks that count.

        The right subject among 16 of its kind has the highest; a subject that was not found fits all alike.

        Args:
            probabilities: (S, V), one of a reading's or `Reading.over_frames`.
            subjects: whom to compare with.

        Returns:
            float64 (S, subjects), 0 or less.

        Raises:
            UserError: no look counts, so a verdict would be void.
        """
        if not self.counted:
            raise UserError("this judge reads no look well enough to count; a verdict would be void")
        columns = np.array([value_columns(subject) for subject in subjects])
        counted = columns[:, [LOOK_NAMES.index(name) for name in self.counted]]
        return np.log(probabilities.clip(_TINY))[:, counted].mean(axis=2)

    @torch.no_grad()
    def _instances(self, pictures: Tensor) -> list[list[Instance]]:
        """The instances of each picture (F, 3, h, w), with their looks."""
        height, width = pictures.shape[2:]
        padded = functional.pad(pictures, (0, -width % 8, 0, -height % 8), mode="replicate")
        seen = self.network.finder(padded)
        probabilities = seen.logits[..., :height, :width].softmax(dim=1).numpy()
        offsets = seen.offsets[..., :height, :width].numpy()
        found = [find_instances(*pair) for pair in zip(probabilities, offsets, strict=True)]
        rows = np.repeat(np.arange(len(found)), [len(instances) for instances in found])
        read = iter(self._read(pictures, rows, [instance for instances in found for instance in instances]))
        return [[next(read) for _ in instances] for instances in found]

    @torch.no_grad()
    def _read(self, pictures: Tensor, rows: np.ndarray, instances: Sequence[Instance]) -> list[Instance]:
        """Instances of the pictures `rows` with their looks."""
        if not instances:
            return []
        masks = torch.from_numpy(np.stack([instance.mask for instance in instances]))
        crops = cut_crops(pictures[torch.from_numpy(rows)], masks, squares_around(masks))
        logits = self.network.reader(crops).double().split(LOOK_SIZES, dim=1)
        looks = np.concatenate([part.softmax(dim=1).numpy() for part in logits], axis=1)
        return [replace(instance, looks=look) for instance, look in zip(instances, looks, strict=True)]


def value_columns(subject: Subject) -> list[int]:
    """The columns of a subject's looks among all values (V)."""
    return [int(edge) + values.index(value) for edge, values, value in zip(_EDGES, LOOKS, subject.looks, strict=False)]


def _reading(tracks: Sequence[Track], kinds: Sequence[str], small: Sequence[int], full: Sequence[int]) -> Reading:
    """Tracks in pictures of shape `small` (F, 3, h, w) as a reading of frames of shape `full` (F, H, W, 3)."""
    height, width = small[2:]
    found = np.array([[instance is not None for instance in track] for track in tracks])
    masks = np.zeros((*found.shape, height, width), dtype=bool)
    centres = np.full((*found.shape, 2), np.nan)
    probabilities = np.concatenate([np.full((*found.shape, size), 1 / size) for size in LOOK_SIZES], axis=-1)
    for place, frame in np.argwhere(found):
        if instance := tracks[place][frame]:
            masks[place, frame], probabilities[place, frame] = instance.mask, instance.looks
            centres[place, frame] = instance.centre / (width, height)
    parts = np.split(probabilities, _EDGES[1:-1], axis=-1)
    looks = np.where(found[..., None], np.stack([part.argmax(axis=-1) for part in parts], axis=-1), -1)
    large = _resized(torch.from_numpy(masks).float(), tuple(full[1:3])).numpy() > 0.5
    return Reading(tuple(kinds), large, found, centres, looks, probabilities)


def _normalised(values: np.ndarray) -> np.ndarray:
    return np.concatenate([_shares(part) for part in np.split(values, _EDGES[1:-1], axis=-1)], axis=-1)


def _shares(values: np.ndarray) -> np.ndarray:
    return values / values.sum(axis=-1, keepdims=True)


def _require(frames: np.ndarray, kinds: Sequence[str]) -> None:
    if frames.ndim != 4 or frames.shape[-1] != 3 or frames.dtype != np.uint8 or not frames.size:
        raise UserError(f"frames must be uint8 (frames, height, width, 3), got {frames.dtype} {frames.shape}")
    if not kinds or set(kinds) - set(KINDS):
        raise UserError(f"kinds must name one or more of {', '.join(KINDS)}; got {list(kinds)!r}")


def _at_side(frames: np.ndarray) -> Tensor:
    """Frames as float32 (F, 3, h, w) in [-1, 1] with a shorter side of 64 pixels."""
    height, width = frames.shape[1:3]
    scale = SIDE / min(height, width)
    signal = torch.tensor(frames).permute(0, 3, 1, 2).float() / 127.5 - 1
    return _resized(signal, (max(SIDE, round(height * scale)), max(SIDE, round(width * scale))))


def _resized(pictures: Tensor, shape: tuple[int, ...]) -> Tensor:
    if tuple(pictures.shape[2:]) == tuple(shape):
        return pictures
    return functional.interpolate(pictures, size=shape, mode="bilinear", antialias=True, align_corners=False)


def _drawn(mask: np.ndarray) -> Instance:
    """A known mask as an instance that may be of any kind, its centre that of the mask's box."""
    rows, columns = np.nonzero(mask)
    middle = (columns.min() + columns.max() + 1) / 2, (rows.min() + rows.max() + 1) / 2
    return Instance(mask, np.array(middle), np.full(len(KINDS), 1 / len(KINDS)), np.zeros(0))
