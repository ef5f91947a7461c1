"""Videos and images in and out: which frames, which pixels, which errors."""

import struct
from fractions import Fraction

import av
import numpy as np
import pytest
import torch
from PIL import Image

from refalign_adapter.errors import UserError
from refalign_adapter.media.canvas import cover
from refalign_adapter.media.images import read_image, read_mask
from refalign_adapter.media.video import read_video
from refalign_adapter.media.video_file import write_video


def write_greys(path, count, fps):
    """Frame i is grey 16 + 4 * i."""
    write_video(path, np.stack([np.full((16, 16, 3), 16 + 4 * step, np.uint8) for step in range(count)]), fps)


def greys(frames):
    return [round((float(frame.mean()) - 16) / 4) for frame in frames]


@pytest.mark.parametrize(
    ("source", "fps", "count"),
    [(24, 16, 32), (24, 16.0, 5), (8, 16, 15), (30, 7, 6), (29.97, 29.97, 40), (16, None, 9)],
)
def test_a_frame_is_the_one_on_screen_at_its_time(tmp_path, source, fps, count):
    write_greys(tmp_path / "a.mp4", 48, source)
    frames = read_video(tmp_path / "a.mp4", num_frames=count, height=16, width=16, fps=fps)
    assert frames.dtype == np.uint8
    assert frames.shape == (count, 16, 16, 3)
    step = source / fps if fps else 1
    assert greys(frames) == [int(index * step + 1e-6) for index in range(count)]


def test_a_video_that_starts_late_is_timed_from_its_first_frame(tmp_path):
    with av.open(str(tmp_path / "a.mp4"), "w") as container:
        stream = container.add_stream("libx264", rate=10)
        stream.width = stream.height = 16
        stream.pix_fmt = "yuv420p"
        for step in range(6):
            frame = av.VideoFrame.from_ndarray(np.full((16, 16, 3), 16 + 4 * step, np.uint8))
            frame.pts = 50 + step
            container.mux(stream.encode(frame))
        container.mux(stream.encode())
    assert greys(read_video(tmp_path / "a.mp4", num_frames=3, height=16, width=16, fps=5)) == [0, 2, 4]


def test_a_video_that_is_too_short_is_refused_with_its_numbers(tmp_path):
    write_greys(tmp_path / "a.mp4", 48, 24)
    size = {"height": 16, "width": 16}
    with pytest.raises(UserError, match="too short: 32 frames at 16 frames a second, 33 are needed"):
        read_video(tmp_path / "a.mp4", num_frames=33, fps=16, **size)
    with pytest.raises(UserError, match="too short: 48 frames, 49 are needed"):
        read_video(tmp_path / "a.mp4", num_frames=49, **size)


@pytest.mark.parametrize("size", [(40, 60), (60, 40), (33, 33), (120, 30)])
def test_cover_crops_the_centre_and_stretches_nothing(size):
    height, width = size
    rows, columns = np.mgrid[0:72, 0:96]
    image = Image.fromarray(np.stack([columns * 2, rows * 2, 0 * rows], -1).astype(np.uint8))
    result = np.asarray(cover(image, height, width)).astype(float)
    assert result.shape == (height, width, 3)
    scale = max(height / 72, width / 96)
    expected_x = ((np.arange(width) + 0.5 - width / 2) / scale + 48 - 0.5) * 2
    expected_y = ((np.arange(height) + 0.5 - height / 2) / scale + 36 - 0.5) * 2
    # Borders are left out: a resampling filter reaches beyond them.
    inside = slice(4, -4)
    assert np.abs(result[inside, inside, 0] - expected_x[inside]).max() < 1.5
    assert np.abs(result[inside, inside, 1] - expected_y[inside, None]).max() < 1.5


def disc(height, width, radius):
    rows, columns = np.mgrid[0:height, 0:width]
    inside = (rows - height / 2) ** 2 + (columns - width / 2) ** 2 < radius**2
    return np.where(inside[..., None], 255, 0).repeat(3, -1).astype(np.uint8)


def extent(frame):
    bright = frame[..., 0] > 127
    return np.ptp(np.flatnonzero(bright.any(1))) + 1, np.ptp(np.flatnonzero(bright.any(0))) + 1


@pytest.mark.parametrize("size", [(64, 64), (48, 96), (96, 48)])
def test_a_disc_stays_a_disc(tmp_path, size):
    write_video(tmp_path / "a.mp4", [disc(96, 160, 20)] * 2, 8)
    (frame, _) = read_video(tmp_path / "a.mp4", num_frames=2, height=size[0], width=size[1])
    down, across = extent(frame)
    assert abs(down - across) <= 1
    assert abs(down - 40 * max(size[0] / 96, size[1] / 160)) <= 2


def test_pixels_that_are_not_square_are_made_square(tmp_path):
    with av.open(str(tmp_path / "a.mp4"), "w") as container:
        stream = container.add_stream("libx264", rate=8)
        stream.width, stream.height, stream.pix_fmt = 96, 96, "yuv420p"
        stream.sample_aspect_ratio = Fraction(2)
        rows, columns = np.mgrid[0:96, 0:96]
        inside = (rows - 48) ** 2 + (2 * (columns - 48)) ** 2 < 30**2
        array = np.where(inside[..., None], 255, 0).repeat(3, -1).astype(np.uint8)
        container.mux(stream.encode(av.VideoFrame.from_ndarray(array)))
        container.mux(stream.encode())
    down, across = extent(read_video(tmp_path / "a.mp4", num_frames=1, height=96, width=96)[0])
    assert abs(down - across) <= 1
    assert abs(down - 60) <= 2


def test_a_video_marked_as_rotated_is_turned_upright(tmp_path):
    array = np.zeros((32, 64, 3), np.uint8)
    array[:, :16] = 255  # the left end becomes the top when turned clockwise
    write_video(tmp_path / "a.mp4", [array], 8)
    data = (tmp_path / "a.mp4").read_bytes()
    place = data.index(b"tkhd") + 4 + 40
    one = 1 << 16
    turned = struct.pack(">9i", 0, one, 0, -one, 0, 0, 32 * one, 0, 1 << 30)
    (tmp_path / "b.mp4").write_bytes(data[:place] + turned + data[place + 36 :])
    frame = read_video(tmp_path / "b.mp4", num_frames=1, height=64, width=32)[0]
    assert frame[:12].mean() > 240
    assert frame[20:].mean() < 15


@pytest.mark.parametrize("content", [None, b"", b"no video at all"])
def test_unreadable_videos_are_one_line(tmp_path, content):
    if content is not None:
        (tmp_path / "a.mp4").write_bytes(content)
    with pytest.raises(UserError, match=r"video: .*a\.mp4") as caught:
        read_video(tmp_path / "a.mp4", num_frames=1, height=16, width=16)
    assert "\n" not in str(caught.value)


def test_a_file_without_pictures_is_refused(tmp_path):
    with av.open(str(tmp_path / "a.mp4"), "w") as container:
        stream = container.add_stream("aac", rate=8000)
        sound = av.AudioFrame.from_ndarray(np.zeros((1, 1600), np.float32), format="fltp", layout="mono")
        sound.sample_rate = 8000
        container.mux(stream.encode(sound))
        container.mux(stream.encode())
    with pytest.raises(UserError, match="has no video stream"):
        read_video(tmp_path / "a.mp4", num_frames=1, height=16, width=16)


def test_a_video_comes_back_nearly_as_it_was_written(tmp_path):
    coarse = np.random.default_rng(0).integers(0, 256, (5, 6, 8, 3), np.uint8)
    frames = np.stack([np.asarray(Image.fromarray(frame).resize((256, 192))) for frame in coarse])
    write_video(tmp_path / "a.mp4", frames, 12.5)
    back = read_video(tmp_path / "a.mp4", num_frames=5, height=192, width=256)
    assert np.square(back.astype(float) - frames).mean() < 16  # 36 dB
    with av.open(str(tmp_path / "a.mp4")) as container:
        stream = container.streams.video[0]
        assert (stream.codec_context.name, stream.pix_fmt, stream.average_rate) == ("h264", "yuv420p", Fraction(25, 2))


def test_odd_sizes_grow_by_one_and_all_kinds_of_frames_are_taken(tmp_path):
    array = np.random.default_rng(0).random((2, 15, 17, 3)).astype(np.float32)
    images = [Image.fromarray((frame * 255).round().astype(np.uint8)) for frame in array]
    files = []
    for name, frames in {"array": array, "tensor": torch.from_numpy(array), "images": images}.items():
        write_video(tmp_path / f"{name}.mp4", frames, 8)
        files.append(read_video(tmp_path / f"{name}.mp4", num_frames=2, height=16, width=18))
    assert np.array_equal(files[0], files[1])
    assert np.array_equal(files[0], files[2])


@pytest.mark.parametrize(
    "frames",
    [np.zeros((2, 4, 4)), [], np.full((1, 4, 4, 3), 2.0), np.full((1, 4, 4, 3), np.nan), np.zeros((1, 2, 2, 3), int)],
)
def test_what_is_no_video_is_not_written(tmp_path, frames):
    with pytest.raises(UserError, match="frames must be"):
        write_video(tmp_path / "a.mp4", frames, 8)
    assert not list(tmp_path.iterdir())


def test_a_folder_that_cannot_be_written_is_one_line(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="cannot write .*; a file is in the way, choose another folder"):
        write_video(tmp_path / "file/a.mp4", np.zeros((1, 4, 4, 3), np.uint8), 8)


def test_images_are_read_as_rgb_on_white_and_upright(tmp_path):
    Image.new("RGBA", (4, 2), (255, 0, 0, 0)).save(tmp_path / "clear.png")
    assert np.asarray(read_image(tmp_path / "clear.png")).tolist() == [[[255, 255, 255]] * 4] * 2
    palette = Image.new("P", (2, 2), 1)
    palette.putpalette([0, 0, 0, 9, 8, 7])
    palette.save(tmp_path / "palette.png", transparency=1)
    assert np.asarray(read_image(tmp_path / "palette.png")).max() == 255
    Image.fromarray(np.full((2, 2), 257 * 100, np.uint16)).save(tmp_path / "deep.png")
    assert np.asarray(read_image(tmp_path / "deep.png")).tolist() == [[[100] * 3] * 2] * 2
    turned = Image.new("RGB", (4, 2))
    exif = turned.getexif()
    exif[0x0112] = 6
    turned.save(tmp_path / "turned.jpg", exif=exif)
    assert read_image(tmp_path / "turned.jpg").size == (2, 4)


@pytest.mark.parametrize("content", [None, b"", b"no image", "cut"])
def test_unreadable_images_are_one_line(tmp_path, content):
    path = tmp_path / "a.png"
    if content == "cut":
        Image.fromarray(np.random.default_rng(0).integers(0, 256, (64, 64, 3), np.uint8)).save(path)
        content = path.read_bytes()[:2000]
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(UserError, match=r"reference: .*a\.png") as caught:
        read_image(path, "reference")
    assert "\n" not in str(caught.value)


def test_masks_are_cut_at_half_of_their_brightest_pixel(tmp_path):
    for name, values in {"label": [0, 1, 1], "soft": [100, 130, 255]}.items():
        Image.fromarray(np.array([values], np.uint8)).save(tmp_path / f"{name}.png")
        assert read_mask(tmp_path / f"{name}.png").tolist() == [[False, True, True]]
    Image.new("L", (2, 2)).save(tmp_path / "black.png")
    with pytest.raises(UserError, match="marks nothing"):
        read_mask(tmp_path / "black.png")
