"""Intervals against closed forms and scipy; what is void, what is refused, what JSON gets."""

import json
import math

import numpy as np
import pytest
from scipy.stats import bootstrap, norm, t, ttest_1samp

from refalign_adapter import UserError
from refalign_adapter.analysis.estimate import Estimate, chance_agreement, mean, share, spread


def wilson(hits: int, trials: int) -> tuple[float, float]:
    z, rate = 1.959963984540054, hits / trials
    centre, reach = rate + z * z / (2 * trials), z * math.sqrt(rate * (1 - rate) / trials + (z / (2 * trials)) ** 2)
    return (centre - reach) / (1 + z * z / trials), (centre + reach) / (1 + z * z / trials)


@pytest.mark.parametrize("hits", [0, 3, 20])
def test_a_share_has_wilsons_interval(hits):
    result = share([True] * hits + [False] * (20 - hits), chance=0.5)
    assert (result.value, result.n, result.chance) == (hits / 20, 20, 0.5)
    assert (result.low, result.high) == pytest.approx(wilson(hits, 20), abs=1e-9)


def test_frames_of_one_video_are_no_trials_of_their_own():
    videos = np.repeat(np.arange(40), 9)
    right = np.repeat(np.random.default_rng(0).random(40) < 0.6, 9)  # all frames of a video alike
    clustered, single = share(right, videos), share(right[::9])
    assert (clustered.value, clustered.n) == (single.value, 360)
    assert (clustered.low, clustered.high) == pytest.approx((single.low, single.high), abs=0.03)
    assert clustered.high - clustered.low > 2 * (share(right).high - share(right).low)


def test_when_all_hits_are_alike_clusters_are_the_trials():
    result = share([True] * 30, ["a", "b", "c"] * 10)
    assert (result.low, result.high) == pytest.approx(wilson(3, 3), abs=1e-9)


def test_a_mean_over_clusters_is_scipys_bootstrap():
    generator = np.random.default_rng(1)
    sizes = generator.integers(1, 6, 50)
    values = np.concatenate([generator.normal(generator.normal(), 0.3, size) for size in sizes])
    owners = np.repeat(np.arange(50), sizes)
    sums = np.bincount(owners, values)
    theirs = bootstrap(
        (sums, sizes),
        lambda total, count, axis: total.sum(axis) / count.sum(axis),
        paired=True,
        vectorized=True,
        method="percentile",
        confidence_level=1 - 2 * norm.sf(math.sqrt(50 / 49) * t.ppf(0.975, 49)),  # Hesterberg's for 50 clusters
        n_resamples=20_000,
        rng=np.random.default_rng(2),
    ).confidence_interval
    result = mean(values, owners)
    assert result.value == pytest.approx(values.mean())
    assert (result.low, result.high) == pytest.approx(tuple(theirs), abs=0.03)
    assert result == mean(values, owners)
    assert result != mean(values, owners, seed=1)


@pytest.mark.parametrize("clusters", [5, 10, 40])
def test_intervals_cover_what_is_true(clusters):
    generator = np.random.default_rng(0)
    owners = np.repeat(np.arange(clusters), 9)
    covered = 0
    for _ in range(200):
        of_cluster = generator.beta(2, 2, clusters)
        result = share(generator.random(9 * clusters) < np.repeat(of_cluster, 9), owners)
        covered += result.low <= 0.5 <= result.high
    assert 0.91 <= covered / 200 <= 0.99


def test_spread_is_students_t_over_seeds():
    values = [0.31, 0.35, 0.30, 0.36, 0.33]
    expected = ttest_1samp(values, 0).confidence_interval()
    result = spread(values)
    assert (result.value, result.low, result.high) == pytest.approx((0.33, *expected))
    assert result.n == 5


def test_nothing_measured_is_void_and_no_low_number():
    for nothing in (share([]), mean([]), spread([]), share(np.zeros(0, bool), [])):
        assert nothing.void
        assert str(nothing) == "void"
        assert nothing.to_dict() == dict.fromkeys(("value", "low", "high", "chance")) | {"n": 0, "void": True}
    assert not share([False]).void


@pytest.mark.parametrize(
    "alone", [mean([1.0, 2.0], ["a", "a"]), mean([1.5]), spread([1.5]), share([True, False], [0, 0])]
)
def test_one_cluster_or_seed_has_no_interval(alone):
    assert math.isnan(alone.low)
    assert math.isnan(alone.high)
    assert json.loads(json.dumps(alone.to_dict(), allow_nan=False))["low"] is None


def test_what_cannot_be_measured_is_refused():
    with pytest.raises(UserError, match="values must be finite, got 1 of 2"):
        mean([1.0, math.nan])
    with pytest.raises(UserError, match="values_per_seed must be finite"):
        spread([math.inf])
    with pytest.raises(UserError, match="hits must be booleans"):
        share(np.array([0.5, 1.0]))
    with pytest.raises(UserError, match="clusters must name one for each of 2 values"):
        mean([1.0, 2.0], [0])


def test_shows_its_numbers():
    assert str(Estimate(0.5, 0.25, 0.75, 8, 0.125)) == "0.5 (0.25 to 0.75, n = 8, chance 0.125)"


def test_chance_agreement_is_that_of_all_pairs():
    one, other = np.array([0, 0, 1, 2]), np.array([0, 1, 1, 3])
    assert chance_agreement(one, other) == pytest.approx((one[:, None] == other).mean())
