"""`read_images`: a folder, a file or a list of files, as `reference_images` takes them."""

import numpy as np
import pytest
from PIL import Image

import refalign_adapter as ra


@pytest.fixture
def folder(tmp_path):
    """Three pictures of different colours and sizes, and files that are none."""
    Image.new("RGB", (6, 4), (255, 0, 0)).save(tmp_path / "b.png")
    Image.new("RGB", (4, 6), (0, 0, 255)).save(tmp_path / "a.PNG")
    Image.new("RGBA", (3, 3), (0, 0, 0, 0)).save(tmp_path / "c.webp", lossless=True)
    (tmp_path / "notes.txt").write_text("none")
    return tmp_path


def described(images):
    assert all(image.mode == "RGB" for image in images)
    return [(image.size, tuple(np.asarray(image)[0, 0].tolist())) for image in images]


BLUE, RED, WHITE = ((4, 6), (0, 0, 255)), ((6, 4), (255, 0, 0)), ((3, 3), (255, 255, 255))


def test_a_folder_by_name_transparency_on_white(folder):
    assert described(ra.read_images(folder)) == [BLUE, RED, WHITE]
    assert described(ra.read_images(str(folder))) == [BLUE, RED, WHITE]


def test_a_file_and_a_list_in_its_order(folder):
    assert described(ra.read_images(folder / "b.png")) == [RED]
    assert described(ra.read_images([folder / "b.png", str(folder / "a.PNG")])) == [RED, BLUE]
    assert ra.read_images([]) == []


def test_a_picture_is_what_a_pipeline_reads_from_its_path(folder):
    from refalign_adapter.pipelines.references import to_image

    (image,) = ra.read_images(folder / "c.webp")
    assert np.array_equal(np.asarray(image), np.asarray(to_image(str(folder / "c.webp"))))


@pytest.mark.parametrize(
    ("source", "line"),
    [
        ("nowhere", "images: '{}/nowhere' does not exist"),
        ("notes.txt", "images: cannot read '{}/notes.txt' (no image that can be read; "),
        (["b.png", "nowhere.png"], "images[1]: '{}/nowhere.png' does not exist"),
        ("empty", "images: '{}/empty' has no picture (.png, .jpg, "),
    ],
)
def test_what_is_no_picture_is_told_in_one_line(folder, source, line):
    (folder / "empty").mkdir()
    given = [folder / name for name in source] if isinstance(source, list) else folder / source
    with pytest.raises(ra.UserError) as caught:
        ra.read_images(given)
    assert str(caught.value).startswith(line.format(folder))
    assert len(str(caught.value).splitlines()) == 1


@pytest.mark.parametrize("source", [None, 3, [Image.new("RGB", (2, 2))]])
def test_another_type_is_told(source):
    with pytest.raises(ra.UserError, match="^images: expected a folder, a file or a list of files, got "):
        ra.read_images(source)
