"""The world's clips: seeds, captions, motion, references."""

import itertools
from typing import Any

import numpy as np
import pytest

from refalign_adapter.world.backgrounds import BACKGROUNDS
from refalign_adapter.world.motions import MOTIONS, same_path
from refalign_adapter.world.portraits import draw_portrait
from refalign_adapter.world.scenes import describe, draw_clip
from refalign_adapter.world.subjects import KINDS, LOOKS, Light

SIZE: dict[str, Any] = {"height": 64, "width": 64, "num_frames": 9}


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


def test_clips_are_those_of_the_first_release():
    """Drawn by 0.1.0 at the same seeds: what came later must not move the streams."""
    drawn = [draw_clip(3, number, split="train", **SIZE) for number in (0, 1, 7)]
    assert [clip.caption for clip in drawn] == [
        "a star shrinks, in the desert",
        "a cat falls down while a flower shrinks, at night",
        "a cat sways while a box falls down, in the snow",
    ]
    assert [[str(subject) for subject in clip.subjects] for clip in drawn] == [
        ["star-0639"],
        ["cat-1787", "flower-1398"],
        ["cat-2800", "box-3197"],
    ]
    means = [np.asarray(picture).mean() for clip in drawn for picture in (clip.frames, *clip.references)]
    assert means == pytest.approx([176.66, 218.47, 65.37, 223.37, 218.02, 193.42, 215.01, 212.25], abs=0.05)


@pytest.mark.parametrize("reference_backgrounds", [False, True])
@pytest.mark.parametrize("same_kind", [False, True])
@pytest.mark.parametrize("pairs", ["cross", "regular"])
def test_frame_masks_mark_the_subjects(pairs, same_kind, reference_backgrounds):
    """Where no subject is seen lies the background, which stays while they move."""
    for number in range(4):
        clip = draw_clip(
            3,
            number,
            split="train",
            same_kind=same_kind,
            pairs=pairs,
            reference_backgrounds=reference_backgrounds,
            **SIZE,
        )
        assert clip.frame_masks.shape == (len(clip.subjects), 9, 64, 64)
        assert (clip.frame_masks.sum(0) <= 1).all()
        assert (clip.frame_masks.mean((1, 2, 3)) > 0.02).all()
        never = ~clip.frame_masks.any((0, 1))
        assert (np.ptp(clip.frames[:, never], axis=0) == 0).mean() > 0.8  # soft edges change, too


def test_a_mask_follows_its_subject():
    """The mask's centre is the pose's, where nothing covers the subject and it lies within the frame."""
    for number in range(12):
        clip = draw_clip(3, number, split="train", subjects=1, **SIZE)
        for mask, pose in zip(clip.frame_masks[0], clip.poses[0], strict=True):
            inside = min(pose.x, pose.y, 1 - pose.x, 1 - pose.y) > 0.6 * pose.size
            rows, columns = np.nonzero(mask)
            assert not inside or abs(columns.mean() / 64 - pose.x) < 0.2 * pose.size
            assert not inside or abs(rows.mean() / 64 - pose.y) < 0.2 * pose.size


def test_clips_of_one_kind_are_told_apart_by_what_they_do():
    counts = set()
    for number in range(20):
        clip = draw_clip(3, number, split="eval", same_kind=True, **SIZE)
        counts.add(len(clip.subjects))
        assert len({subject.kind for subject in clip.subjects}) == 1
        assert len(set(clip.subjects)) == len({same_path(motion) for motion in clip.motions}) == len(clip.subjects)
        assert {subject.split for subject in clip.subjects} == {"eval"}
        assert clip.caption.split(", ")[0].count(clip.subjects[0].kind) == len(clip.subjects)
    assert counts == {2, 3}


def test_regular_references_are_a_frames_own_pixels():
    for number in range(8):
        clip = draw_clip(3, number, split="train", pairs="regular", **SIZE)
        plain = draw_clip(3, number, split="train", **SIZE)
        assert (clip.frames == plain.frames).all()
        for place, (image, mask, pose) in enumerate(
            zip(clip.references, clip.masks, clip.reference_poses, strict=True)
        ):
            frame = clip.poses[place].index(pose)
            covered = np.asarray(mask) > 0
            assert (covered == clip.frame_masks[place, frame]).all()
            assert (np.asarray(image)[covered] == clip.frames[frame][covered]).all()
            assert (np.asarray(image)[~covered] == 255).all()


def test_references_before_backgrounds_show_the_same_subject():
    """At the same pose and in the same light: only what the mask leaves out differs, but for its soft edge."""
    for number in range(6):
        white, before = (
            draw_clip(3, number, split="train", reference_backgrounds=flag, **SIZE) for flag in (False, True)
        )
        assert before.reference_poses == white.reference_poses
        for plain, image, mask, other in zip(
            white.references, before.references, white.masks, before.masks, strict=True
        ):
            covered = np.asarray(mask) > 0
            assert (covered == (np.asarray(other) > 0)).all()
            same = (np.asarray(plain) == np.asarray(image)).all(-1)
            assert same[covered].mean() > 0.75
            assert (np.asarray(image)[~covered] != 255).any(-1).mean() > 0.95


def test_a_portrait_is_drawn_at_its_pose():
    clip = draw_clip(3, 2, split="train", subjects=1, **SIZE)
    upright = draw_portrait(clip.subjects[0], clip.reference_poses[0], Light(), 64, 64)
    assert (np.asarray(upright.mask) == np.asarray(clip.masks[0])).all()
