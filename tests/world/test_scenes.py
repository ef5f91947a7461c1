"""The world's clips: seeds, captions, motion, references."""

import itertools

import numpy as np
import pytest

from refalign_adapter.world.scenes import BACKGROUNDS, MOTIONS, describe, draw_clip
from refalign_adapter.world.subjects import KINDS, LOOKS

SIZE = {"height": 64, "width": 64, "num_frames": 9}


@pytest.fixture(scope="module")
def clips():
    return [draw_clip(3, number, split="train", **SIZE) for number in range(40)]


def test_the_same_seed_gives_the_same_clip(clips):
    again = draw_clip(3, 17, split="train", **SIZE)
    assert (again.frames == clips[17].frames).all()
    assert again.caption == clips[17].caption
    for ours, theirs in zip(again.references + again.masks, clips[17].references + clips[17].masks, strict=True):
        assert (np.asarray(ours) == np.asarray(theirs)).all()
    assert (draw_clip(4, 17, split="train", **SIZE).frames != clips[17].frames).any()


def test_captions_name_the_kinds_and_never_the_looks(clips):
    looks = {word for values in LOOKS for word in values}
    grammar = {word for text in [*MOTIONS, *BACKGROUNDS] for word in text.split()}
    grammar |= {"a", "while", "and"} | set(KINDS)
    assert not grammar & looks
    for clip in clips:
        words = clip.caption.replace(",", "").split()
        assert set(words) <= grammar
        for subject in clip.subjects:
            assert subject.kind in words


def test_captions_of_one_two_and_three_subjects():
    args = (["ball", "star", "fish"], ["rolls to the right", "bounces", "spins"])
    texts = [describe(args[0][:count], args[1][:count], "in a meadow") for count in (1, 2, 3)]
    assert texts == [
        "a ball rolls to the right, in a meadow",
        "a ball rolls to the right while a star bounces, in a meadow",
        "a ball rolls to the right while a star bounces and a fish spins, in a meadow",
    ]


def test_clips_have_one_to_three_subjects_of_different_kinds(clips):
    assert {len(clip.subjects) for clip in clips} == {1, 2, 3}
    for clip in clips:
        assert len({subject.kind for subject in clip.subjects}) == len(clip.subjects) == len(clip.references)


@pytest.mark.parametrize("count", [1, 2, 3])
def test_the_number_of_subjects_can_be_asked_for(count):
    assert len(draw_clip(0, 0, split="eval", subjects=count, **SIZE).subjects) == count


def test_something_moves_in_every_clip(clips):
    for clip in clips:
        change = np.abs(clip.frames[:-1].astype(float) - clip.frames[1:]).max(axis=(1, 2, 3))
        assert (change > 40).mean() > 0.7, clip.caption


def test_masks_match_the_references(clips):
    for clip in clips:
        for reference, mask in zip(clip.references, clip.masks, strict=True):
            pixels, marked = np.asarray(reference), np.asarray(mask)
            assert set(np.unique(marked)) == {0, 255}
            assert (pixels[marked == 0] == 255).all()
            assert (pixels[marked == 255] < 250).any(axis=-1).mean() > 0.5
            assert (marked == 255).mean() > 0.12


def test_references_show_the_subject_in_another_pose_and_light():
    first, second = (draw_clip(seed, 0, split="train", subjects=1, **SIZE) for seed in (0, 1))
    assert (np.asarray(first.references[0]) != first.frames[0]).mean() > 0.5
    assert first.subjects != second.subjects


@pytest.mark.parametrize(("height", "width", "num_frames"), [(48, 80, 5), (96, 64, 1), (128, 128, 13)])
def test_any_size_and_length(height, width, num_frames):
    clip = draw_clip(0, 1, split="train", height=height, width=width, num_frames=num_frames)
    assert clip.frames.shape == (num_frames, height, width, 3)
    sizes = {image.size for image in itertools.chain(clip.references, clip.masks)}
    assert sizes == {(width, height)}
