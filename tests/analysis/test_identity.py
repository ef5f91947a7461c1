"""Looks read right and retrieval, on videos made up: perfect, wrong in one look, empty."""

import json

import numpy as np
import pytest

from refalign_adapter import ConfigError, UserError
from refalign_adapter.analysis.identity import looks_right, most_common, retrieval

TRUTH = np.random.default_rng(0).integers(0, 4, (30, 3))
FRAMES = 5
PERFECT = np.repeat(TRUTH[:, None], FRAMES, axis=1)
ALL = np.ones(3, dtype=bool)


def test_a_perfect_video():
    result = looks_right(PERFECT, TRUTH, ALL)
    assert [result.right.value, *(look.value for look in result.looks)] == [1, 1, 1, 1]
    assert result.right.n == 30 * FRAMES * 3
    assert result.right.low == pytest.approx(0.886, abs=1e-3)  # Wilson of 30 of 30: frames of a subject are no trials
    assert result.not_found.value == 0
    assert result.right.chance == pytest.approx(0.25, abs=0.03)


def test_only_looks_that_count_count():
    read = PERFECT.copy()
    read[..., 1] += 1
    result = looks_right(read, TRUTH, np.array([True, True, False]))
    assert (result.looks[0].value, result.looks[1].value, result.right.value) == (1, 0, 0.5)
    assert result.looks[2].void
    assert looks_right(read, TRUTH, np.array([True, False, True])).right.value == 1
    nothing = looks_right(read, TRUTH, ~ALL)
    assert nothing.right.void
    assert all(look.void for look in nothing.looks)
    assert nothing.not_found.value == 0


def test_a_subject_that_is_not_found_is_wrong():
    read = PERFECT.copy()
    read[:, 0] = -1
    result = looks_right(read, TRUTH, ALL)
    assert (result.right.value, result.not_found.value) == pytest.approx((0.8, 0.2))
    gone = looks_right(np.full_like(PERFECT, -1), TRUTH, ALL)
    assert (gone.right.value, gone.not_found.value, gone.right.chance) == (0, 1, 0)


def test_no_subject_is_void_and_json():
    result = looks_right(PERFECT[:0], TRUTH[:0], ALL)
    assert result.right.void
    assert result.not_found.void
    assert json.loads(json.dumps(result.to_dict(), allow_nan=False))["right"]["value"] is None


def test_clusters_widen_the_interval():
    read = PERFECT.copy()
    read[:15] = -1  # the first of two seeds failed
    alone, by_seed = looks_right(read, TRUTH, ALL), looks_right(read, TRUTH, ALL, np.arange(30) // 15)
    assert (by_seed.right.low, by_seed.right.high) == (0, 1)
    assert 0.2 < alone.right.low < alone.right.high < 0.8


def test_shapes_and_truths_that_do_not_fit_are_refused():
    with pytest.raises(ConfigError, match=r"truth must be an array \(S = 30, L = 3\), got \(29, 3\)\ncounted must"):
        looks_right(PERFECT, TRUTH[1:], ALL[1:])
    with pytest.raises(UserError, match="truth must be 0 or more, got -1"):
        looks_right(PERFECT, np.full_like(TRUTH, -1), ALL)


def test_most_common_reading_of_the_frames_that_show_the_subject():
    read = np.array([[[2, 0], [2, 1], [-1, -1], [0, 1]], [[-1, -1]] * 4])
    np.testing.assert_array_equal(most_common(read), [[2, 1], [-1, -1]])
    np.testing.assert_array_equal(most_common(PERFECT), TRUTH)


def test_retrieval_among_others_of_the_kind():
    likeness = np.random.default_rng(0).random((400, 16))
    blind = retrieval(likeness)
    assert blind.low < blind.chance == 1 / 16 < blind.high
    likeness[:, 0] = 2
    assert retrieval(likeness).value == 1
    assert retrieval(likeness[:0]).void


def test_references_equally_like_share_the_hit():
    assert retrieval(np.zeros((5, 4))).value == 0.25
    assert retrieval(np.array([[1.0, 1, 0], [1, 0, 0]])).value == 0.75
    with pytest.raises(UserError, match="likeness must be numbers, got NaN"):
        retrieval(np.full((2, 2), np.nan))
    with pytest.raises(UserError, match="2 columns or more"):
        retrieval(np.ones((2, 1)))
