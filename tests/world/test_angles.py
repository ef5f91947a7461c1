"""A subject's angle and mirroring are read off clips whose poses are known."""

from typing import Any

import numpy as np
import pytest

from refalign_adapter.world.angles import estimate_pose
from refalign_adapter.world.crops import SHARE, SIDE, canonical
from refalign_adapter.world.scenes import draw_clip

SIZE: dict[str, Any] = {"height": 64, "width": 64, "num_frames": 9}


def test_a_crop_is_centred_and_of_one_scale():
    frame = np.zeros((40, 60, 3), np.uint8)
    for top, left, size in ((5, 10, 12), (10, 30, 24)):
        mask = np.zeros((40, 60), bool)
        mask[top : top + size, left : left + size] = True
        frame[mask] = 255
        crop, kept = canonical(frame, mask)
        rows, columns = np.nonzero(kept)
        assert (rows.mean(), columns.mean()) == pytest.approx((SIDE / 2 - 0.5,) * 2, abs=0.5)
        assert kept.mean() == pytest.approx(SHARE, rel=0.15)
        assert crop[kept].mean() > 0.95
        frame[mask] = 0


def test_poses_of_drawn_subjects_are_found():
    errors, mirrored = [], []
    for number in range(24):
        clip = draw_clip(1, number, split="eval", subjects=1, **SIZE)
        for frame in (0, 5):
            mask, pose = clip.frame_masks[0, frame], clip.poses[0][frame]
            if mask.sum() < 150 or min(pose.x, pose.y, 1 - pose.x, 1 - pose.y) < 0.55 * pose.size:
                continue  # tiny, or cut off by the frame
            angle, flipped = estimate_pose(*canonical(clip.frames[frame], mask), clip.subjects[0])
            errors.append(abs((angle - pose.angle + np.pi) % (2 * np.pi) - np.pi))
            mirrored.append(flipped == pose.mirrored)
    assert len(errors) > 20
    assert np.median(errors) < np.radians(8)
    assert np.mean(np.array(errors) < np.radians(15)) > 0.85
    assert np.mean(mirrored) > 0.75
