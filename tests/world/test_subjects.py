"""The world's subjects: how many, which split, what they look like."""

import numpy as np
import pytest

from refalign_adapter.world.subjects import (
    COLOURS,
    KINDS,
    LOOKS,
    LOOKS_PER_KIND,
    Light,
    Subject,
    draw_subject,
    random_subject,
)


def test_there_are_thousands_of_subjects_and_every_number_is_another_look():
    looks = {Subject("star", number).looks for number in range(LOOKS_PER_KIND)}
    assert len(looks) == LOOKS_PER_KIND == 12 * 3 * 7 * 7 * 2
    assert len(KINDS) == 12


def test_training_never_draws_a_subject_of_evaluation():
    generator = np.random.default_rng(0)
    drawn = {
        split: {random_subject(generator, split, kind) for kind in KINDS for _ in range(500)}
        for split in ("train", "eval")
    }
    assert len(drawn["train"]) > 5000
    assert len(drawn["eval"]) > 3000
    assert not drawn["train"] & drawn["eval"]


def test_one_subject_in_eight_is_for_evaluation():
    share = np.mean([Subject(kind, n).split == "eval" for kind in KINDS for n in range(LOOKS_PER_KIND)])
    assert share == pytest.approx(1 / 8, abs=0.01)


@pytest.mark.parametrize("kind", KINDS)
def test_every_kind_fills_its_square_and_stays_in_it(kind):
    cover = np.asarray(draw_subject(Subject(kind, 5), Light()).getchannel("A")) > 127
    assert 0.25 < cover.mean() < 0.9
    assert not cover[[0, -1]].any()
    assert not cover[:, [0, -1]].any()


def test_each_look_changes_the_picture():
    sizes = [len(values) for values in LOOKS]
    first = np.asarray(draw_subject(Subject("ball", 0), Light()), dtype=float)
    for axis in range(len(LOOKS)):
        place = [0] * len(LOOKS)
        place[axis] = 1
        other = Subject("ball", int(np.ravel_multi_index(place, sizes)))
        assert np.abs(np.asarray(draw_subject(other, Light()), dtype=float) - first).max() > 60, LOOKS[axis]


def test_colours_are_told_apart():
    values = np.array(list(COLOURS.values()), dtype=float)
    distances = np.linalg.norm(values[:, None] - values[None], axis=-1) + 1e9 * np.eye(len(values))
    assert distances.min() > 45
