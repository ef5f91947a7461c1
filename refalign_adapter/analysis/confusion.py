"""Which reference of its video is each subject most like? Whether its looks come from several is `mixing`'s.

Shape letters: V videos, M subjects and references of a video.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from .estimate import Estimate, void
from .identity import likest
from .results import Result
from .shapes import cluster_numbers, require_shapes


@dataclass(frozen=True)
class Confusion(Result):
    """Which reference subjects are most like.

    Attributes:
        matrix: M rows of M; row i, column j: share of videos in which subject i is most like reference j. A row sums
            to 1. Chance is 1/M, what it would be with the references of a video in random order.
        diagonal: share of subjects most like their own. Chance likewise. All are void with M = 1.
    """

    matrix: tuple[tuple[Estimate, ...], ...]
    diagonal: Estimate


def confusion(likeness: np.ndarray, clusters: Sequence | np.ndarray | None = None, *, seed: int = 0) -> Confusion:
    """Confusion by likeness.

    Args:
        likeness: (V, M, M) of generated subject i to reference j of the same video, larger is more alike; equal ones
            share the hit.
        clusters: (V,) such as seeds of sampling; None: each video is one.
        seed: of the bootstrap.

    Raises:
        UserError: another shape, or NaN.
    """
    likeness = np.asarray(likeness, dtype=float)
    require_shapes("likeness V M M", likeness)
    videos, count, _ = likeness.shape
    if count < 2:
        return Confusion(((void(),),) * count, void())
    owners = cluster_numbers(clusters, videos)
    matrix = tuple(
        tuple(likest(likeness[:, subject], column, owners, seed=seed) for column in range(count))
        for subject in range(count)
    )
    own_first = np.stack([np.roll(likeness[:, subject], -subject, axis=1) for subject in range(count)], axis=1)
    diagonal = likest(own_first.reshape(videos * count, count), 0, np.repeat(owners, count), seed=seed)
    return Confusion(matrix, diagonal)
