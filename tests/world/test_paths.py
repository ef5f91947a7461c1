"""The world's ways: what clips show goes as they say, and subjects of one kind are told apart by it."""

from typing import Any

import numpy as np

from refalign_adapter.analysis.motion import motion_right, path_of
from refalign_adapter.world.paths import in_caption_order, motion_templates
from refalign_adapter.world.scenes import draw_clip

SIZE: dict[str, Any] = {"height": 64, "width": 64, "num_frames": 9}


def test_drawn_subjects_go_as_their_captions_say():
    clips = [draw_clip(2, number, split="eval", subjects=2, **SIZE) for number in range(20)]
    paths = np.array([[path_of(mask) for mask in clip.frame_masks] for clip in clips])
    said = [motion for clip in clips for motion in clip.motions]
    right = motion_right(paths.reshape(-1, 9, 3), said, motion_templates(2, 9))
    assert right.value > 0.9
    assert right.chance is not None
    assert right.chance < 0.3


def test_subjects_of_one_kind_are_named_by_what_they_do():
    right = []
    for number in range(20):
        clip = draw_clip(2, number, split="eval", same_kind=True, **SIZE)
        paths = np.array([path_of(mask) for mask in clip.frame_masks])
        left_to_right = np.argsort(np.nanmean(paths[:, :, 0], axis=1))
        order = in_caption_order(paths[left_to_right], clip)
        right.append(left_to_right[order].tolist() == list(range(len(clip.subjects))))
    assert np.mean(right) > 0.9


def test_subjects_of_other_kinds_and_unseen_ones_keep_their_places():
    clip = draw_clip(2, 0, split="eval", subjects=3, **SIZE)
    assert in_caption_order(np.full((3, 9, 3), np.nan), clip) == [0, 1, 2]
    alike = draw_clip(2, 0, split="eval", subjects=3, same_kind=True, **SIZE)
    assert sorted(in_caption_order(np.full((3, 9, 3), np.nan), alike)) == [0, 1, 2]
