"""How a known subject stands in a picture: its angle and whether it is mirrored, by comparison with drawn views."""

from functools import lru_cache

import numpy as np

from .crops import canonical
from .motions import Pose
from .portraits import draw_portrait
from .subjects import Light, Subject

ANGLES = 36
SIZE = 96


def estimate_pose(
    crop: np.ndarray, mask: np.ndarray, subject: Subject, *, within: float = np.pi
) -> tuple[float, bool]:
    """The angle, in steps of 10 degrees, and the mirroring of the drawn view that is most alike.

    Args:
        crop, mask: float (side, side, 3) and bool (side, side), see `canonical`.
        subject: whose looks the drawn views have.
        within: the largest angle to either side, where it is known that the subject is not turned further: a blurred
            figure is easily taken for one upside down.
    """
    angles = 2 * np.pi * np.arange(ANGLES) / ANGLES
    angles = np.where(angles > np.pi, angles - 2 * np.pi, angles)
    weight = mask[..., None] * np.ones(3)
    alike = np.array([_correlation(crop, view, weight) for view in _views(subject, len(crop))])
    allowed = np.tile(np.abs(angles) <= within, 2)
    mirrored, step = divmod(int(np.where(allowed, alike, -np.inf).argmax()), ANGLES)
    return float(angles[step]), bool(mirrored)


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
