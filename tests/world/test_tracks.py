"""Subjects out of pixels: votes for centres make instances, and instances of following frames make tracks."""

import numpy as np
import pytest

from refalign_adapter.world.subjects import KINDS
from refalign_adapter.world.tracks import Instance, choose, find_instances, follow

pytest.importorskip("scipy")


def pixels(discs, side=64):
    """Probabilities and exact offsets of discs (x, y, radius, kind), the later in front."""
    line = np.arange(side) + 0.5
    probabilities = np.zeros((1 + len(KINDS), side, side))
    probabilities[0] = 1
    offsets = np.zeros((2, side, side))
    for x, y, radius, kind in discs:
        inside = (line[None] - x) ** 2 + (line[:, None] - y) ** 2 < radius**2
        probabilities[:, inside] = 0
        probabilities[1 + kind, inside] = 1
        offsets[:, inside] = np.stack(np.broadcast_arrays(x - line[None], y - line[:, None]))[:, inside]
    return probabilities, offsets


def instance(x, y=32.0, kind="ball", area=100, sure=1.0):
    mask = np.zeros((64, 64), dtype=bool)
    mask.flat[:area] = True
    kinds = np.full(len(KINDS), (1 - sure) / (len(KINDS) - 1))
    kinds[list(KINDS).index(kind)] = sure
    return Instance(mask, np.array([x, y]), kinds, np.zeros(0))


def centres(tracks):
    return [[one and one.centre[0] for one in track] for track in tracks]


def test_overlapping_subjects_of_one_kind_are_two():
    probabilities, offsets = pixels([(24, 30, 12, 4), (40, 34, 10, 4)])
    found = sorted(find_instances(probabilities, offsets), key=lambda one: one.centre[0])
    assert [one.kinds.argmax() for one in found] == [4, 4]
    np.testing.assert_allclose([one.centre for one in found], [[24, 30], [40, 34]])
    assert not (found[0].mask & found[1].mask).any()
    assert sum(one.area for one in found) == int((probabilities[0] < 0.5).sum())


def test_the_pixels_of_a_subject_agree_on_one_kind():
    probabilities, offsets = pixels([(32, 32, 12, 2)])
    probabilities[[3, 6], 32:, :] = probabilities[[6, 3], 32:, :] * 0.9 + probabilities[[3, 6], 32:, :] * 0.1
    probabilities[3, :32] += 0.1 * (probabilities[3, :32] > 0)
    (found,) = find_instances(probabilities, offsets)
    assert found.kinds.argmax() == 2
    np.testing.assert_allclose(found.kinds.sum(), 1)
    assert found.area == int((probabilities[0] < 0.5).sum())


def test_crumbs_and_empty_pictures_hold_no_subject():
    assert find_instances(*pixels([])) == []
    assert find_instances(*pixels([(32, 32, 2.5, 0)])) == []


def test_tracks_go_on_in_the_nearest():
    frames = [
        [instance(50, 20), instance(10, 40)],
        [instance(16, 40), instance(44, 20)],
        [instance(38, 20), instance(22, 40)],
    ]
    assert centres(follow(frames)) == [[50, 44, 38], [10, 16, 22]]


def test_a_subject_out_of_sight_keeps_its_track():
    frames = [[instance(10), instance(50)], [instance(48)], [instance(46), instance(14)]]
    assert centres(follow(frames)) == [[10, None, 14], [50, 48, 46]]


def test_what_appears_far_away_is_another():
    assert centres(follow([[instance(10)], [instance(50)], []])) == [[10, None, None], [None, 50, None]]


def test_a_caption_means_the_largest_of_a_kind_from_left_to_right():
    small, left, right = ([instance(x, area=area)] * 2 for x, area in ((30, 100), (10, 200), (50, 300)))
    cat = [instance(40, kind="cat")] * 2
    kinds = ["ball", "cat", "ball", "fish"]
    chosen = choose([cat, right, small, left], kinds, 2)
    assert centres(chosen) == [[10, 10], [40, 40], [50, 50], [None, None]]
    assert centres(choose([right], ["ball", "ball"], 2)) == [[50, 50], [None, None]]


def test_the_frames_of_a_track_agree_on_its_kind():
    track = [instance(30, kind="cat", sure=0.4), instance(30, kind="cat", sure=0.4), instance(30, sure=0.9)]
    assert centres(choose([track], ["ball", "cat"], 3)) == [[30, 30, 30], [None] * 3]
    unsure = [*track[:2], instance(30, sure=0.3)]
    assert centres(choose([unsure], ["ball", "cat"], 3)) == [[None] * 3, [30, 30, 30]]
