"""Which reference a subject is most like, and where its looks come from: perfect, swapped, mixed and empty videos."""

import json
from collections import Counter

import numpy as np
import pytest

from refalign_adapter import ConfigError
from refalign_adapter.analysis.confusion import confusion
from refalign_adapter.analysis.mixing import SUBJECTS, mixing


def values(result) -> dict[str, float]:
    return {name: found["value"] for name, found in result.to_dict().items()}


def test_confusion_by_likeness():
    likeness = np.tile(np.eye(2), (10, 1, 1))
    likeness[:3] = np.eye(2)[::-1]  # three swapped videos
    result = confusion(likeness)
    assert [[cell.value for cell in row] for row in result.matrix] == pytest.approx(np.array([[0.7, 0.3], [0.3, 0.7]]))
    assert (result.diagonal.value, result.diagonal.chance, result.diagonal.n) == (0.7, 0.5, 20)
    assert result.diagonal.low < 0.7 < result.diagonal.high
    json.dumps(result.to_dict(), allow_nan=False)


def test_a_blind_judge_is_at_chance():
    result = confusion(np.random.default_rng(0).random((400, 3, 3)))
    for cell in (*sum(result.matrix, ()), result.diagonal):
        assert cell.low < 1 / 3 < cell.high
    alike = confusion(np.ones((4, 3, 3)))
    assert alike.diagonal.value == pytest.approx(1 / 3)
    assert sum(cell.value for cell in alike.matrix[0]) == pytest.approx(1)


def test_one_subject_is_confused_with_nobody():
    result = confusion(np.ones((5, 1, 1)))
    assert result.diagonal.void
    assert result.matrix[0][0].void
    assert set(values(mixing(np.ones((5, 1, 2)), np.ones((5, 1, 2)))).values()) == {None}
    assert set(values(mixing(np.ones((0, 2, 2)), np.ones((0, 2, 2)))).values()) == {None}
    with pytest.raises(ConfigError, match=r"likeness must be an array \(V, M, M\), got \(5, 2, 3\)"):
        confusion(np.ones((5, 2, 3)))


TWO = np.array([[0, 0, 5], [1, 1, 5]])  # two references that differ in their first two looks


@pytest.mark.parametrize(
    ("read", "state", "looks"),
    [
        ([[0, 0, 5], [1, 1, 5]], "own", (1, 0, 0)),
        ([[0, 7, 5], [7, 1, 5]], "own", (0.5, 0, 0.5)),
        ([[1, 1, 5], [0, 0, 5]], "swapped", (0, 1, 0)),
        ([[0, 1, 5], [1, 0, 5]], "mixed", (0.5, 0.5, 0)),
        ([[7, 7, 5], [7, 7, 5]], "neither", (0, 0, 1)),
        ([[-1, -1, -1], [-1, -1, -1]], "neither", (0, 0, 1)),
    ],
)
def test_where_looks_come_from(read, state, looks):
    result = mixing(np.array([read] * 4), np.array([TWO] * 4))
    assert (result.from_own.value, result.from_other.value, result.from_none.value) == looks
    assert {name: getattr(result, name).value for name in SUBJECTS} == {name: name == state for name in SUBJECTS}
    assert result.swapped_videos.value == (state == "swapped")
    assert (result.from_own.n, result.own.n, result.swapped_videos.n) == (16, 8, 4)


def test_a_video_is_swapped_when_no_two_subjects_have_the_same_reference():
    truth = np.array([[[0, 0], [1, 1], [2, 2]]] * 3)
    read = truth[:, [1, 2, 0]].copy()
    read[1] = truth[1][[1, 0, 0]]  # two subjects took the first reference
    read[2] = truth[2][[1, 0, 2]]  # the third subject is right
    result = mixing(read, truth)
    assert result.swapped.value == pytest.approx(8 / 9)
    assert result.swapped_videos.value == pytest.approx(1 / 3)


def test_of_three_references_the_fewest_that_explain_all_looks():
    truth = np.array([[[0, 0], [0, 1], [2, 2]]])
    # The first look is the second reference's and the subject's own, the second one the second's alone.
    assert mixing(np.array([[[0, 1], [0, 1], [2, 2]]]), truth).swapped.value == pytest.approx(1 / 3)
    result = mixing(np.array([[[2, 1], [0, 1], [2, 2]]]), truth)  # of two others together
    assert (result.mixed.value, result.from_other.value) == pytest.approx((1 / 3, 1 / 3))


def test_videos_whose_references_are_alike_say_nothing():
    truth = np.array([TWO, [[3, 3, 3], [3, 3, 3]]])
    result = mixing(truth, truth)
    assert (result.own.n, result.from_own.n, result.swapped_videos.n) == (2, 4, 1)


def naive_chance(read, truth) -> Counter:
    """Every video with every other one's references, subject by subject."""
    counts = Counter()
    for number, seen in enumerate(read):
        for other, references in enumerate(truth):
            telling = [look for look in range(truth.shape[2]) if len(set(references[:, look])) > 1]
            if number == other or not telling:
                continue
            for subject, looks in enumerate(seen):
                pairs = [{j for j, ref in enumerate(references) if ref[look] == looks[look]} for look in telling]
                pairs = [pair for pair in pairs if pair]
                common = set.intersection(*pairs) if pairs else set()
                state = "own" if subject in common else "swapped" if common else "mixed" if pairs else "neither"
                counts[state] += 1
    return counts


def test_chance_is_that_of_another_videos_references():
    generator = np.random.default_rng(0)
    truth, read = generator.integers(0, 3, (12, 3, 3)), generator.integers(0, 3, (12, 3, 3))
    result, expected = mixing(read, truth), naive_chance(read, truth)
    for name in SUBJECTS:
        assert getattr(result, name).chance == pytest.approx(expected[name] / expected.total(), abs=0.02)
    assert result.from_own.chance == pytest.approx(1 / 3, abs=0.05)
    assert mixing(read[:1], truth[:1]).own.chance is None
