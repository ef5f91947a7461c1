"""Every way of giving a reference is the same picture; what is none is told with its place."""

import numpy as np
import pytest
import torch
from PIL import Image
from tiny_adapter import picture

import refalign_adapter as ra
from refalign_adapter.pipelines.references import count_prompts, group_by_prompt, load_canvases, to_image


def test_all_kinds_of_input_are_the_same_picture(tmp_path):
    image = picture()
    image.save(tmp_path / "picture.png")
    array = np.asarray(image)
    tensor = torch.from_numpy(array.copy()).permute(2, 0, 1)
    kinds = [
        tmp_path / "picture.png",
        str(tmp_path / "picture.png"),
        image,
        array,
        array / 255,
        (array / 255).astype(np.float32),
        tensor,
        tensor / 255,
        (tensor / 255).double(),
    ]
    for kind in kinds:
        got = to_image(kind)
        assert got.mode == "RGB"
        assert np.array_equal(np.asarray(got), array)


@pytest.mark.parametrize("mode", ["L", "LA", "RGBA", "P", "CMYK", "1"])
def test_images_of_any_mode(mode):
    assert to_image(picture(mode=mode)).mode == "RGB"


def test_grey_arrays_and_tensors():
    grey = np.asarray(picture(mode="L"))
    expected = np.repeat(grey[:, :, None], 3, 2)
    assert np.array_equal(np.asarray(to_image(grey)), expected)
    assert np.array_equal(np.asarray(to_image(torch.from_numpy(grey.copy())[None])), expected)


def test_a_tensor_has_its_channels_first_even_where_it_could_be_read_otherwise():
    assert to_image(torch.ones(4, 6, 3)).size == (3, 6)


def test_transparency_is_laid_on_white():
    red = np.zeros((4, 4, 4), np.uint8)
    red[..., 0] = 255
    red[:2, :, 3] = 255
    for kind in (Image.fromarray(red), red, torch.from_numpy(red.copy()).permute(2, 0, 1)):
        got = np.asarray(to_image(kind))
        assert (got[:2] == [255, 0, 0]).all()
        assert (got[2:] == 255).all()


def test_a_turned_photo_is_put_upright():
    image = picture(size=(8, 4))
    exif = image.getexif()
    exif[0x0112] = 6  # the camera was held sideways
    image.info["exif"] = exif.tobytes()
    assert to_image(image).size == (4, 8)


def test_canvases_keep_the_aspect_and_are_white_around_it():
    loaded = load_canvases([[Image.new("RGB", (10, 10), "black")]], 32, 48)
    canvases, mask = loaded.pixels, loaded.mask
    assert loaded.tokens is None
    assert canvases.shape == (1, 1, 3, 32, 48)
    assert mask.tolist() == [[True]]
    assert (canvases[..., 8:40] == -1).all()
    assert (canvases[..., :8] == 1).all()
    assert (canvases[..., 40:] == 1).all()


def test_prompts_with_fewer_references_are_padded():
    loaded = load_canvases([[picture(0), picture(1)], [], [picture(1)]], 16, 16)
    canvases, mask = loaded.pixels, loaded.mask
    assert mask.tolist() == [[True, True], [False, False], [True, False]]
    assert torch.equal(canvases[0, 1], canvases[2, 0])
    assert (canvases[~mask] == 1).all()


def test_tokens_of_padding_are_marked():
    """Cases of two prompts on canvases of 2 x 4 tokens of 16 pixels."""
    square, wide = Image.new("RGB", (10, 10), "black"), Image.new("RGB", (20, 10), "black")
    loaded = load_canvases([[square, wide], [wide]], 32, 64, (2, 4))
    assert loaded.tokens is not None
    assert loaded.tokens[0, 0].tolist() == [[False, True, True, False]] * 2
    assert loaded.tokens[0, 1].all()
    assert not loaded.tokens[1, 1].any()


@pytest.mark.parametrize(
    ("groups", "leaves_out", "differ", "differ_in_tokens"),
    [
        ([["wide"]], False, False, False),
        ([["wide"], ["wide"]], False, False, False),
        ([["wide"], ["wide", "wide"]], False, True, True),
        ([["wide"], []], False, True, True),
        ([["square"]], True, False, False),
        ([["square"], ["wide"]], True, False, True),
        ([["square", "square"], ["wide"]], True, True, False),  # twice half a canvas is as much as a whole one
    ],
)
def test_when_references_need_a_mask(groups, leaves_out, differ, differ_in_tokens):
    images = {"square": Image.new("RGB", (10, 10), "black"), "wide": Image.new("RGB", (20, 10), "black")}
    groups = [[images[name] for name in group] for group in groups]
    whole, cut = load_canvases(groups, 32, 64), load_canvases(groups, 32, 64, (2, 4))
    assert (whole.leaves_out, whole.differ) == (False, differ)
    assert (cut.leaves_out, cut.differ) == (leaves_out, differ_in_tokens)


@pytest.mark.parametrize(
    ("images", "prompts"), [(None, 1), ("a.png", 1), (["a", "b"], 1), ([["a"], ["b", "c"]], 2), ([["a"], []], 2)]
)
def test_how_many_prompts_a_list_is_for(images, prompts):
    assert count_prompts(images) == prompts


@pytest.mark.parametrize("nothing", [None, [], [[]], [[], []], ()])
def test_no_references(nothing):
    assert group_by_prompt(nothing, 2, 8) is None


def test_one_image_needs_no_list():
    image = picture()
    assert group_by_prompt(image, 1, 8) == [[image]]
    assert group_by_prompt("a.png", 1, 8) == [["a.png"]]
    array = np.zeros((4, 4, 3))
    assert (group_by_prompt(array, 1, 8) or [])[0][0] is array


@pytest.mark.parametrize(
    ("images", "prompts", "message"),
    [
        (5, 1, "expected a list of images, got int"),
        (["a", "b"], 2, "2 prompts need 2 lists of images, one each, got one flat list"),
        ([["a"], ["b"]], 3, "3 prompts need 3 lists of images, one each, got 2 lists"),
        ([["a"], ["b"]], 1, "1 prompts? needs? 1 lists?"),
        ([["a"], "b"], 2, "got a mixture of both"),
        (
            ["a"] * 4,
            1,
            "reference_images: 4 references are too many, at most 3; leave some out, or raise .*max_references",
        ),
        ([["a"], ["a"] * 5], 2, r"reference_images\[1\]: 5 references are too many"),
    ],
)
def test_lists_that_do_not_fit_are_told(images, prompts, message):
    with pytest.raises(ra.UserError, match=message):
        group_by_prompt(images, prompts, 3)


@pytest.mark.parametrize(
    ("image", "message"),
    [
        ("missing.png", r"reference_images\[0\]: 'missing.png' does not exist"),
        (7, r"reference_images\[0\]: expected a path, PIL image, array or tensor, got int"),
        (np.zeros((2, 4, 4, 3), np.uint8), r"\[0\]: an array must be \(height, width, 3\), got \(2, 4, 4, 3\)"),
        (np.zeros((0, 4, 3), np.uint8), r"an array must be \(height, width, 3\)"),
        (np.full((4, 4, 3), 2.0), r"must be uint8 or floats in \[0, 1\], got float64 from 2.0 to 2.0"),
        (np.full((4, 4, 3), np.nan), r"must be uint8 or floats in \[0, 1\]"),
        (np.zeros((4, 4, 3), np.int64), r"must be uint8 or floats in \[0, 1\], got int64"),
        (torch.zeros(5, 4, 3), r"a tensor must be \(3, height, width\), got \(5, 4, 3\)"),
    ],
)
def test_what_is_no_image_is_told_with_its_place(image, message):
    with pytest.raises(ra.UserError, match=message):
        load_canvases([[image]], 16, 16)


def test_every_bad_image_is_told_at_once(tmp_path):
    (tmp_path / "empty.png").touch()
    (tmp_path / "text.png").write_text("no image")
    with pytest.raises(ra.ConfigError) as caught:
        load_canvases([[picture(), tmp_path / "empty.png"], [tmp_path / "text.png"]], 16, 16)
    assert [problem.split(":")[0] for problem in caught.value.problems] == [
        "reference_images[0][1]",
        "reference_images[1][0]",
    ]
