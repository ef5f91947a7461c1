"""References on their canvas: geometry against closed forms, and what augmentation may and may not do."""

import numpy as np
import pytest
from PIL import Image

from refalign_adapter.errors import UserError
from refalign_adapter.media.canvas import (
    AUGMENTATION,
    AugmentationRanges,
    augment_reference,
    content_tokens,
    cut_out,
    place_on_canvas,
    prepare_reference,
    reference_size,
)

STILL = AugmentationRanges(0, (1.0, 1.0), 0, 0, 0, 0, 0, 0, 0, 0)


def scene(height=60, width=80, box=(20, 10, 60, 30)):
    """A black rectangle `box` on grey, and its mask."""
    pixels, mask = np.full((height, width, 3), 128, np.uint8), np.zeros((height, width), bool)
    left, top, right, bottom = box
    pixels[top:bottom, left:right], mask[top:bottom, left:right] = 0, True
    return Image.fromarray(pixels), mask


def extent(canvas, below=64):
    """(left, top, right, bottom) of the dark pixels."""
    dark = np.asarray(canvas)[..., 0] < below
    rows, columns = np.flatnonzero(dark.any(1)), np.flatnonzero(dark.any(0))
    return columns[0], rows[0], columns[-1] + 1, rows[-1] + 1


@pytest.mark.parametrize(
    ("height", "width", "expected"),
    [
        (64, 64, (0, 16, 64, 48)),  # 40 x 20 grows by 1.6 to 64 x 32
        (16, 96, (32, 0, 64, 16)),  # shrinks by 0.8 to 32 x 16
        (90, 40, (0, 35, 40, 55)),  # fits as it is
    ],
)
def test_a_masked_subject_is_cropped_fitted_and_centred_on_white(height, width, expected):
    image, mask = scene()
    canvas = prepare_reference(image, height=height, width=width, mask=mask)
    assert canvas.size == (width, height)
    left, top, right, bottom = expected
    wanted = np.full((height, width, 3), 255)
    wanted[top:bottom, left:right] = 0
    assert np.array_equal(np.asarray(canvas), wanted)


def test_a_box_crops_and_is_rounded_outwards_and_clipped():
    image, _ = scene()
    by_box = prepare_reference(image, height=20, width=40, box=(20.4, 10.0, 59.2, 29.5))
    assert np.asarray(by_box).max() == 0
    beyond = cut_out(image, mask=None, box=(-5, 50, 500, 500))
    assert beyond.size == (80, 10)


def test_a_box_narrows_a_mask():
    image, mask = scene()
    assert cut_out(image, mask=mask, box=(30, 0, 80, 60)).size == (30, 20)


def test_the_background_inside_the_crop_stays_only_when_asked():
    image, mask = scene()
    mask[12:16, 30:40] = False
    image.paste((128, 128, 128), (30, 12, 40, 16))
    dropped = np.asarray(prepare_reference(image, height=20, width=40, mask=mask))
    kept = np.asarray(prepare_reference(image, height=20, width=40, mask=mask, keep_background=True))
    assert (dropped[2:6, 10:20] == 255).all()
    assert (kept[2:6, 10:20] == 128).all()
    assert np.array_equal(np.delete(dropped, slice(2, 6), 0), np.delete(kept, slice(2, 6), 0))


def test_dropped_colours_do_not_bleed_into_the_edge_when_it_is_scaled():
    image, mask = scene()
    red = np.asarray(image).copy()
    red[~mask] = (255, 0, 0)
    ellipse = ((np.mgrid[0:60, 0:80] - np.array([20, 40])[:, None, None]) / np.array([10, 20])[:, None, None]) ** 2
    canvas = np.asarray(prepare_reference(Image.fromarray(red), height=97, width=131, mask=ellipse.sum(0) < 1), int)
    assert np.ptp(canvas, axis=-1).max() == 0  # black, white and greys between, no red


def test_a_whole_image_is_padded_and_not_stretched():
    canvas = np.asarray(prepare_reference(Image.new("RGB", (50, 100)), height=40, width=60))
    assert extent(canvas) == (20, 0, 40, 40)


@pytest.mark.parametrize(
    ("options", "problem"),
    [
        ({"mask": np.ones((5, 5), bool)}, "mask: 5x5 pixels do not match the image's 80x60"),
        ({"mask": np.zeros((60, 80), bool)}, "mask: marks nothing"),
        ({"box": (80, 0, 90, 10)}, "box: .* has no pixel"),
    ],
)
def test_masks_and_boxes_that_do_not_fit_are_refused(options, problem):
    with pytest.raises(UserError, match=problem):
        prepare_reference(scene()[0], height=16, width=16, **options)


def augmented(seed, ranges=AUGMENTATION, size=(96, 96)):
    image, mask = scene()
    subject = augment_reference(
        cut_out(image, mask=mask, box=None), seed, height=size[0], width=size[1], ranges=ranges
    )
    return place_on_canvas(subject, *size)


def test_a_seed_decides_the_augmentation():
    image, mask = scene()
    draw = lambda seed: np.asarray(  # noqa: E731
        prepare_reference(image, height=48, width=64, mask=mask, augmentation_seed=seed)
    )
    assert np.array_equal(draw(1), draw(1))
    assert len({draw(seed).tobytes() for seed in range(8)}) == 8
    np.random.seed(5)
    expected = np.random.random()
    np.random.seed(5)
    draw(3)
    assert np.random.random() == expected


def test_an_augmentation_without_ranges_changes_nothing():
    image, mask = scene()
    plain = prepare_reference(image, height=96, width=96, mask=mask)
    assert np.abs(np.asarray(augmented(0, STILL), int) - np.asarray(plain, int)).max() <= 1


def moments(canvas):
    """Area, centre (x, y) and covariance of the darkness."""
    weight = 1 - np.asarray(canvas)[..., 0] / 255
    rows, columns = np.mgrid[0 : weight.shape[0], 0 : weight.shape[1]]
    points = np.stack([columns.ravel() + 0.5, rows.ravel() + 0.5])
    centre = points @ weight.ravel() / weight.sum()
    return weight.sum(), centre, np.cov(points, aweights=weight.ravel())


def change(**ranges):
    return AugmentationRanges(**{**vars(STILL), **ranges})


def test_the_scale_is_a_share_of_the_size_that_fits():
    for seed in range(5):
        area, centre, _ = moments(augmented(seed, change(scale=(0.5, 0.9)), (120, 200)))
        share = np.sqrt(area / (200 * 100))  # 40 x 20 fits as 200 x 100
        assert 0.48 < share < 0.92
        assert np.abs(centre - (100, 60)).max() < 1


@pytest.mark.parametrize("seed", range(4))
def test_rotation_turns_and_keeps_the_shape(seed):
    _, _, covariance = moments(augmented(seed, change(rotation=30)))
    values, vectors = np.linalg.eigh(covariance)
    angle = np.degrees(np.arctan2(vectors[1, 1], vectors[0, 1]))
    assert min(abs(angle), 180 - abs(angle)) < 31
    assert np.sqrt(values[1] / values[0]) == pytest.approx(2, rel=0.06)  # 40 x 20


def test_rotation_reaches_both_ways_over_its_range():
    angles = []
    for seed in range(30):
        _, _, covariance = moments(augmented(seed, change(rotation=30)))
        angles.append(np.degrees(np.arctan2(2 * covariance[0, 1], covariance[0, 0] - covariance[1, 1]) / 2))
    assert min(angles) < -15
    assert max(angles) > 15
    assert max(np.abs(angles)) < 31


def test_flip_mirrors_about_half_of_the_time():
    image, mask = scene()
    image.paste((250, 250, 250), (20, 10, 30, 30))  # the left quarter is bright
    subject = cut_out(image, mask=mask, box=None)
    flipped = 0
    for seed in range(40):
        ranges = change(flip=0.5)
        canvas = place_on_canvas(augment_reference(subject, seed, height=20, width=40, ranges=ranges), 20, 40)
        row = np.asarray(canvas)[10, :, 0]
        assert (row[2] > 200) != (row[-3] > 200)
        flipped += row[-3] > 200
    assert 10 <= flipped <= 30


@pytest.mark.parametrize("seed", range(6))
def test_no_part_of_the_subject_is_lost(seed):
    image, mask = scene()
    subject = augment_reference(cut_out(image, mask=mask, box=None), seed, height=96, width=96, ranges=AUGMENTATION)
    alpha = np.asarray(subject.getchannel("A")) / 255
    shear = np.tan(np.deg2rad(AUGMENTATION.shear)) ** 2
    # Rotation keeps the area, shears change it by at most tan(x) · tan(y).
    assert alpha.sum() == pytest.approx(40 * 20, rel=shear + 0.03)


@pytest.mark.parametrize("seed", range(6))
def test_colours_change_within_bounds_and_white_stays_white(seed):
    pixels = np.random.default_rng(0).integers(60, 200, (20, 40, 3)).astype(np.uint8)
    image = Image.fromarray(pixels)
    ranges = change(brightness=0.2, contrast=0.2, saturation=0.2, hue=0.02)
    subject = augment_reference(cut_out(image, mask=None, box=None), seed, height=60, width=40, ranges=ranges)
    canvas = np.asarray(place_on_canvas(subject, 60, 40), int)
    assert (canvas[:20] == 255).all()
    assert (canvas[40:] == 255).all()
    changed = canvas[20:40] - pixels.astype(int)
    assert 1 < np.abs(changed).mean() < 60
    ratio = canvas[20:40].mean() / pixels.mean()
    assert 0.78 < ratio < 1.22


def test_blur_smooths_by_a_share_of_the_canvas():
    noise = Image.fromarray(np.random.default_rng(0).integers(0, 256, (100, 100, 3), np.uint8))
    subject = cut_out(noise, mask=None, box=None)
    spread = [
        np.asarray(
            augment_reference(subject, seed, height=400, width=400, ranges=change(blur=1, blur_radius=2)), float
        )
        for seed in range(6)
    ]
    plain = np.asarray(noise, float).std()
    contrast = np.array([image[20:-20, 20:-20, :3].std() / plain for image in spread])
    assert (contrast < 1).all()
    assert contrast.min() < 0.4  # a Gaussian of 2 pixels leaves about 1 / (2 · 2 · √π) = 0.14 of noise
    assert np.ptp(contrast) > 0.2


def test_without_a_mask_white_margins_are_cut_off_as_a_mask_would():
    picture = np.full((60, 80, 3), 255, np.uint8)
    picture[20:40, 10:30] = np.random.default_rng(0).integers(0, 200, (20, 20, 3))
    picture[29:31, 19:21] = 255  # white inside the subject stays
    picture[0, 0] = 252  # what JPEG makes of white
    mask = np.zeros((60, 80), bool)
    mask[20:40, 10:30] = True
    size = {"height": 32, "width": 48}
    trimmed = prepare_reference(Image.fromarray(picture), **size)
    masked = prepare_reference(Image.fromarray(picture), mask=mask, **size)
    assert np.array_equal(np.asarray(trimmed), np.asarray(masked))
    assert (np.asarray(trimmed)[:, 8:40] < 250).any(-1).mean() > 0.9


def test_an_image_that_is_white_all_over_stays_white():
    white = Image.new("RGB", (20, 10), "white")
    assert (np.asarray(prepare_reference(white, height=16, width=16)) == 255).all()


@pytest.mark.parametrize(
    ("size", "scale", "multiples", "expected"),
    [
        ((480, 832), 1.0, (16, 16), (480, 832)),
        ((480, 832), 0.5, (16, 16), (240, 416)),
        ((480, 832), 0.3, (16, 16), (144, 256)),  # 144 and 249.6, of which 15.6 tokens
        ((720, 1280), 0.7, (32, 16), (512, 896)),  # 15.75 rows of tokens
        ((48, 64), 0.01, (16, 32), (16, 32)),
    ],
)
def test_the_canvas_is_a_share_of_the_videos_in_whole_tokens(size, scale, multiples, expected):
    assert reference_size(*size, scale, multiples) == expected


def test_a_token_counts_when_any_of_its_pixels_is_not_white():
    canvas = np.full((32, 48, 3), 255, np.uint8)
    canvas[0, 15, 2] = 254  # the last pixel of the first token's first row, and almost white
    canvas[16, 32:] = 0  # the first row of the last token
    expected = np.array([[True, False, False], [False, False, True]])
    assert np.array_equal(content_tokens(canvas, 2, 3), expected)
    assert np.array_equal(content_tokens(Image.fromarray(canvas), 2, 3), expected)
    assert np.array_equal(content_tokens(canvas, 1, 3), expected.any(0, keepdims=True))


def test_padding_around_a_subject_is_background_and_white_all_over_is_not():
    image, mask = scene()  # the subject is twice as wide as high
    canvas = prepare_reference(image, height=64, width=64, mask=mask)
    assert content_tokens(canvas, 4, 4)[:, 0].tolist() == [False, True, True, False]
    white = np.full((32, 48, 3), 255, np.uint8)
    assert content_tokens(white, 2, 3).all()


def test_a_canvas_that_cannot_be_cut_into_the_tokens_is_refused():
    with pytest.raises(UserError, match="a canvas of 48x32 pixels cannot be cut into 5x2 tokens"):
        content_tokens(np.zeros((32, 48, 3), np.uint8), 2, 5)
