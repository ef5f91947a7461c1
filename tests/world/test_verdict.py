"""Verdicts on constructed videos: perfect, pasted, swapped, mixed and empty ones, read by the shipped judge."""

import dataclasses
from typing import Any

import numpy as np
import pytest

from refalign_adapter.world.judge import LOOK_NAMES
from refalign_adapter.world.reading import Judge
from refalign_adapter.world.scenes import Clip
from refalign_adapter.world.subjects import LOOKS, Subject
from refalign_adapter.world.verdict import copy_paste, verdict
from refalign_adapter.world.watching import Watched, held_out_clips, read_videos

SIZE: dict[str, Any] = {"height": 64, "width": 64, "num_frames": 9}
COUNT = 12


@pytest.fixture(scope="module")
def judge():
    return Judge.load()


@pytest.fixture(scope="module")
def pairs():
    return held_out_clips(COUNT, 2, seed=7, **SIZE)


def watched(judge: Judge, clips: list[Clip], videos=None) -> Watched:
    frames = [clip.frames for clip in clips] if videos is None else videos
    return read_videos(judge, clips, np.arange(len(clips)), frames)


def dressed(subject: Subject, looks: tuple[str, ...]) -> Subject:
    """The kind in other looks."""
    places = [values.index(look) for values, look in zip(LOOKS, looks, strict=True)]
    return Subject(subject.kind, int(np.ravel_multi_index(places, [len(values) for values in LOOKS])))


def test_drawn_videos_are_perfect(judge, pairs):
    found = verdict(judge, watched(judge, pairs))
    assert found.identity.right.value > 0.85
    assert found.identity.right.chance is not None
    assert found.identity.right.chance < 0.6
    assert found.top1.value > 0.8
    assert found.top1.low > found.top1.chance == 1 / 16
    assert found.confusion is not None
    assert found.confusion.diagonal.value > 0.9
    assert found.mixing is not None
    assert found.mixing.own.value > 0.75
    assert found.motion.value > 0.8
    assert abs(found.copy_paste.pasted.value) < 0.15  # the references are drawn apart


def test_swapped_looks_are_swapped(judge, pairs):
    """What the references should have looked like is exchanged, so that each video shows the other's looks."""
    exchanged = [
        dataclasses.replace(clip, subjects=[dressed(one, other.looks), dressed(other, one.looks)])
        for clip in pairs
        for one, other in [clip.subjects]
    ]
    found = verdict(judge, watched(judge, exchanged))
    assert found.confusion is not None
    assert found.confusion.diagonal.value < 0.15
    assert found.mixing is not None
    assert found.mixing.swapped.value > 0.7
    assert found.mixing.swapped_videos.value > 0.6
    assert found.mixing.own.value < 0.15


def test_looks_of_two_references_are_mixed(judge):
    """Each subject keeps one telling look of its own and wears the other's in the rest."""
    first, second = (LOOK_NAMES.index(name) for name in judge.counted[:2])
    telling = [
        clip
        for clip in held_out_clips(40, 2, seed=8, **SIZE)
        if all(len({subject.looks[place] for subject in clip.subjects}) == 2 for place in (first, second))
    ][:COUNT]
    crossed = []
    for clip in telling:
        looks = [list(subject.looks) for subject in clip.subjects]
        looks[0][second], looks[1][second] = looks[1][second], looks[0][second]
        subjects = [dressed(subject, tuple(look)) for subject, look in zip(clip.subjects, looks, strict=True)]
        crossed.append(dataclasses.replace(clip, subjects=subjects))
    found = verdict(judge, watched(judge, crossed))
    assert found.mixing is not None
    assert found.mixing.mixed.value > 0.6
    assert found.mixing.own.value < 0.2


def test_empty_videos_show_nobody(judge, pairs):
    found = verdict(judge, watched(judge, pairs, [np.full((9, 64, 64, 3), 90, np.uint8)] * len(pairs)))
    assert found.identity.not_found.value == 1
    assert found.identity.right.value == 0
    assert found.top1.value == pytest.approx(1 / 16)
    assert found.motion.value == 0
    assert found.copy_paste.pasted.void
    assert found.mixing is not None
    assert found.mixing.neither.value == 1


def test_pasted_references_are_told(pairs):
    """Every frame is the reference picture itself, pose and all."""
    singles = [
        dataclasses.replace(clip, subjects=clip.subjects[:1], references=clip.references[:1], masks=clip.masks[:1])
        for clip in held_out_clips(30, 2, seed=9, **SIZE)
    ]
    videos = np.stack([np.repeat(np.asarray(clip.references[0])[None], 9, 0) for clip in singles])
    masks = np.stack([np.repeat(np.asarray(clip.masks[0])[None, None] > 0, 9, 1) for clip in singles])
    nothing = np.zeros((len(singles), 1, 9, 5), int)
    pasted = copy_paste(Watched(singles, np.arange(len(singles)), videos, masks, nothing, np.zeros((30, 1, 31))))
    assert pasted.pasted.value > 0.3
    assert pasted.angle_slope.value == pytest.approx(1, abs=0.15)
    assert pasted.angle_slope.low > 0.5
    assert pasted.mirrored_alike.value > 0.75

    drawn = [clip.frames for clip in singles]
    masks = np.stack([clip.frame_masks[:1] for clip in singles])
    free = copy_paste(
        Watched(singles, np.arange(len(singles)), np.stack(drawn), masks, nothing, np.zeros((30, 1, 31)))
    )
    assert abs(free.pasted.value) < 0.15
    assert abs(free.angle_slope.value) < 0.5
    assert free.angle_slope.low < 0 < free.angle_slope.high
