"""The ways that the world's motions go, and which of several subjects of one kind does what the caption says first."""

from __future__ import annotations

from functools import lru_cache

import numpy as np

from ..analysis.motion import motion_distances
from .motions import MOTIONS, draw_paths
from .scenes import Clip

VARIANTS = 12
FILLED = 0.7
"""The square root of the share of its own square that a subject covers, about."""
UNSEEN = 1e3
"""Distance of a subject that was hardly seen to any motion."""


@lru_cache(maxsize=16)
def motion_templates(subjects: int, num_frames: int) -> dict[str, np.ndarray]:
    """Motion -> (variants, num_frames, 3): ways that subjects of clips of so many go, as `path_of` has them."""
    templates = {}
    for motion in MOTIONS:
        generator = np.random.default_rng(5)  # the same for all: what rolls goes as what slides
        ways = [path for _ in range(VARIANTS) for path in draw_paths(generator, [motion] * subjects, num_frames)]
        templates[motion] = np.array([[(pose.x, pose.y, FILLED * pose.size) for pose in way] for way in ways])
    return templates


def in_caption_order(paths: np.ndarray, clip: Clip) -> list[int]:
    """Places among paths (M, F, 3), as the judge gives them, of the clip's subjects in the caption's order.

    Subjects of one kind are dealt out so that all together go most nearly as the caption says; others stay.
    """
    from scipy.optimize import linear_sum_assignment

    kinds = [subject.kind for subject in clip.subjects]
    templates = motion_templates(len(kinds), paths.shape[1])
    distances = [motion_distances(path, templates) for path in paths]
    order = np.arange(len(kinds))
    for kind in set(kinds):
        places = np.array([place for place, other in enumerate(kinds) if other == kind])
        costs = [[distances[seen].get(clip.motions[said], UNSEEN) for seen in places] for said in places]
        said, seen = linear_sum_assignment(costs)
        order[places[said]] = places[seen]
    return order.tolist()
