"""Paths of masks in closed form; motions told apart on clips of the world."""

import numpy as np
import pytest

from refalign_adapter import ConfigError, UserError
from refalign_adapter.analysis.motion import motion_right, nearest_motion, path_of
from refalign_adapter.world.motions import MOTIONS
from refalign_adapter.world.scenes import draw_clip

TIME = np.linspace(0, 1, 9)
FLAT = np.zeros(9)
TEMPLATES = {
    "right": np.stack([TIME, FLAT, FLAT], 1),
    "left": np.stack([-TIME, FLAT, FLAT], 1),
    "rolls left": np.stack([1 - TIME, FLAT, FLAT], 1),  # starts elsewhere, and is the same path
    "grows": np.stack([FLAT, FLAT, 0.3 * TIME], 1),
}


def test_path_of_a_rectangle_in_closed_form():
    masks = np.zeros((3, 20, 40), dtype=bool)
    masks[0, 4:9, 10:20] = True
    masks[2] = True
    path = path_of(masks)
    np.testing.assert_allclose(path[[0, 2]], [[15 / 40, 6.5 / 20, np.sqrt(50 / 800)], [0.5, 0.5, 1]])
    assert np.isnan(path[1]).all()
    with pytest.raises(ConfigError, match="masks must be an array"):
        path_of(masks[0])


def test_where_and_how_large_a_subject_is_does_not_count():
    for name in ("right", "left", "grows"):
        assert nearest_motion(TEMPLATES[name] + [0.3, -0.2, 0.5], TEMPLATES) == name


def test_motions_of_one_path_count_as_one():
    paths = np.stack([TEMPLATES[name] for name in ("left", "left", "right", "grows")])
    result = motion_right(paths, ["left", "rolls left", "right", "right"], TEMPLATES)
    assert (result.value, result.n) == (0.75, 4)
    assert result.chance == pytest.approx(0.5 * 0.5 + 0.5 * 0.25)  # left: 2 said, 2 seen; right: 2 said, 1 seen


def test_frames_without_the_subject_are_left_out():
    path = TEMPLATES["right"].copy()
    path[[0, 4, 7]] = np.nan
    assert nearest_motion(path, TEMPLATES) == "right"
    path[1:] = np.nan
    assert nearest_motion(path, TEMPLATES) is None
    unseen = np.full((3, 9, 3), np.nan)
    result = motion_right(unseen, ["right"] * 3, TEMPLATES)
    assert (result.value, result.chance, result.n) == (0, 0, 3)
    assert motion_right(unseen[:0], [], TEMPLATES).void


def test_the_nearest_of_several_variants():
    short = {"right": np.stack([0.1 * TEMPLATES["right"], TEMPLATES["right"]]), "still": np.zeros((9, 3))}
    assert nearest_motion(0.12 * TEMPLATES["right"], short) == "right"
    assert nearest_motion(0.12 * TEMPLATES["right"], {**short, "right": TEMPLATES["right"]}) == "still"


def test_what_does_not_fit_is_refused():
    with pytest.raises(UserError, match="said must name motions among right, left, rolls left, grows, got hops"):
        motion_right(np.zeros((1, 9, 3)), ["hops"], TEMPLATES)
    with pytest.raises(ConfigError, match=r"template must be an array \(V, F = 5, 3\), got \(1, 9, 3\)"):
        nearest_motion(np.zeros((5, 3)), TEMPLATES)
    with pytest.raises(UserError, match="at least one motion"):
        nearest_motion(np.zeros((5, 3)), {})


def world_templates(num_frames: int, subjects: int) -> dict[str, np.ndarray]:
    """Every motion of the world over ways of some lengths, of a subject of middle size."""
    size = {1: 0.5, 2: 0.43, 3: 0.35}[subjects]
    steps = np.linspace(0, 1, num_frames)
    templates = {}
    for name, motion in MOTIONS.items():
        poses = np.array([motion(step) for step in steps])
        ways = [(across, down) for across in (0.1, 0.2, 0.35) for down in (0.25, 0.33)]
        templates[name] = np.stack(
            [np.stack([poses[:, 0] * x, poses[:, 1] * y, 0.7 * size * poses[:, 3]], 1) for x, y in ways]
        )
    return templates


def test_motions_of_the_drawn_world_are_told_apart():
    by_count: dict[int, tuple[list, list]] = {}
    for number in range(60):
        clip = draw_clip(5, number, split="eval", height=64, width=64, num_frames=9)
        paths, said = by_count.setdefault(len(clip.subjects), ([], []))
        paths += [path_of(masks) for masks in clip.frame_masks]
        said += clip.motions
    results = [motion_right(np.stack(paths), said, world_templates(9, n)) for n, (paths, said) in by_count.items()]
    for result in results:
        assert result.value > 0.9
        assert result.chance < 0.2
    shuffled = [
        motion_right(np.stack(p), said[1:] + said[:1], world_templates(9, n)) for n, (p, said) in by_count.items()
    ]
    assert max(result.value for result in shuffled) < 0.4
