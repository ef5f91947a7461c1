"""Pictures, masks and clips as people and strangers have them: read as they look, or refused in one line."""

import os
import struct
import subprocess
import sys

import av
import numpy as np
import pytest
from PIL import Image

from refalign_adapter.data.sources.masks import decode_mask
from refalign_adapter.data.sources.rows import RunLengthMask
from refalign_adapter.errors import UserError
from refalign_adapter.media.images import MAX_PIXELS, read_image, read_mask, read_mask_file
from refalign_adapter.media.video import probe_video, read_video
from refalign_adapter.media.video_file import write_video
from refalign_adapter.pipelines.references import to_image


def gradient(height=40, width=30):
    rows, columns = np.mgrid[0:height, 0:width]
    return np.stack([rows * 6, columns * 8, np.full_like(rows, 77)], -1).astype(np.uint8)


@pytest.mark.parametrize("form", ["PNG", "JPEG", "WEBP", "AVIF", "BMP", "GIF", "TIFF"])
def test_formats_are_told_by_content_whatever_the_name(tmp_path, form):
    if form == "AVIF" and "AVIF" not in Image.registered_extensions().values():
        pytest.skip("this Pillow has no AVIF")
    Image.fromarray(gradient()).save(tmp_path / "picture.xyz", format=form)
    read = np.asarray(read_image(tmp_path / "picture.xyz"), int)
    assert np.abs(read - gradient()).mean() < (12 if form in ("JPEG", "WEBP", "AVIF", "GIF") else 0.001)


REFUSED = {
    "eps.png": (b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n", "no image that can be read; PNG, JPEG"),
    "heic.jpg": (b"\0\0\0\x18ftypheic\0\0\0\0mif1heic", "HEIC, which is not read; convert it to JPEG or PNG"),
    "svg.png": (b"<svg xmlns='http://www.w3.org/2000/svg'/>", "no image that can be read"),
    "ppm.png": (b"P6 2 2 255\n" + bytes(12), "no image that can be read"),
    "empty.png": (b"", "no image that can be read"),
}


@pytest.mark.parametrize("name", REFUSED)
@pytest.mark.parametrize("read", [read_image, read_mask])
def test_other_formats_never_reach_another_program(tmp_path, name, read):
    content, message = REFUSED[name]
    (tmp_path / name).write_bytes(content)
    with pytest.raises(UserError, match=message) as told:
        read(tmp_path / name)
    assert len(str(told.value).splitlines()) == 1


def test_what_is_no_file_is_one_line(tmp_path):
    os.mkfifo(tmp_path / "pipe")
    for read in (read_image, read_mask, lambda path: read_video(path, num_frames=1, height=16, width=16)):
        for path, message in ((tmp_path / "pipe", "a pipe or device"), (tmp_path, "directory")):
            with pytest.raises(UserError, match=message):
                read(path)


@pytest.mark.parametrize(
    ("array", "message"),
    [
        (np.full((9, 9), 0.5, np.float32), "floating point values, whose range nobody says; save it with 8 or 16"),
        (np.full((9, 9), 70_000, np.int32), "values from 70000 to 70000, beyond 16 bits"),
        (np.full((9, 9), -1, np.int32), "values from -1 to -1, beyond 16 bits"),
    ],
)
def test_values_beyond_16_bits_are_refused_not_clipped(tmp_path, array, message):
    Image.fromarray(array).save(tmp_path / "a.tif")
    for read in (read_image, read_mask):
        with pytest.raises(UserError, match=message):
            read(tmp_path / "a.tif")
    with pytest.raises(UserError, match=message):
        to_image(Image.fromarray(array))


def test_grey_of_16_bits_is_what_it_looks_like_as_a_file_and_in_memory(tmp_path):
    values = np.linspace(0, 65535, 256, dtype=np.uint16).reshape(16, 16)
    image = Image.fromarray(values)
    image.save(tmp_path / "a.png")
    expected = np.arange(256).reshape(16, 16)
    for read in (read_image(tmp_path / "a.png"), to_image(image)):
        assert np.array_equal(np.asarray(read)[..., 0], expected)


def test_addresses_are_refused_and_home_is_expanded(tmp_path, monkeypatch):
    with pytest.raises(UserError, match="'https://a.org/b.png' is an address; download it"):
        to_image("https://a.org/b.png")
    monkeypatch.setenv("HOME", str(tmp_path))
    Image.fromarray(gradient()).save(tmp_path / "a.png")
    assert to_image("~/a.png").size == (30, 40)


def marks(height=20, width=16):
    mask = np.zeros((height, width), bool)
    mask[4:15, 3:12] = True
    return mask


def colours(mask, value, dtype=np.uint8):
    return (mask * value).astype(dtype)


def rgba(mask, inside=(255, 255, 255), outside=(255, 255, 255)):
    array = np.zeros((*mask.shape, 4), np.uint8)
    array[..., :3] = np.where(mask[..., None], inside, outside)
    array[..., 3] = mask * 255
    return Image.fromarray(array)


def palette(mask):
    image = Image.fromarray(mask.astype(np.uint8)).convert("P")
    image.putpalette([0, 0, 0, 128, 0, 0] + [0] * 750)  # as VOC paints its first class
    return image


def soft(mask):
    blurred = Image.fromarray(colours(mask, 255)).resize((160, 200), Image.Resampling.BICUBIC)
    return blurred


MASKS = {
    "0/255": (lambda mask: Image.fromarray(colours(mask, 255)), False),
    "0/1": (lambda mask: Image.fromarray(colours(mask, 1)), False),
    "1 bit": (lambda mask: Image.fromarray(mask), False),
    "16 bits, 0/1": (lambda mask: Image.fromarray(colours(mask, 1, np.uint16)), False),
    "16 bits": (lambda mask: Image.fromarray(colours(mask, 65535, np.uint16)), False),
    "colours": (lambda mask: Image.fromarray(np.stack([colours(mask, 255)] * 3, -1)), False),
    "palette": (palette, False),
    "alpha, white": (rgba, True),
    "alpha, black": (lambda mask: rgba(mask, (0, 0, 0), (0, 0, 0)), True),
    "alpha, a picture": (lambda mask: rgba(mask, (200, 90, 30), (0, 0, 0)), True),
    "opaque alpha": (lambda mask: Image.fromarray(colours(mask, 255)).convert("RGBA"), False),
    "grey with alpha": (lambda mask: rgba(mask).convert("LA"), True),
}


@pytest.mark.parametrize("kind", MASKS)
def test_masks_mark_what_they_look_like(tmp_path, kind):
    make, by_alpha = MASKS[kind]
    make(marks()).save(tmp_path / "mask.png")
    reading = read_mask_file(tmp_path / "mask.png")
    assert np.array_equal(reading.mask, marks())
    assert reading.by_alpha is by_alpha


def test_edges_are_no_labels(tmp_path):
    soft(marks()).save(tmp_path / "mask.png")
    mask = read_mask(tmp_path / "mask.png")
    assert abs(mask.mean() - marks().mean()) < 0.02


AMBIGUOUS = {
    "labels": (lambda: labels(1, 2, 3), r"has several labels \(1, 2, 3\), and none is said to be the subject"),
    "grey labels": (lambda: labels(50, 100, 250), r"has several labels \(50, 100, 250\)"),
    "16-bit labels": (lambda: labels(1, 2, 300, dtype=np.uint16), "has several labels"),
    "both": (lambda: both(), "marks one thing by its colours and another by its alpha"),
    "nothing": (lambda: Image.new("L", (20, 20)), "marks nothing; every pixel is black"),
}


def labels(*values, dtype=np.uint8):
    array = np.zeros((30, 30), dtype)
    for index, value in enumerate(values):
        array[2 + 9 * index : 10 + 9 * index, 3:27] = value
    return Image.fromarray(array)


def both():
    array = np.zeros((30, 30, 4), np.uint8)
    array[5:25, 5:25, 3] = 255
    array[5:15, 5:25, :3] = 255
    return Image.fromarray(array)


@pytest.mark.parametrize("kind", AMBIGUOUS)
def test_masks_that_can_be_read_in_two_ways_are_refused(tmp_path, kind):
    make, message = AMBIGUOUS[kind]
    make().save(tmp_path / "mask.png")
    with pytest.raises(UserError, match=message):
        read_mask(tmp_path / "mask.png")


@pytest.mark.parametrize("size", [(10**9, 10**9), (-5, 5), (0, 5)])
def test_run_lengths_take_no_memory_for_what_they_say(size):
    with pytest.raises(UserError, match="the run lengths do not fit"):
        decode_mask(RunLengthMask(*size, "1"))


# ru_maxrss would count what the process that started this one had in memory.
PEAK = """
import re, sys
from refalign_adapter.data.sources.pictures import open_picture, draw_reference
from refalign_adapter.data.sources.rows import Reference
from pathlib import Path
reference = Reference(Path(sys.argv[1]))
try:
    draw_reference(reference, open_picture(reference), height=96, width=96)
except ValueError as error:
    print(error)
print(int(re.search(r"VmHWM:\\s+(\\d+)", Path("/proc/self/status").read_text())[1]) // 1024)
"""


def test_a_picture_costs_memory_by_what_is_used_of_it(tmp_path):
    """Small files that unfold: one below the limit of pixels, one above it."""
    cases = {"below.png": (9_900, 9_900), "above.png": (13_000, 13_000)}
    for name, size in cases.items():
        Image.new("L", size, 200).save(tmp_path / name)
        assert (tmp_path / name).stat().st_size < 200_000
        command = [sys.executable, "-c", PEAK, str(tmp_path / name)]
        done = subprocess.run(command, capture_output=True, text=True, check=True, timeout=60)
        assert done.stderr == ""
        lines = done.stdout.splitlines()
        megabytes = float(lines[-1])
        assert megabytes < 800, name
        assert ("more than 100,000,000; scale it down" in lines[0]) == (np.prod(size) > MAX_PIXELS)


def large(mode):
    """9000x60 in stripes of black and white, so that a mean of two is grey."""
    stripes = np.where(np.mgrid[0:60, 0:9000][1] % 2, 255, 0).astype(np.uint8)
    if mode == "P":
        image = Image.fromarray(stripes // 255)
        image.putpalette([255, 255, 255, 0, 0, 0, 255, 0, 0])
        return image
    return (
        Image.fromarray(stripes.astype(np.uint16) * 257) if mode == "I;16" else Image.fromarray(stripes).convert(mode)
    )


@pytest.mark.parametrize("mode", ["1", "P", "L", "RGB", "I;16"])
def test_large_pictures_of_any_kind_are_made_smaller_and_stay_upright(tmp_path, mode):
    turned = Image.Exif()
    turned[0x0112] = 6
    large(mode).save(tmp_path / "a.png", exif=turned)
    image = read_image(tmp_path / "a.png")
    assert image.size == (30, 4500)
    assert all(abs(value - 128) <= 1 for value in image.getpixel((10, 2000)))
    assert read_image(tmp_path / "a.png", whole=True).size == (60, 9000)


def test_grey_of_16_bits_may_have_its_high_byte_first(tmp_path):
    entries = [
        (256, 3, 4),
        (257, 3, 4),
        (258, 3, 16),
        (259, 3, 1),
        (262, 3, 1),
        (273, 4, 110),
        (278, 3, 4),
        (279, 4, 32),
    ]
    head = b"MM\0*" + struct.pack(">IH", 8, len(entries))
    for tag, kind, value in entries:
        head += struct.pack(">HHI", tag, kind, 1) + (
            struct.pack(">HH", value, 0) if kind == 3 else struct.pack(">I", value)
        )
    (tmp_path / "a.tif").write_bytes(head + bytes(4) + struct.pack(">16H", *[0x7530] * 16))
    assert read_image(tmp_path / "a.tif").getpixel((1, 1)) == (117, 117, 117)
    assert read_mask(tmp_path / "a.tif").all()


def test_lab_colours_are_read_alike_as_picture_and_mask(tmp_path):
    image = Image.new("LAB", (8, 8), (255, 128, 128))
    image.paste((0, 128, 128), (0, 0, 4, 8))
    image.save(tmp_path / "a.tif")
    assert [read_image(tmp_path / "a.tif").getpixel((x, 0))[0] > 200 for x in (1, 6)] == [False, True]
    assert read_mask(tmp_path / "a.tif")[0].tolist() == [False] * 4 + [True] * 4


TURNS = {
    "upright": ((1, 0, 0, 1), lambda array: array),
    "mirrored": ((-1, 0, 0, 1), lambda array: array[:, ::-1]),
    "upside down, mirrored": ((1, 0, 0, -1), lambda array: array[::-1]),
    "half a turn": ((-1, 0, 0, -1), lambda array: array[::-1, ::-1]),
    "a quarter clockwise": ((0, 1, -1, 0), lambda array: np.rot90(array, -1)),
    "a quarter anticlockwise": ((0, -1, 1, 0), lambda array: np.rot90(array)),
    "over the diagonal": ((0, 1, 1, 0), lambda array: array.swapaxes(0, 1)),
    "over the other diagonal": ((0, -1, -1, 0), lambda array: np.rot90(array, 2).swapaxes(0, 1)),
}


@pytest.mark.parametrize("turn", TURNS)
def test_clips_are_shown_as_their_whole_display_matrix_says(tmp_path, turn):
    (a, b, c, d), expected = TURNS[turn]
    array = np.zeros((32, 64, 3), np.uint8)
    array[:16, :32] = (255, 0, 0)
    array[16:, :32] = (0, 255, 0)
    array[:16, 32:] = (0, 0, 255)
    write_video(tmp_path / "a.mp4", [array], 8)
    data = (tmp_path / "a.mp4").read_bytes()
    place, one = data.index(b"tkhd") + 4 + 40, 1 << 16
    matrix = struct.pack(">9i", a * one, b * one, 0, c * one, d * one, 0, 0, 0, 1 << 30)
    (tmp_path / "b.mp4").write_bytes(data[:place] + matrix + data[place + 36 :])
    shown = expected(array)
    facts = probe_video(tmp_path / "b.mp4")
    assert (facts.height, facts.width) == shown.shape[:2]
    frame = read_video(tmp_path / "b.mp4", num_frames=1, height=shown.shape[0], width=shown.shape[1])[0]
    assert np.abs(frame.astype(int) - shown).mean() < 12


def encode(path, codec, pix_fmt, frames, **attributes):
    with av.open(str(path), "w") as container:
        stream = container.add_stream(codec, rate=8)
        stream.height, stream.width, stream.pix_fmt = 32, 32, pix_fmt
        for name, value in attributes.items():
            setattr(stream.codec_context, name, value)
        for frame in frames:
            for name, value in attributes.items():
                if hasattr(frame, name):  # since PyAV 17; before, encoders go by their context alone
                    setattr(frame, name, value)
            container.mux(stream.encode(frame))
        container.mux(stream.encode())


@pytest.mark.parametrize(("transfer", "name"), [(16, "PQ"), (18, "HLG")])
def test_high_dynamic_range_is_refused_with_what_converts_it(tmp_path, transfer, name):
    frames = [av.VideoFrame.from_ndarray(np.full((32, 32, 3), 200, np.uint8), format="rgb24") for _ in range(3)]
    encode(tmp_path / "a.mp4", "libx264", "yuv420p", frames, color_trc=transfer)
    for read in (lambda path: read_video(path, num_frames=2, height=32, width=32), probe_video):
        with pytest.raises(UserError, match=rf"is high dynamic range \({name}\).* ffmpeg -i IN") as told:
            read(tmp_path / "a.mp4")
        assert len(str(told.value).splitlines()) == 1


def test_transparency_of_a_clip_is_white_and_hidden_colours_do_not_show(tmp_path):
    array = np.zeros((32, 32, 4), np.uint8)
    array[..., 0] = 255  # red, hidden but for the left half
    array[:, :16, 3] = 255
    encode(tmp_path / "a.mov", "png", "rgba", [av.VideoFrame.from_ndarray(array, format="rgba") for _ in range(3)])
    frame = read_video(tmp_path / "a.mov", num_frames=2, height=32, width=32)[1]
    assert np.array_equal(frame[4, 4], [255, 0, 0])
    assert np.array_equal(frame[4, 28], [255, 255, 255])


def test_a_clip_that_is_damaged_inside_is_refused(tmp_path):
    generator = np.random.default_rng(0)
    clip = [
        np.kron(generator.integers(0, 256, (12, 12, 3), np.uint8), np.ones((8, 8, 1), np.uint8)) for _ in range(24)
    ]
    write_video(tmp_path / "a.mp4", np.stack(clip), 8)
    data = (tmp_path / "a.mp4").read_bytes()
    start = data.index(b"mdat") + 4
    found = 0
    for seed in range(12):
        spoilt = bytearray(data)
        for place in np.random.default_rng(seed).integers(start + 2000, len(data) - 2000, 30):
            spoilt[place] ^= 0x55
        (tmp_path / "b.mp4").write_bytes(bytes(spoilt))
        try:
            frames = read_video(tmp_path / "b.mp4", num_frames=24, height=96, width=96)
        except UserError as error:
            found += len(str(error).splitlines()) == 1
        else:
            off = np.abs(frames.astype(int) - np.stack(clip)).mean((1, 2, 3))
            assert (off > 40).mean() < 0.5, "most frames are destroyed, and nothing was said"
    assert found >= 8
