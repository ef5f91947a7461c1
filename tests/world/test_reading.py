"""The shipped judge on drawn videos of looks that it never saw, and where there is nothing to read."""

import json
from dataclasses import replace

import numpy as np
import pytest
import torch
from judge_report import accuracy, after_vae, clip_cases, draw_held_out, load_vae, reference_cases
from PIL import Image

from refalign_adapter.errors import UserError
from refalign_adapter.world.backgrounds import BACKGROUNDS, draw_background
from refalign_adapter.world.base import ASSETS
from refalign_adapter.world.judge import LOOK_NAMES, LOOK_SIZES, Squares, cut_crops, squares_around
from refalign_adapter.world.reading import COUNTED_FROM, Judge, Reading, value_columns
from refalign_adapter.world.scenes import draw_clip
from refalign_adapter.world.subjects import LOOKS, Subject

pytest.importorskip("scipy")
SEED, CLIPS = 515, 16
VALUES = sum(LOOK_SIZES)


@pytest.fixture(scope="module")
def judge():
    return Judge.load()


@pytest.fixture(scope="module")
def report():
    return json.loads((ASSETS / "judge.json").read_text())["report"]


@pytest.fixture(scope="module")
def drawn():
    return [draw_held_out(SEED, number) for number in range(CLIPS)]


def sums_of_looks(probabilities):
    return np.stack([part.sum(-1) for part in np.split(probabilities, np.cumsum(LOOK_SIZES)[:-1], axis=-1)])


def test_the_files_are_small():
    assert (ASSETS / "judge.safetensors").stat().st_size < 1.5e6


def test_what_counts_follows_from_the_report(judge, report):
    counted = [look for look in LOOK_NAMES if report["plain"]["all"][look][0] >= COUNTED_FROM]
    assert list(judge.counted) == counted
    assert counted


@pytest.mark.parametrize("view", ["plain", "vae"])
def test_held_out_subjects_are_read_as_the_report_says(judge, report, drawn, view):
    """Other clips than the report's, so both intervals count."""
    shown = after_vae(load_vae(None)) if view == "vae" else lambda frames: frames
    cases = [case for clip in drawn for case in clip_cases(judge, clip, shown)]
    for look in LOOK_NAMES:
        (share, half), (said, about) = accuracy(cases, look), report[view]["all"][look]
        assert share >= said - 1.5 * np.hypot(half, about), look
    in_place = np.concatenate([case.overlaps for case in cases]) > 0.5
    said = report[view]["all"]["found in place"]
    doubt = 1.96 * np.sqrt(said * (1 - said) / len(cases))  # who is taken for another kind is lost in all frames
    assert in_place.mean() > said - 1.5 * doubt


def test_references_are_read_with_and_without_their_mask(judge, report, drawn):
    cases = [case for clip in drawn for case in reference_cases(judge, clip, lambda frames: frames)]
    assert np.concatenate([case.found for case in cases]).mean() > 0.95
    for clip in drawn[:4]:
        for image, mask, subject in zip(clip.references, clip.masks, clip.subjects, strict=True):
            alone, inside = (judge.read_reference(image, given, subject.kind) for given in (None, mask))
            assert inside.looks[0, 0, 0] == LOOKS[0].index(subject.looks[0])
            assert not alone.found.any() or alone.looks[0, 0, 0] == inside.looks[0, 0, 0]


def test_subjects_of_one_kind_are_two_tracks_from_left_to_right(judge):
    clip = draw_clip(SEED, 3, split="eval", height=64, width=64, num_frames=9, subjects=2, same_kind=True)
    reading = judge.read(clip.frames, [subject.kind for subject in clip.subjects])
    order = sorted((0, 1), key=lambda place: np.mean([pose.x for pose in clip.poses[place]]))
    union = (reading.masks | clip.frame_masks[order]).sum((2, 3))
    assert ((reading.masks & clip.frame_masks[order]).sum((2, 3)) / union).min() > 0.5
    assert not reading.masks.all(axis=0).any()
    poses = [[(pose.x, pose.y) for pose in clip.poses[place]] for place in order]
    np.testing.assert_allclose(reading.centres, poses, atol=0.05)


def test_who_is_not_there_is_not_found(judge):
    clip = draw_clip(SEED, 6, split="eval", height=64, width=64, num_frames=9, subjects=1)
    (kind,) = (subject.kind for subject in clip.subjects)
    other = "ghost" if kind != "ghost" else "rocket"
    reading = judge.read(clip.frames, [other, kind])
    assert reading.found.any(axis=1).tolist() == [False, True]
    assert (reading.looks[0] == -1).all()
    assert np.isnan(reading.centres[0]).all()
    np.testing.assert_allclose(
        reading.over_frames()[0], np.concatenate([np.full(size, 1 / size) for size in LOOK_SIZES])
    )


def test_empty_and_noisy_pictures_hold_nobody(judge):
    generator = np.random.default_rng(0)
    empty = [np.asarray(draw_background(place, generator, 64, 64)) for place in BACKGROUNDS]
    flat = [np.full((64, 64, 3), value, dtype=np.uint8) for value in (0, 127, 255)]
    noise = [generator.integers(0, 256, (64, 64, 3), dtype=np.uint8)]
    for picture in (*empty, *flat, *noise):
        assert not judge.read(picture[None], ["ball", "star", "ghost"]).found.any()


def test_reading_is_the_same_each_time_and_sums_to_one(judge, drawn):
    kinds = [subject.kind for subject in drawn[4].subjects]
    first, second = (judge.read(drawn[4].frames, kinds) for _ in range(2))
    np.testing.assert_array_equal(first.probabilities, second.probabilities)
    np.testing.assert_array_equal(first.masks, second.masks)
    for probabilities in (first.probabilities, first.over_frames()):
        np.testing.assert_allclose(sums_of_looks(probabilities), 1, atol=1e-9)
    assert first.probabilities.shape == (len(kinds), 9, VALUES)


@pytest.mark.parametrize(("height", "width"), [(64, 96), (96, 64), (128, 128)])
def test_other_sizes_and_lengths(judge, height, width):
    clip = draw_clip(SEED, 7, split="eval", height=height, width=width, num_frames=5, subjects=1)
    reading = judge.read(clip.frames, [clip.subjects[0].kind])
    assert reading.masks.shape == (1, 5, height, width)
    overlap = (reading.masks & clip.frame_masks).sum((2, 3)) / (reading.masks | clip.frame_masks).sum((2, 3))
    assert overlap.min() > 0.6
    assert (reading.looks[0, :, 0] == LOOKS[0].index(clip.subjects[0].looks[0])).all()


def test_the_likeliest_subject_is_the_one_whose_looks_are_read(judge):
    subject, other = Subject("star", 412), Subject("star", 413)
    assert [subject.looks[place] != other.looks[place] for place in range(5)] == [False, False, False, False, True]
    probabilities = np.full((1, VALUES), 0.01)
    probabilities[0, value_columns(subject)] = (0.9, 0.8, 0.7, 0.6, 0.5)
    everything = replace(judge, counted=LOOK_NAMES)
    expected = [np.log([0.9, 0.8, 0.7, 0.6, last]).mean() for last in (0.5, 0.01)]
    np.testing.assert_allclose(everything.likeness(probabilities, [subject, other]), [expected])
    two = replace(judge, counted=("second", "emblem"))
    np.testing.assert_allclose(two.likeness(probabilities, [subject]), [[np.log([0.8, 0.6]).mean()]])
    with pytest.raises(UserError, match="a verdict would be void"):
        replace(judge, counted=()).likeness(probabilities, [subject])


def test_frames_are_pooled_by_their_geometric_mean_and_lost_ones_left_out():
    frames = np.concatenate([np.full((1, 3, size), 1 / size) for size in LOOK_SIZES], axis=-1)
    frames[0, :2, -2:] = [[0.9, 0.1], [0.6, 0.4]]
    frames[0, 2, -2:] = [0.0, 1.0]
    found = np.array([[True, True, False]])
    empty = np.zeros((1, 3, 4, 4), dtype=bool)
    reading = Reading(("cat",), empty, found, np.zeros((1, 3, 2)), np.zeros((1, 3, 5), dtype=int), frames)
    light, black = np.sqrt(0.9 * 0.6), np.sqrt(0.1 * 0.4)
    np.testing.assert_allclose(reading.over_frames()[0, -2:], np.array([light, black]) / (light + black))
    np.testing.assert_allclose(reading.over_frames()[0, :12], 1 / 12)


def test_a_crop_shows_the_square_around_the_mask():
    pictures, masks = torch.zeros(1, 3, 64, 80), torch.zeros(1, 64, 80, dtype=torch.bool)
    masks[0, 10:30, 40:64] = True
    pictures[0, 0, 10:30, 40:52] = 1
    squares = squares_around(masks)
    assert (squares.x.item(), squares.y.item(), squares.side.item()) == pytest.approx((52, 20, 24 * 1.15))
    crop = cut_crops(pictures, masks, squares)[0]
    assert crop[3].mean().item() == pytest.approx(20 * 24 / squares.side.item() ** 2, rel=0.03)
    assert crop[0, :, :25].sum() > 0.95 * crop[0].sum()
    turned = Squares(squares.x, squares.y, squares.side, torch.tensor([torch.pi / 2]))
    torch.testing.assert_close(cut_crops(pictures, masks, turned)[0], crop.rot90(1, (1, 2)), atol=1e-4, rtol=0)


def test_bad_input_is_one_clear_line(judge):
    frames = np.zeros((2, 64, 64, 3), dtype=np.uint8)
    with pytest.raises(UserError, match=r"frames must be uint8 \(frames, height, width, 3\), got float64"):
        judge.read(frames.astype(float), ["cat"])
    with pytest.raises(UserError, match="kinds must name one or more of ball, .*; got \\['zebra'\\]"):
        judge.read(frames, ["zebra"])
    with pytest.raises(UserError, match=r"masks must be of shape .* \(1, 2, 64, 64\), got \(2, 64, 64\)"):
        judge.read_inside(frames, ["cat"], np.zeros((2, 64, 64), dtype=bool))
    assert not judge.read_reference(Image.new("RGB", (64, 64), "white"), Image.new("L", (64, 64)), "cat").found.any()
