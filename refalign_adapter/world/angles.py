"""How a known subject stands in a picture: its angle and whether it is mirrored, by comparison with drawn views."""

from functools import lru_cache

import numpy as np

from .crops import canonical
from .motions import Pose
from .portraits import draw_portrait
from .subjects import Light, Subject

ANGLES = 36
SIZE = 96


def estimate_pose(crop: np.ndarray, mask: np.ndarray, subject: Subject) -> tuple[float, bool]:
    """The angle in (-pi, pi], in steps of 10 degrees, and the mirroring of the drawn view that is most alike.

    Args:
        crop, mask: float (side, side, 3) and bool (side, side), see `canonical`.
        subject: whose looks the drawn views have.
    """
    views = _views(subject, len(crop))
    weight = mask[..., None] * np.ones(3)
    alike = [_correlation(crop, view, weight) for view in views]
    mirrored, step = divmod(int(np.argmax(alike)), ANGLES)
    angle = 2 * np.pi * step / ANGLES
    return (angle if angle <= np.pi else angle - 2 * np.pi), bool(mirrored)


def _correlation(first: np.ndarray, second: np.ndarray, weight: np.ndarray) -> float:
    """Pearson's, weighted, all channels together."""
    total = weight.sum()
    first, second = (item - (weight * item).sum() / total for item in (first, second))
    norm = np.sqrt((weight * first**2).sum() * (weight * second**2).sum())
    return float((weight * first * second).sum() / norm) if norm > 0 else 0.0


@lru_cache(maxsize=256)
def _views(subject: Subject, side: int) -> list[np.ndarray]:
    """All angles upright, then all mirrored."""
    views = []
    for mirrored in (False, True):
        for step in range(ANGLES):
            pose = Pose(0.5, 0.5, 0.6, 2 * np.pi * step / ANGLES, mirrored=mirrored)
            portrait = draw_portrait(subject, pose, Light(), SIZE, SIZE)
            views.append(canonical(np.asarray(portrait.image), np.asarray(portrait.mask) > 0, side)[0])
    return views
