"""References out of a video's frames, masks as run lengths, segments and crops, and the cache's keys of all that."""

import numpy as np
import pytest
import tiny_data
from PIL import Image

from refalign_adapter.data.cache.facts import Facts, parts_of
from refalign_adapter.data.sources import pictures
from refalign_adapter.data.sources.masks import decode_mask, encode_mask, mask_areas, mask_overlaps
from refalign_adapter.data.sources.pictures import (
    augmentation_key,
    draw_reference,
    open_picture,
    open_pictures,
    reference_facts,
)
from refalign_adapter.data.sources.rows import Reference, Row, RunLengthMask
from refalign_adapter.errors import UserError
from refalign_adapter.media.video import count_frames, read_frame, read_video
from refalign_adapter.media.video_file import write_video

FACTS = Facts(video={}, references={}, text={}, targets={}, augmentation=None)


@pytest.fixture(scope="module")
def steps(tmp_path_factory):
    """A clip of 10 frames; frame i is grey 20 i on its left half and white on its right half."""
    frames = np.full((10, 32, 64, 3), 255, np.uint8)
    for number in range(10):
        frames[number, :, :32] = 20 * number
    path = tmp_path_factory.mktemp("steps") / "a.mp4"
    write_video(path, frames, fps=8)
    return path


def near(image, value):
    return np.abs(np.asarray(image, float) - value).mean() < 3


def test_a_frame_is_found_by_number_and_by_share(steps):
    assert count_frames(steps) == 10
    for frame, number in ((0, 0), (7, 7), (0.0, 0), (0.35, 3), (0.999, 9), (1.0, 9)):
        image = read_frame(steps, frame, crop=(0, 0, 32, 32))
        assert image.size == (32, 32)
        assert near(image, 20 * number)
    assert read_frame(steps, 0).size == (64, 32)
    for frame in (10, -1):
        with pytest.raises(UserError, match=f"has no frame {frame}"):
            read_frame(steps, frame)


def test_a_segment_and_a_crop_are_all_that_is_read(steps):
    size = {"height": 16, "width": 16, "crop": (0, 0, 32, 32)}
    frames = read_video(steps, num_frames=4, segment=(3, 7), **size)
    assert all(near(frame, 20 * number) for frame, number in zip(frames, (3, 4, 5, 6), strict=True))
    every_second = read_video(steps, num_frames=2, segment=(3, 7), fps=4, **size)
    assert all(near(frame, 20 * number) for frame, number in zip(every_second, (3, 5), strict=True))
    with pytest.raises(UserError, match="too short: 4 frames, 5 are needed"):
        read_video(steps, num_frames=5, segment=(3, 7), **size)
    with pytest.raises(UserError, match=r"crop \[0, 0, 65, 32\] leaves the 64x32 frames"):
        read_video(steps, num_frames=1, height=16, width=16, crop=(0, 0, 65, 32))


def test_a_crop_is_covered_without_stretching(tmp_path):
    frame = np.zeros((48, 64, 3), np.uint8)
    frame[8:40, 16:48] = 255  # a square in what is not cut off
    write_video(tmp_path / "a.mp4", frame[None], fps=8)
    (out,) = read_video(tmp_path / "a.mp4", num_frames=1, height=48, width=48, crop=(8, 0, 56, 48))
    bright = out.mean(-1) > 128
    assert abs(int(bright.any(0).sum()) - int(bright.any(1).sum())) <= 1


def test_run_lengths_are_pixels():
    first, second = np.zeros((2, 6, 8), bool)
    first[1:5, 2:6] = True
    second[3:5, 2:8] = True
    masks = [encode_mask(mask) for mask in (first, second)]
    assert [(mask.height, mask.width) for mask in masks] == [(6, 8)] * 2
    assert all(np.array_equal(decode_mask(code), mask) for code, mask in zip(masks, (first, second), strict=True))
    assert mask_areas(masks) == [16, 12]
    union = (first | second).sum()
    np.testing.assert_allclose(mask_overlaps(masks), [[1, 8 / union], [8 / union, 1]])
    assert mask_areas([]) == []
    assert mask_overlaps([]).shape == (0, 0)


def test_a_reference_is_cropped_before_it_is_masked(steps):
    mask = np.zeros((16, 24), bool)
    mask[4:12, 2:10] = True
    reference = Reference(steps, frame=4, crop=(20, 8, 44, 24), rle=encode_mask(mask))
    picture = open_picture(reference)
    assert picture.image.size == (24, 16)
    assert np.array_equal(picture.mask, mask)
    canvas = np.asarray(draw_reference(reference, picture, height=32, width=32))
    assert np.abs(canvas[4:-4, 4:-4] - 80.0).max() < 12  # grey of frame 4, as the mask is left of column 32
    wrong = Reference(steps, frame=4, rle=encode_mask(mask))
    with pytest.raises(UserError, match=r"a\.mp4' frame 4: mask: 24x16 pixels do not match the image's 64x32"):
        draw_reference(wrong, open_picture(wrong), height=32, width=32)


def test_a_box_on_a_scaled_picture(tmp_path):
    pixels = np.zeros((100, 200, 3), np.uint8)
    pixels[40:60, 100:120] = (255, 0, 0)
    Image.fromarray(pixels).save(tmp_path / "a.png")
    reference = Reference(tmp_path / "a.png", box=(50, 20, 60, 30), long_side=100)
    picture = open_picture(reference)
    assert picture.image.size == (100, 50)
    middle = np.asarray(draw_reference(reference, picture, height=16, width=16))[4:-4, 4:-4]
    assert middle[..., 0].min() > 200
    assert middle[..., 1:].max() < 50
    assert open_picture(Reference(tmp_path / "a.png", long_side=300)).image.size == (200, 100)


def test_run_lengths_that_do_not_fit_are_refused(tmp_path):
    with pytest.raises(UserError, match="mask: the run lengths do not fit 8x6 pixels"):
        decode_mask(RunLengthMask(6, 8, encode_mask(np.ones((40, 40), bool)).counts))


def test_keys_depend_on_segment_crop_and_frame_and_stay_what_they_were_without(steps, tmp_path):
    tiny_data.write_reference(tmp_path / "a.png")
    plain = Reference(tmp_path / "a.png", box=(0, 1, 2, 3))
    assert set(reference_facts(plain)) == {"image", "mask", "box"}
    assert augmentation_key(reference_facts(plain)) == reference_facts(plain)["image"]
    mask = encode_mask(np.ones((2, 2), bool))
    frames = [
        Reference(steps, frame=1),
        Reference(steps, frame=2),
        Reference(steps, frame=1.0),
        Reference(steps, frame=1, crop=(0, 0, 2, 2)),
        Reference(steps, frame=1, rle=mask),
        Reference(steps, frame=1, long_side=20),
    ]
    rows = [Row("a", steps, "a", (reference,)) for reference in [plain, *frames]]
    assert len({parts_of(row, FACTS).references for row in rows}) == len(rows)
    assert len({augmentation_key(reference_facts(item)) for item in frames}) == len(frames)
    cuts = [{}, {"segment": (0, 5)}, {"segment": (1, 5)}, {"crop": (0, 0, 8, 8)}]
    assert len({parts_of(Row("a", steps, "a", (plain,), **cut), FACTS).video for cut in cuts}) == 4


def test_part_keys_of_plain_rows_are_those_of_earlier_versions(tmp_path):
    for name, content in {"a.mp4": b"clip", "a.png": b"image", "b.png": b"mask"}.items():
        (tmp_path / name).write_bytes(content)
    reference = Reference(tmp_path / "a.png", mask=tmp_path / "b.png", box=(0, 1, 2, 3))
    parts = parts_of(Row("a.mp4", tmp_path / "a.mp4", "a", (reference,)), FACTS)
    assert (parts.video, parts.references) == ("cc58b6cce4611898ddb58d9d2860b17b", "39dcb50fdff0525a9e73dc2a95343498")


def test_a_frame_that_several_references_are_cut_from_is_decoded_once(tmp_path, monkeypatch):
    tiny_data.write_clip(tmp_path / "clip.mp4", frames=5, height=32, width=48)
    boxes = [(0.0, 0.0, 10.0, 10.0), (8.0, 8.0, 30.0, 30.0)]
    references = [Reference(tmp_path / "clip.mp4", box=box, frame=3) for box in boxes]
    references.append(Reference(tmp_path / "clip.mp4", box=boxes[0], frame=2))
    alone = [open_picture(reference) for reference in references]
    read = []
    monkeypatch.setattr(pictures, "read_frame", lambda *args, **crop: read.append(args) or read_frame(*args, **crop))
    together = list(open_pictures(references))
    assert [frame for _, frame in read] == [3, 2]
    for picture, expected in zip(together, alone, strict=True):
        assert picture.box == expected.box
        assert np.array_equal(np.asarray(picture.image), np.asarray(expected.image))
