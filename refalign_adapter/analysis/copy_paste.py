"""Are references pasted, pose and all, rather than understood? Likeness to the very picture, and its angle again.

Shape letters: S subjects, K other views, H and W height and width of a crop.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import numpy as np

from ..errors import UserError
from .bootstrap import bootstrap_interval
from .estimate import Estimate, mean, share, void
from .shapes import cluster_numbers, require_finite, require_shapes


def pasted(
    shown: np.ndarray, other_views: np.ndarray, clusters: Sequence | np.ndarray | None = None, *, seed: int = 0
) -> Estimate:
    """How much more alike subjects are to their reference as shown than to other views of the same subject.

    Args:
        shown: (S,) likeness to the picture that was given, such as `ncc`.
        other_views: (S, K) likeness, measured alike, to other views of the subject, which were not.
        clusters: (S,); None: each subject is one.
        seed: of the bootstrap.

    Returns:
        The mean of the differences; chance is 0: the picture given is one view among others.

    Raises:
        UserError: shapes that do not fit, no other view, or likeness that is not finite.
    """
    shown, other_views = np.asarray(shown, dtype=float), np.asarray(other_views, dtype=float)
    require_shapes("shown S, other_views S K", shown, other_views)
    if not other_views.shape[1]:
        raise UserError("other_views must have at least one column, got 0")
    return dataclasses.replace(mean(shown - other_views.mean(1), clusters, seed=seed), chance=0.0)


def ncc(crops: np.ndarray, references: np.ndarray, masks: np.ndarray) -> np.ndarray:
    """Normalised cross-correlation of pictures inside masks, for crops on the references' grid.

    The mean of each channel inside the mask is removed: two subjects of one colour are not alike for that.

    Args:
        crops, references: (S, H, W, 3).
        masks: (S, H, W) bool, where the subject is, in both.

    Returns:
        (S,) in [-1, 1]; NaN where a mask is empty or one of the pictures is flat.

    Raises:
        UserError: shapes that do not fit.
    """
    crops, references, masks = np.asarray(crops), np.asarray(references), np.asarray(masks, dtype=bool)
    require_shapes("crops S H W 3, references S H W 3, masks S H W", crops, references, masks)
    one, other = _centred(crops, masks), _centred(references, masks)
    products, norms = (one * other).sum(1), np.sqrt((one**2).sum(1) * (other**2).sum(1))
    return np.divide(products, norms, out=np.full(len(crops), np.nan), where=norms > 0)


def angle_slope(
    generated: np.ndarray, reference: np.ndarray, clusters: Sequence | np.ndarray | None = None, *, seed: int = 0
) -> Estimate:
    """Slope of generated angles on those in the references by least squares: 0 = none, 1 = pasted.

    Both are taken from their own mean direction, in (-pi, pi]. This needs references that are tilted this way and that
    around one direction; a slope of angles all around the circle means little.

    Args:
        generated, reference: (S,) radians; take out turns that the caption asks for.
        clusters: (S,); None: each subject is one.
        seed: of the bootstrap.

    Returns:
        The slope, chance 0; void where references are fewer than two or all at one angle.

    Raises:
        UserError: shapes that do not fit, or angles that are not finite.
    """
    generated, reference = np.asarray(generated, dtype=float), np.asarray(reference, dtype=float)
    require_shapes("generated S, reference S", generated, reference)
    require_finite("generated", generated)
    require_finite("reference", reference)
    owners = cluster_numbers(clusters, len(generated))
    x, y = _from_mean_direction(reference), _from_mean_direction(generated)
    if not len(x) or np.allclose(x, x[0]):
        return void(0.0)
    rows = np.stack([np.ones(len(x)), x, y, x * x, x * y], axis=1)
    low, high = bootstrap_interval(rows, owners, _slope, seed=seed)
    return Estimate(float(_slope(rows.sum(0))), low, high, len(x), 0.0)


def mirrored_alike(
    generated: np.ndarray, reference: np.ndarray, clusters: Sequence | np.ndarray | None = None, *, seed: int = 0
) -> Estimate:
    """Share of subjects that are mirrored as in their reference, or as there not; both (S,) bool, chance .5.

    Raises:
        UserError: shapes that do not fit.
    """
    generated, reference = np.asarray(generated, dtype=bool), np.asarray(reference, dtype=bool)
    require_shapes("generated S, reference S", generated, reference)
    return share(generated == reference, clusters, chance=0.5, seed=seed)


def _centred(pictures: np.ndarray, masks: np.ndarray) -> np.ndarray:
    """(S, H·W·3) without each channel's mean inside the mask; 0 outside."""
    inside = masks[..., None].astype(float)
    sums, areas = (pictures * inside).sum((1, 2), keepdims=True), inside.sum((1, 2), keepdims=True)
    return ((pictures - sums / np.maximum(areas, 1)) * inside).reshape(len(pictures), -1)


def _from_mean_direction(angles: np.ndarray) -> np.ndarray:
    direction = np.exp(1j * angles)
    return np.angle(direction * np.conj(direction.sum()))


def _slope(totals: np.ndarray) -> np.ndarray:
    """Of totals (..., 5): of ones, x, y, x², xy; NaN where all x are alike."""
    count, x, y, squares, products = np.moveaxis(totals, -1, 0)
    spread = squares - x * x / count
    alike = spread <= 1e-12 * np.maximum(squares, 1e-300)
    return np.where(alike, np.nan, (products - x * y / count) / np.where(alike, 1, spread))
