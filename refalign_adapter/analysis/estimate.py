"""A number with its 95 % interval: shares, means, and means over seeds.

Frames of one video, or videos of one seed, are no independent trials: name their cluster and the interval is that of
a bootstrap over clusters. Nothing measured is told apart from a low number: such an estimate is void.

Shape letters: n values.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from ..errors import UserError
from .bootstrap import LEVEL, bootstrap_interval
from .results import Result
from .shapes import cluster_numbers, require_finite


@dataclass(frozen=True)
class Estimate(Result):
    """A measured number.

    Attributes:
        value: the share or mean; NaN where nothing was measured.
        low, high: bounds of the 95 % interval; NaN where there is none, as with a single cluster or seed.
        n: how many values it is the mean of; 0: void.
        chance: what would be measured if there were nothing to find; None: not said.
    """

    value: float
    low: float
    high: float
    n: int
    chance: float | None = None

    @property
    def void(self) -> bool:
        """Whether nothing was measured."""
        return self.n == 0

    def to_dict(self) -> dict[str, Any]:
        """As JSON types, with `void`; None stands for NaN."""
        return {**super().to_dict(), "void": self.void}

    def __str__(self) -> str:
        if self.void:
            return "void"
        chance = "" if self.chance is None else f", chance {self.chance:.3g}"
        return f"{self.value:.3g} ({self.low:.3g} to {self.high:.3g}, n = {self.n}{chance})"


def void(chance: float | None = None) -> Estimate:
    """What there is to say where nothing was measured."""
    return Estimate(math.nan, math.nan, math.nan, 0, chance)


def share(
    hits: Sequence[bool] | np.ndarray,
    clusters: Sequence | np.ndarray | None = None,
    *,
    chance: float | None = None,
    seed: int = 0,
) -> Estimate:
    """The share of True among booleans (n,).

    Args:
        hits: one a trial.
        clusters: (n,) names of what each trial belongs to. None: trials are independent, and the interval is Wilson's.
        chance: noted down beside it.
        seed: of the bootstrap over clusters.

    Where all hits are alike a bootstrap would know no doubt: the interval then is Wilson's, of as many trials as there
    are clusters.

    Raises:
        UserError: `hits` are not booleans, or `clusters` are not as many.
    """
    booleans = np.asarray(hits)
    if booleans.size and booleans.dtype != bool or booleans.ndim != 1:
        raise UserError(f"hits must be booleans (n,), got {booleans.dtype} {booleans.shape}")
    numbers = cluster_numbers(clusters, len(booleans))
    if not len(booleans):
        return void(chance)
    alike = bool(booleans.all() or not booleans.any())
    if clusters is not None and not alike:
        return dataclasses.replace(mean(booleans, numbers, seed=seed), chance=chance)
    trials = int(numbers.max()) + 1
    low, high = _wilson(float(booleans.mean()), trials)
    return Estimate(float(booleans.mean()), low, high, len(booleans), chance)


def mean(
    values: Sequence[float] | np.ndarray, clusters: Sequence | np.ndarray | None = None, *, seed: int = 0
) -> Estimate:
    """The mean of values (n,), with a bootstrap over their clusters (n,); None: each value is one.

    Raises:
        UserError: a value that is not finite, or `clusters` that are not as many.
    """
    numbers = np.asarray(values, dtype=float)
    if numbers.ndim != 1:
        raise UserError(f"values must be an array (n,), got {numbers.shape}")
    require_finite("values", numbers)
    owners = cluster_numbers(clusters, len(numbers))
    if not len(numbers):
        return void()
    rows = np.stack([numbers, np.ones(len(numbers))], axis=1)
    low, high = bootstrap_interval(rows, owners, lambda totals: totals[..., 0] / totals[..., 1], seed=seed)
    return Estimate(float(numbers.mean()), low, high, len(numbers))


def spread(values_per_seed: Sequence[float] | np.ndarray) -> Estimate:
    """The mean of a value per seed of training (n,), with the interval of Student's t over seeds.

    Raises:
        UserError: a value that is not finite.
    """
    from scipy.stats import t

    values = np.asarray(values_per_seed, dtype=float)
    if values.ndim != 1:
        raise UserError(f"values_per_seed must be an array (n,), got {values.shape}")
    require_finite("values_per_seed", values)
    if not len(values):
        return void()
    centre = float(values.mean())
    if len(values) < 2:
        return Estimate(centre, math.nan, math.nan, 1)
    reach = float(t.ppf((1 + LEVEL) / 2, len(values) - 1) * values.std(ddof=1) / math.sqrt(len(values)))
    return Estimate(centre, centre - reach, centre + reach, len(values))


def chance_agreement(one: np.ndarray, other: np.ndarray) -> float | None:
    """How often two arrays would agree if one's values were dealt out anew: the sum of products of shares.

    What Cohen's kappa calls expected agreement (1960). None if they are empty.
    """
    if not one.size:
        return None
    names = np.unique(np.concatenate([one.ravel(), other.ravel()]))
    return float(sum((one == name).mean() * (other == name).mean() for name in names))


def _wilson(rate: float, trials: int) -> tuple[float, float]:
    from scipy.stats import binomtest

    interval = binomtest(round(rate * trials), trials).proportion_ci(LEVEL, method="wilson")
    return float(interval.low), float(interval.high)
