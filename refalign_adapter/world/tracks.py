"""Subjects out of pixels: the instances in one picture, which of them go on in the next, and whom a caption means.

Every subject pixel points to its subject's centre. Where many point, there is a subject: so two of one kind that touch
are still two, which connected components of a mask would not see. scipy does the work; it comes with `analysis`.

Shape letters: K kinds, V values of all looks, H and W height and width in pixels.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from .subjects import KINDS

SMALLEST = 0.008
"""Share of a picture's square of the shorter side; anything smaller is no subject. The world's show 0.018 and up."""
SPREAD = 1.5
"""Standard deviation in pixels by which votes are smoothed."""
APART = 13
"""Window in pixels that holds one centre; those of the world's subjects are 15 apart and more."""
REACH = 0.3
"""How far a subject may go from frame to frame, as a share of the shorter side; the world's go half as far."""
_TINY = 1e-3


@dataclass(frozen=True)
class Instance:
    """One subject in one picture.

    Attributes:
        mask: bool (H, W).
        centre: x and y in pixels, of the subject's own square, also where a part of it is hidden.
        kinds: (K,) probabilities, in the order of `KINDS`.
        looks: (V,) probabilities, each look's sum to 1; empty until they are read.
    """

    mask: np.ndarray
    centre: np.ndarray
    kinds: np.ndarray
    looks: np.ndarray

    @property
    def area(self) -> int:
        """Pixels."""
        return int(self.mask.sum())


Track = list[Instance | None]
"""A subject's instances, one a frame; None where it is not seen."""


def find_instances(probabilities: np.ndarray, offsets: np.ndarray) -> list[Instance]:
    """The subjects of a picture, largest first. The kind of each is what its pixels say on average.

    Args:
        probabilities: (1 + K, H, W), of the background and the kinds.
        offsets: (2, H, W), from each pixel to its subject's centre, right and down, in pixels.
    """
    from scipy.spatial.distance import cdist

    seen = probabilities[0] < 0.5
    rows, columns = np.nonzero(seen)
    votes = np.stack([columns + 0.5, rows + 0.5], axis=1) + offsets[:, seen].T
    smallest = SMALLEST * min(seen.shape) ** 2
    centres = _crowded(votes, seen.shape, smallest)
    if not len(centres):
        return []
    nearest = cdist(votes, centres).argmin(axis=1)
    instances = []
    for place in range(len(centres)):
        mask = np.zeros_like(seen)
        mask[seen] = nearest == place
        if mask.sum() >= smallest:
            kinds = probabilities[1:, mask].mean(axis=1)
            centre = np.median(votes[nearest == place], axis=0)
            instances.append(Instance(mask, centre, kinds / kinds.sum(), np.zeros(0)))
    return sorted(instances, key=lambda instance: -instance.area)


def _crowded(votes: np.ndarray, shape: tuple[int, ...], smallest: float) -> np.ndarray:
    """Centres (N, 2), x and y, where enough votes fall together."""
    from scipy.ndimage import gaussian_filter, maximum_filter, uniform_filter

    height, width = shape
    edges = [np.arange(height + 1), np.arange(width + 1)]
    inside = np.clip(votes[:, ::-1], 0.25, np.array(shape) - 0.25)
    counts, _, _ = np.histogram2d(*inside.T, bins=edges)
    density = gaussian_filter(counts, SPREAD, mode="constant")
    together = uniform_filter(counts, APART, mode="constant") * APART**2
    peaks = (density == maximum_filter(density, APART)) & (together >= 0.5 * smallest) & (density > 0)
    rows, columns = np.nonzero(peaks)
    return np.stack([columns + 0.5, rows + 0.5], axis=1)


def follow(frames: Sequence[Sequence[Instance]]) -> list[Track]:
    """Follow instances through the frames.

    From frame to frame they go to the tracks whose last centres are nearest, all together at the least distance in sum
    (Hungarian assignment), and no farther than `REACH`. An instance that is left over begins a track.

    Args:
        frames: the instances in each frame.
    """
    tracks: list[Track] = []
    last: list[np.ndarray] = []
    for number, instances in enumerate(frames):
        taken = _nearest(last, instances)
        for place, track in enumerate(tracks):
            track.append(instances[taken[place]] if place in taken else None)
        left = [instance for place, instance in enumerate(instances) if place not in taken.values()]
        tracks += [[None] * number + [instance] for instance in left]
        last = [seen.centre if (seen := track[-1]) else last[place] for place, track in enumerate(tracks)]
    return tracks


def _nearest(last: list[np.ndarray], instances: Sequence[Instance]) -> dict[int, int]:
    """Track to instance."""
    from scipy.optimize import linear_sum_assignment
    from scipy.spatial.distance import cdist

    if not last or not instances:
        return {}
    distances = cdist(last, [instance.centre for instance in instances])
    reach = REACH * min(instances[0].mask.shape)
    pairs = zip(*linear_sum_assignment(distances), strict=True)
    return {int(track): int(place) for track, place in pairs if distances[track, place] <= reach}


def choose(tracks: Sequence[Track], kinds: Sequence[str], num_frames: int) -> list[Track]:
    """The tracks that a caption means.

    A track is of the kind that all its frames together make likeliest. Of more tracks of a kind than the caption names
    those with the most pixels in all are taken.

    Args:
        tracks: each with an instance in some frame.
        kinds: as the caption names them.
        num_frames: of a track.

    Returns:
        One track per name. Those of one kind are ordered from left to right by their mean centre, and what is missing
        of them comes last, as a track of None.
    """
    numbers = [_kind(track) for track in tracks]
    chosen: list[Track] = [[None] * num_frames for _ in kinds]
    for kind in dict.fromkeys(kinds):
        named = [place for place, other in enumerate(kinds) if other == kind]
        alike = [track for track, number in zip(tracks, numbers, strict=True) if number == list(KINDS).index(kind)]
        largest = sorted(alike, key=lambda track: -sum(one.area for one in track if one))[: len(named)]
        for place, track in zip(named, sorted(largest, key=_mean_x), strict=False):
            chosen[place] = track
    return chosen


def _kind(track: Track) -> int:
    return int(np.sum([np.log(one.kinds.clip(_TINY)) for one in track if one], axis=0).argmax())


def _mean_x(track: Track) -> float:
    return float(np.mean([one.centre[0] for one in track if one]))
