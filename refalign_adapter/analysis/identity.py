"""Do generated subjects look like their references? Looks that are right, and the right one among others of a kind.

Shape letters: S subjects, F frames, L looks, K references to choose among.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from ..errors import UserError
from .estimate import Estimate, chance_agreement, mean, share, void
from .results import Result
from .shapes import cluster_numbers, require_shapes

NOT_FOUND = -1
"""What is read of a subject that was not found."""


@dataclass(frozen=True)
class Identity(Result):
    """How many looks are right.

    Attributes:
        right: share of looks that are right, over subjects, frames and counted looks; looks of a subject that was not
            found are wrong. Void without a counted look.
        looks: the same of each look, void of those that do not count. Their chance is that of readings dealt out to
            the subjects anew, the chance of `right` its mean.
        not_found: share of subjects and frames in which the subject was not found.
    """

    right: Estimate
    looks: tuple[Estimate, ...]
    not_found: Estimate


def looks_right(
    read: np.ndarray,
    truth: np.ndarray,
    counted: np.ndarray,
    clusters: Sequence | np.ndarray | None = None,
    *,
    seed: int = 0,
) -> Identity:
    """Compare looks read off generated frames with those of the references.

    Args:
        read: (S, F, L) integers, -1 where the subject was not found.
        truth: (S, L) integers from 0 on.
        counted: (L,) bool, the looks that the judge is known to read well.
        clusters: (S,) such as the video or seed of each subject; None: each subject is one, its frames together.
        seed: of the bootstrap.

    Raises:
        UserError: shapes that do not fit, or a truth below 0.
    """
    read, truth, counted = np.asarray(read), np.asarray(truth), np.asarray(counted, dtype=bool)
    require_shapes("read S F L, truth S L, counted L", read, truth, counted)
    if (truth < 0).any():
        raise UserError(f"truth must be 0 or more, got {truth.min()}: the looks of a reference are known")
    owners = cluster_numbers(clusters, len(read))
    right = read == truth[:, None]
    asked = np.broadcast_to(truth[:, None], read.shape)
    looks = tuple(
        _share(right[..., look], owners, seed, chance_agreement(read[..., look], asked[..., look]))
        if counts
        else void()
        for look, counts in enumerate(counted)
    )
    chances = [look.chance for look in looks if look.chance is not None]
    return Identity(
        _share(right[..., counted], owners, seed, float(np.mean(chances)) if chances else None),
        looks,
        _share((read == NOT_FOUND).any(-1), owners, seed),
    )


def most_common(read: np.ndarray) -> np.ndarray:
    """One reading for all frames: the look seen most often, the lowest of several; (S, F, L) to (S, L).

    Frames in which the subject was not found have no say; -1 if it was found in none.
    """
    read = np.asarray(read)
    require_shapes("read S F L", read)
    values = np.arange(max(read.max(initial=0) + 1, 1))
    votes = (read[..., None] == values).sum(1)
    return np.where(votes.any(-1), votes.argmax(-1), NOT_FOUND)


def retrieval(likeness: np.ndarray, clusters: Sequence | np.ndarray | None = None, *, seed: int = 0) -> Estimate:
    """Share of subjects whose own reference is the likest among K of its kind; chance is 1/K.

    Args:
        likeness: (S, K), larger is more alike; column 0 is the right reference. References that are equally like share
            the hit, so that a subject like all of them, or not found and given the same for all, counts 1/K.
        clusters: (S,); None: each subject is one.
        seed: of the bootstrap.

    Raises:
        UserError: fewer than two columns, or NaN.
    """
    likeness = np.asarray(likeness, dtype=float)
    require_shapes("likeness S K", likeness)
    if likeness.shape[1] < 2:
        raise UserError(f"likeness must have 2 columns or more, the right one first, got {likeness.shape[1]}")
    return likest(likeness, 0, clusters, seed=seed)


def likest(
    likeness: np.ndarray, column: int, clusters: Sequence | np.ndarray | None = None, *, seed: int = 0
) -> Estimate:
    """Share of rows (S, K) whose largest value stands in a column; equal ones share it.

    Raises:
        UserError: NaN.
    """
    if np.isnan(likeness).any():
        raise UserError("likeness must be numbers, got NaN; give a subject that was not found the same for all")
    first = likeness == likeness.max(1, keepdims=True)
    hits = first[:, column] / np.maximum(first.sum(1), 1)
    chance = 1 / likeness.shape[1]
    if np.isin(hits, (0, 1)).all():
        return share(hits == 1, clusters, chance=chance, seed=seed)
    return dataclasses.replace(mean(hits, clusters, seed=seed), chance=chance)


def _share(hits: np.ndarray, owners: np.ndarray, seed: int, chance: float | None = None) -> Estimate:
    """Of hits (S, ...) whose subjects have owners (S,)."""
    of_one = math.prod(hits.shape[1:])
    return share(hits.ravel(), np.repeat(owners, of_one), chance=chance, seed=seed)
