"""From which references do the looks of a video's subjects come? Subjects mixed of two, and subjects swapped.

Only those looks tell in which the references of a video differ.

Shape letters: V videos, M subjects and references of a video, L looks, n what is counted: looks, subjects or videos.
"""

from __future__ import annotations

import itertools
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np

from .estimate import Estimate, share
from .results import Result
from .shapes import cluster_numbers, require_shapes

SHUFFLES = 200
LOOKS = ("from_own", "from_other", "from_none")
SUBJECTS = ("own", "swapped", "mixed", "neither")


@dataclass(frozen=True)
class Mixing(Result):
    """Where looks come from.

    Chance is what would be measured if every video were compared with the references of another one: the mean over
    `SHUFFLES` rounds, in each of which the videos stand in random order and each is given the next one's references.

    Attributes:
        from_own, from_other, from_none: shares of looks that are those of the subject's own reference, else of another
            one of its video, or of none.
        own, swapped, mixed, neither: shares of subjects. The looks that a subject has from references, few as they may
            be, are all its own one's; or not, but one other's; or those of two or more together; or there are none.
        swapped_videos: share of videos whose subjects are all swapped, no two with the same reference.
    """

    from_own: Estimate
    from_other: Estimate
    from_none: Estimate
    own: Estimate
    swapped: Estimate
    mixed: Estimate
    neither: Estimate
    swapped_videos: Estimate


def mixing(
    read: np.ndarray, truth: np.ndarray, clusters: Sequence | np.ndarray | None = None, *, seed: int = 0
) -> Mixing:
    """Confusion by looks.

    Videos whose references differ in no look are left out; if none is left, all is void.

    Args:
        read: (V, M, L) integers, what is seen of the generated subjects, -1 where not found; see `most_common`. Leave
            out looks that the judge does not read well.
        truth: (V, M, L) integers from 0 on, of the references.
        clusters: (V,) such as seeds of sampling; None: each video is one.
        seed: of the bootstrap and of the chance levels.

    Raises:
        UserError: shapes that do not fit.
    """
    read, truth = np.asarray(read), np.asarray(truth)
    require_shapes("read V M L, truth V M L", read, truth)
    owners = cluster_numbers(clusters, len(read))
    chances = _chances(read, truth, seed)
    return Mixing(
        **{
            count.name: share(count.hits, owners[count.videos], chance=chances.get(count.name), seed=seed)
            for count in _counts(read, truth)
        }
    )


@dataclass(frozen=True)
class _Count:
    """What is counted: hits (n,), and the video of each (n,)."""

    name: str
    hits: np.ndarray
    videos: np.ndarray


def _counts(read: np.ndarray, truth: np.ndarray) -> Iterator[_Count]:
    telling = (truth != truth[:, :1]).any(1)  # (V, L)
    matches = (read[:, :, None] == truth[:, None]) & telling[:, None, None]  # (V, subject, reference, L)
    sourced = matches.any(2)  # (V, subject, L)
    explains = (matches | ~sourced[:, :, None]).all(3) & sourced.any(2)[:, :, None]  # all of a subject's by one alone
    yield from _of_looks(matches, telling)
    yield from _of_subjects(explains, sourced.any(2), np.flatnonzero(telling.any(1)))


def _of_looks(matches: np.ndarray, telling: np.ndarray) -> Iterator[_Count]:
    sourced, own = matches.any(2), matches.diagonal(axis1=1, axis2=2).transpose(0, 2, 1)
    asked = np.broadcast_to(telling[:, None], sourced.shape)
    videos = np.nonzero(asked)[0]
    for name, looks in zip(LOOKS, np.stack([own, sourced & ~own, ~sourced]), strict=True):
        yield _Count(name, looks[asked], videos)


def _of_subjects(explains: np.ndarray, sourced: np.ndarray, telling: np.ndarray) -> Iterator[_Count]:
    """Of explanations (V, M, M) and of subjects with any source (V, M), in the videos that tell."""
    own = explains.diagonal(axis1=1, axis2=2)
    swapped = explains.any(2) & ~own
    states = (own, swapped, sourced & ~own & ~swapped, ~sourced)
    for name, state in zip(SUBJECTS, states, strict=True):
        yield _Count(name, state[telling].ravel(), np.repeat(telling, state.shape[1]))
    places = np.arange(explains.shape[1])
    permuted = np.zeros(len(explains), dtype=bool)
    for order in itertools.permutations(range(len(places))):  # of two or three: few
        if all(place != other for place, other in enumerate(order)):
            permuted |= (explains[:, places, order] & swapped).all(1)
    yield _Count("swapped_videos", permuted[telling], telling)


def _chances(read: np.ndarray, truth: np.ndarray, seed: int) -> dict[str, float]:
    """Name -> share with another video's references; empty where there is no other video."""
    generator = np.random.default_rng(seed)
    hits, asked = Counter[str](), Counter[str]()
    for _ in range(SHUFFLES if len(read) > 1 else 0):
        order = generator.permutation(len(read))
        for count in _counts(read[order], truth[np.roll(order, 1)]):
            hits[count.name] += int(count.hits.sum())
            asked[count.name] += len(count.hits)
    return {name: hits[name] / number for name, number in asked.items() if number}
