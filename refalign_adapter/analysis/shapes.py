"""The shapes that measures ask for, checked all at once."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial

import numpy as np

from ..errors import ConfigError, UserError


def require_shapes(expected: str, *arrays: np.ndarray) -> None:
    """Check arrays against names and letters: `require_shapes("read S F L, truth S L", read, truth)`.

    A letter is as large wherever it stands as where it stands first; a number is itself.

    Raises:
        ConfigError: shapes that do not fit, all at once.
    """
    sizes: dict[str, int] = {}
    problems = []
    for item, array in zip(expected.split(","), arrays, strict=True):
        name, *letters = item.split()
        known = [f"{letter} = {sizes[letter]}" if letter in sizes else letter for letter in letters]
        if len(letters) == array.ndim and all(map(partial(_fits, sizes), letters, array.shape)):
            continue
        problems.append(f"{name} must be an array ({', '.join(known)}), got {array.shape}")
    if problems:
        raise ConfigError(problems)


def _fits(sizes: dict[str, int], letter: str, size: int) -> bool:
    """Whether an axis is as large as its letter says; the first one says it."""
    return size == (int(letter) if letter.isdigit() else sizes.setdefault(letter, size))


def require_finite(name: str, values: np.ndarray) -> None:
    """Refuse NaN and infinities.

    Raises:
        UserError: there are any.
    """
    if wrong := int((~np.isfinite(values)).sum()):
        raise UserError(f"{name} must be finite, got {wrong} of {values.size} that are not; leave those out")


def cluster_numbers(clusters: Sequence | np.ndarray | None, count: int) -> np.ndarray:
    """(count,) numbers from 0 on, equal where the clusters' names are; each value its own cluster where None.

    Raises:
        UserError: not one name for each of `count` values.
    """
    if clusters is None:
        return np.arange(count)
    names = np.asarray(clusters)
    if names.shape != (count,):
        raise UserError(f"clusters must name one for each of {count} values, got an array {names.shape}")
    return np.unique(names, return_inverse=True)[1].reshape(-1)
