"""Do subjects move as said? Paths of masks, and the nearest of the motions that there are.

Shape letters: S subjects, F frames, H and W height and width in pixels, V variants of a motion.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np

from ..errors import UserError
from .estimate import Estimate, chance_agreement, share
from .shapes import require_finite, require_shapes

SEEN_IN = 2
"""Frames in which a subject must be seen: one shows no motion."""


def path_of(masks: np.ndarray) -> np.ndarray:
    """Where a subject is and how large, from masks (F, H, W) bool: (F, 3) centre x, y and size.

    The centre is the mask's, x to the right as a share of the width and y down as one of the height; size is the
    square root of the share of the frame that the mask covers. NaN in frames where it is empty.

    Raises:
        UserError: another shape.
    """
    masks = np.asarray(masks, dtype=bool)
    require_shapes("masks F H W", masks)
    frames, height, width = masks.shape
    areas = masks.sum((1, 2))
    x = (masks.sum(1) * (np.arange(width) + 0.5)).sum(1) / width
    y = (masks.sum(2) * (np.arange(height) + 0.5)).sum(1) / height
    seen = areas > 0
    path = np.full((frames, 3), np.nan)
    path[seen, :2] = np.stack([x, y], axis=1)[seen] / areas[seen, None]
    path[seen, 2] = np.sqrt(areas[seen] / (height * width))
    return path


def motion_distances(path: np.ndarray, templates: Mapping[str, np.ndarray]) -> dict[str, float]:
    """How far a path is from each motion's, name -> distance; empty for a subject seen in fewer than `SEEN_IN` frames.

    Distance is the root mean square of the differences in x, y and size over the frames in which the subject is seen,
    each path's mean over those frames removed first: where a subject is and how large does not count, only how that
    changes.

    Args:
        path: (F, 3), see `path_of`; NaN in frames where the subject is not seen.
        templates: name -> (F, 3), or (V, F, 3) variants such as long and short ways, of which the nearest counts.
            Where they start does not matter.

    Raises:
        UserError: no templates, or shapes that do not fit.
    """
    if not templates:
        raise UserError("templates must name at least one motion, got none")
    path = np.asarray(path, dtype=float)
    seen = np.isfinite(path).all(-1)
    if seen.sum() < SEEN_IN:
        return {}
    return {name: _distance(path[seen], ways[:, seen]) for name, ways in _variants(path, templates).items()}


def nearest_motion(path: np.ndarray, templates: Mapping[str, np.ndarray]) -> str | None:
    """The motion whose path is nearest, see `motion_distances`: the first of those equally near; None for a subject
    that is hardly seen."""
    distances = motion_distances(path, templates)
    return min(distances, key=distances.__getitem__) if distances else None


def motion_right(
    paths: np.ndarray,
    said: Sequence[str],
    templates: Mapping[str, np.ndarray],
    clusters: Sequence | np.ndarray | None = None,
    *,
    seed: int = 0,
) -> Estimate:
    """Share of subjects whose nearest motion is the one that the caption says.

    Motions of the same path, such as rolling and sliding, count as one. A subject that is hardly seen is wrong.

    Args:
        paths: (S, F, 3), see `path_of`.
        said: S names of motions.
        templates: see `nearest_motion`.
        clusters: (S,) such as the video; None: each subject is one.
        seed: of the bootstrap.

    Returns:
        The share. Chance is that of the motions seen being dealt out to the subjects anew.

    Raises:
        UserError: shapes that do not fit, or a motion said that has no template.
    """
    paths = np.asarray(paths, dtype=float)
    require_shapes("paths S F 3, said S", paths, np.asarray(said))
    if unknown := sorted(set(said) - set(templates)):
        raise UserError(f"said must name motions among {', '.join(templates)}, got {', '.join(unknown)}")
    same = _same_paths(templates)
    asked = np.array([same[name] for name in said], dtype=str)
    nearest = [nearest_motion(path, templates) for path in paths]
    seen = np.array(["" if name is None else same[name] for name in nearest], dtype=str)
    return share(asked == seen, clusters, chance=chance_agreement(asked, seen), seed=seed)


def _variants(path: np.ndarray, templates: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
    """Name -> (V, F, 3)."""
    ways = {name: np.asarray(template, dtype=float) for name, template in templates.items()}
    ways = {name: way[None] if way.ndim == 2 else way for name, way in ways.items()}
    for name, way in ways.items():
        require_shapes("path F 3, template V F 3", path, way)
        require_finite(f"template {name!r}", way)
    return ways


def _distance(path: np.ndarray, ways: np.ndarray) -> float:
    """Of a path (F, 3) to the nearest way (V, F, 3)."""
    differences = (path - path.mean(0)) - (ways - ways.mean(1, keepdims=True))
    return float(np.sqrt((differences**2).mean((1, 2))).min())


def _same_paths(templates: Mapping[str, np.ndarray]) -> dict[str, str]:
    """Name -> the first name with the same path, its own where it is alone."""
    ways = {name: np.asarray(template, dtype=float) for name, template in templates.items()}
    ways = {name: way - way.mean(-2, keepdims=True) for name, way in ways.items()}
    return {name: next(first for first in ways if _alike(ways[first], way)) for name, way in ways.items()}


def _alike(one: np.ndarray, other: np.ndarray) -> bool:
    return one.shape == other.shape and np.allclose(one, other)
