"""Pasted references against ones understood: likeness to the picture shown, its angle, its mirroring."""

import json

import numpy as np
import pytest
from scipy.ndimage import rotate
from scipy.stats import linregress, pearsonr

from refalign_adapter import ConfigError, UserError
from refalign_adapter.analysis.copy_paste import angle_slope, mirrored_alike, ncc, pasted


def pictures(count: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).random((count, 12, 10, 3))


def test_ncc_is_the_correlation_of_centred_pixels_inside_the_mask():
    crops, references = pictures(3), pictures(3, 1)
    masks = np.random.default_rng(2).random((3, 12, 10)) < 0.6
    for found, crop, reference, mask in zip(ncc(crops, references, masks), crops, references, masks, strict=True):
        one, other = crop[mask] - crop[mask].mean(0), reference[mask] - reference[mask].mean(0)
        assert found == pytest.approx(pearsonr(one.ravel(), other.ravel()).statistic)


def test_ncc_looks_at_structure_alone():
    crops = pictures(2)
    masks = np.zeros((2, 12, 10), dtype=bool)
    masks[:, 3:9, 2:8] = True
    brighter = np.where(masks[..., None], 2 * crops + [0.1, 0.3, 0.5], 0)
    np.testing.assert_allclose(ncc(crops, brighter, masks), 1)
    np.testing.assert_allclose(ncc(crops, 1 - crops, masks), -1)
    # uint8 as videos have it
    assert ncc((crops * 255).astype(np.uint8), (crops * 255).astype(np.uint8), masks) == pytest.approx([1, 1])
    flat = np.ones_like(crops)
    assert np.isnan(ncc(flat, crops, masks)).all()
    assert np.isnan(ncc(crops, crops, ~np.ones_like(masks))).all()


def test_a_pasted_subject_is_more_like_the_view_shown():
    shown = pictures(20)
    views = np.stack([rotate(shown, turn, axes=(1, 2), reshape=False, order=1) for turn in (40, 80, 120)], axis=1)
    masks = np.ones(shown.shape[:3], dtype=bool)
    to_views = lambda crops: np.stack([ncc(crops, views[:, k], masks) for k in range(3)], axis=1)  # noqa: E731
    result = pasted(ncc(shown, shown, masks), to_views(shown))
    assert result.value == pytest.approx(np.mean(1 - to_views(shown).mean(1)))
    assert 0.5 < result.low < result.value < result.high
    another = views[:, 0]  # the subject from another side: no more like the picture shown than like views
    assert pasted(ncc(another, shown, masks), to_views(another)).high < 0


def test_no_more_alike_than_other_views_is_zero():
    likeness = np.random.default_rng(0).normal(size=(300, 9))
    result = pasted(likeness[:, 0], likeness[:, 1:])
    assert result.low < 0 < result.high
    assert pasted(likeness[:0, 0], likeness[:0, 1:]).void
    with pytest.raises(ConfigError, match=r"other_views must be an array \(S = 300, K\)"):
        pasted(likeness[:, 0], likeness[1:])
    with pytest.raises(UserError, match="at least one column"):
        pasted(likeness[:, 0], likeness[:, :0])


def test_angle_slope_is_that_of_least_squares():
    generator = np.random.default_rng(0)
    reference = generator.uniform(-0.6, 0.6, 400)
    generated = 0.4 * reference + generator.normal(0, 0.2, 400)
    expected = linregress(reference, generated)
    result = angle_slope(generated, reference)
    assert result.value == pytest.approx(expected.slope, abs=1e-9)
    assert (result.low, result.high) == pytest.approx(
        (expected.slope - 1.96 * expected.stderr, expected.slope + 1.96 * expected.stderr), abs=0.015
    )


def test_angles_wrap():
    reference = np.random.default_rng(0).uniform(-0.6, 0.6, 50)
    turned = (reference + np.pi) % (2 * np.pi)  # half a turn on: around the seam
    assert angle_slope(turned - np.pi * 2, reference).value == pytest.approx(1)
    assert angle_slope(reference + 2 * np.pi, turned).value == pytest.approx(1)


@pytest.mark.parametrize("reach", [0.25, np.pi])  # as subjects of the world are tilted, and all around
def test_angles_that_have_nothing_to_do_with_the_reference(reach):
    generator = np.random.default_rng(3)
    found = [
        angle_slope(generator.uniform(-reach, reach, 100), generator.uniform(-0.6, 0.6, 100), seed=seed)
        for seed in range(100)
    ]
    assert np.mean([result.value for result in found]) == pytest.approx(0, abs=0.1 * reach)
    assert 88 <= sum(result.low < 0 < result.high for result in found) <= 99  # of 95 expected


def test_references_at_one_angle_have_no_slope():
    assert angle_slope(np.arange(4.0), np.full(4, 0.3)).void
    assert angle_slope(np.zeros(0), np.zeros(0)).void
    few = angle_slope(np.array([0.1, 0.2, 0.3]), np.array([0.1, 0.2, 0.3]))  # some resamples have one angle only
    assert (few.low, few.high) == pytest.approx((1, 1))
    json.dumps(few.to_dict(), allow_nan=False)
    with pytest.raises(UserError, match="generated must be finite, got 1 of 2"):
        angle_slope(np.array([0, np.nan]), np.zeros(2))


def test_mirrored_alike():
    reference = np.arange(40) % 2 == 0
    assert mirrored_alike(reference, reference).value == 1
    half = mirrored_alike(np.arange(40) < 20, reference)
    assert half.value == half.chance == 0.5
