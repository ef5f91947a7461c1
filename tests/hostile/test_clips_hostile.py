"""Clips that are none, lie about themselves, or lack frames: one line each; nothing else is opened or allocated."""

import av
import numpy as np
import pytest
from PIL import Image

from refalign_adapter.errors import UserError
from refalign_adapter.media import video
from refalign_adapter.media.video import probe_video, read_video


def write(path, stamps, *, rate=25, codec="mpeg2video", form="mpegts"):
    """A clip of 64x48 whose frame i is shown at stamps[i] / rate."""
    with av.open(str(path), "w", format=form) as container:
        stream = container.add_stream(codec, rate=rate)
        stream.width, stream.height, stream.pix_fmt = 64, 48, "yuv420p"
        for number, stamp in enumerate(stamps):
            frame = av.VideoFrame.from_ndarray(np.full((48, 64, 3), number * 5, np.uint8), format="rgb24")
            frame.pts = stamp
            container.mux(stream.encode(frame))
        container.mux(stream.encode())
    return path


def read(path, frames=4, **options):
    return read_video(path, num_frames=frames, height=32, width=32, **options)


def line(action):
    with pytest.raises(UserError) as caught:
        action()
    assert "\n" not in str(caught.value)
    return str(caught.value)


@pytest.fixture
def other(tmp_path):
    return write(tmp_path / "other.ts", range(10))


LISTS = {
    "a.mp4": "ffconcat version 1.0\nfile other.ts\n",
    "a.ffconcat": "ffconcat version 1.0\nfile other.ts\n",
    "a.m3u8": "#EXTM3U\n#EXT-X-TARGETDURATION:9\n#EXTINF:9,\nother.ts\n#EXT-X-ENDLIST\n",
    "a.txt": "text, which FFmpeg would show on a terminal of its own\n" * 99,
}


@pytest.mark.parametrize("name", LISTS)
@pytest.mark.parametrize("look", [read, probe_video])
def test_lists_of_other_files_and_text_are_no_clips(tmp_path, other, name, look):
    assert read(other).shape == (4, 32, 32, 3)
    (tmp_path / name).write_text(LISTS[name])
    assert "is no clip that is read; make it an MP4" in line(lambda: look(tmp_path / name))


def test_a_picture_is_no_clip(tmp_path):
    Image.new("RGB", (64, 64)).save(tmp_path / "a.mp4", format="PNG")
    assert "is no clip that is read" in line(lambda: read(tmp_path / "a.mp4", 1))


@pytest.mark.parametrize("fps", [None, 10])
@pytest.mark.parametrize("jump", [250, 40])
def test_frames_that_are_missing_are_told_not_repeated(tmp_path, fps, jump):
    clip = write(tmp_path / "a.ts", [*range(25), *range(25 + jump, 50 + jump)])
    assert "jumps from 1.00 to" in line(lambda: read(clip, 14 if fps else 40, fps=fps))
    assert read(clip, 5, fps=fps).shape[0] == 5  # what comes before is whole
    assert read(clip, 5, segment=(25, 50)).shape[0] == 5
    assert "jumps from" in line(lambda: read(clip, 10, segment=(20, 50)))


def test_a_few_dropped_frames_and_slow_clips_are_read(tmp_path):
    dropped = write(tmp_path / "a.ts", [*range(10), *range(20, 30)])
    slow = write(tmp_path / "b.mp4", range(6), rate=1, codec="mpeg4", form="mp4")
    assert len(read(dropped, 10, fps=10)) == len(read(slow, 10, fps=2)) == 10


def test_frames_cost_no_more_memory_than_the_limit_says(tmp_path, monkeypatch, other):
    monkeypatch.setattr(video, "MAX_PIXELS", 64 * 48 - 1)
    assert "says it has 64x48 pixels, more than 3,071" in line(lambda: read(other))


def test_frames_larger_than_their_header_are_not_allocated(tmp_path, monkeypatch, other):
    asked = []
    real = video._opened.__wrapped__

    def opened(path):
        steps = real(path)
        container, stream = next(steps)
        asked.append(stream.codec_context.options["max_pixels"])
        yield container, stream

    monkeypatch.setattr(video, "_opened", video.contextmanager(opened))
    read(other)
    assert asked == [str(video.MAX_PIXELS)]
