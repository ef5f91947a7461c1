"""Videos in: sampled by frame rate, upright, resized without stretching.

Shape letters: F frames, H and W height and width in pixels.
"""

from __future__ import annotations

import errno
import os
import stat
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from itertools import islice
from pathlib import Path

import av
import numpy as np
from av.container import InputContainer
from av.video.reformatter import VideoReformatter
from PIL import Image

from ..errors import UserError
from .canvas import cover
from .sizes import CLOCK_TOLERANCE, VideoFacts

HDR = {16: "PQ", 18: "HLG"}
"""Transfer characteristics of ITU-T H.273."""
CONTAINERS = (
    *("mov", "matroska", "avi", "mpegts", "mpeg", "mpegvideo", "m4v", "h264", "hevc", "obu", "ivf", "ogg", "flv"),
    *("asf", "mxf", "nut", "dv", "yuv4mpegpipe", "gif", "apng"),
)
"""What is opened, by FFmpeg's names; it knows more, lists of other files and text among them."""
MAX_PIXELS = 8_192 * 8_192
MAX_FRAMES, MAX_RATE = 10_000_000, 1_000.0
"""What a header may say; beyond, it is taken to say nothing."""
GAP_SECONDS, GAP_FRAMES = 1.0, 10
"""Of time stamps that jump by more than both, pictures are missing; cameras and screen recorders skip fewer."""

Crop = tuple[int, int, int, int]
"""(left, top, right, bottom) in pixels of the frames as they are shown."""


class TooShortError(UserError):
    """A clip with fewer frames than were asked for."""


def read_video(
    path: str | Path,
    *,
    num_frames: int,
    height: int,
    width: int,
    fps: float | None = None,
    segment: tuple[int, int] | None = None,
    crop: Crop | None = None,
) -> np.ndarray:
    """Decode the beginning of a video, or of a segment of it.

    Frame i of the result is the one that is on screen i / fps seconds after the start. Each is scaled until it covers
    height x width and cropped around its centre, so nothing is stretched.

    Args:
        path: a file that FFmpeg reads.
        num_frames: F, at least 1.
        height, width: H and W.
        fps: frames a second of the result; None takes consecutive frames as they are.
        segment: the first frame and the one after the last to read, counted from 0; None: all.
        crop: what of each frame is used, before it is scaled; None: all.

    Returns:
        uint8 (F, H, W, 3), RGB.

    Raises:
        TooShortError: it has fewer frames.
        UserError: the file is missing, empty or not readable as a video, or the crop leaves its frames.
    """
    frames: list[np.ndarray] = []
    previous = None
    with _opened(path) as (container, stream):
        rate = _rate(stream)
        pixel_aspect = float(stream.sample_aspect_ratio or 1)
        decoded = islice(_decoded(container, stream, path), *(segment or (0, None)))
        colours = VideoReformatter()
        for frame in _sample(_without_gaps(decoded, rate, path), num_frames, fps, rate):
            if frame is not previous:
                image, aspect = _upright(frame, pixel_aspect, colours)
                array = np.asarray(cover(_cropped(image, crop, path), height, width, aspect))
            frames.append(frames[-1] if frame is previous else array)
            previous = frame
    if len(frames) < num_frames:
        raise TooShortError(f"video: {_too_short(path, len(frames), num_frames, fps)}")
    return np.stack(frames)


def read_frame(path: str | Path, frame: int | float, *, crop: Crop | None = None) -> Image.Image:
    """Decode one frame of a video, RGB, in its own pixels.

    Args:
        path: a file that FFmpeg reads.
        frame: its number from 0, or (a float) a share of the video's frames: int(share * frames), 1.0 is the last.
        crop: what of it is used; None: all.

    Raises:
        UserError: the file is not readable as a video or has no such frame, or the crop leaves it.
    """
    number = min(int(frame * (count := count_frames(path))), count - 1) if isinstance(frame, float) else frame
    with _opened(path) as (container, stream):
        found = next(islice(_decoded(container, stream, path), max(0, number), None), None)
        if found is None or number < 0:
            raise UserError(f"video: {str(path)!r} has no frame {number}")
        return _cropped(_upright(found, 1.0)[0], crop, path)


def count_frames(path: str | Path) -> int:
    """Frames of a video: what its container says, or else as many as decode.

    Raises:
        UserError: the file is not readable as a video.
    """
    with _opened(path) as (container, stream):
        return _told_frames(stream) or sum(1 for _ in container.decode(stream))


def probe_video(path: str | Path, *, segment: tuple[int, int] | None = None, crop: Crop | None = None) -> VideoFacts:
    """Size and length of a video, or of a segment of it, from its first frame and its container's header.

    Frames that the header does not tell are counted by decoding; one that tells more than there are is believed.

    Args:
        path: a file that FFmpeg reads.
        segment, crop: as in `read_video`.

    Raises:
        UserError: the file is missing, empty or not readable as a video, or the crop leaves its frames.
    """
    with _opened(path) as (container, stream):
        rate = _rate(stream)
        frames = _told_frames(stream) or min(MAX_FRAMES, round(rate * (container.duration or 0) / av.time_base))
        first = next(_decoded(container, stream, path), None)
        if first is None:
            raise UserError(f"video: {_too_short(path, 0, 1, None)}")
        image, aspect = _upright(first, float(stream.sample_aspect_ratio or 1))
        image = _cropped(image, crop, path)
    frames = frames or count_frames(path)
    if segment is not None:
        frames = max(0, min(frames, segment[1]) - segment[0])
    return VideoFacts(image.height, max(1, round(image.width * aspect)), frames, rate)


@contextmanager
def _opened(path: str | Path) -> Iterator[tuple[InputContainer, av.VideoStream]]:
    """The container and its first video stream; what goes wrong while it is open is a UserError."""
    try:
        status = os.stat(path)
        if not stat.S_ISREG(status.st_mode) and not stat.S_ISDIR(status.st_mode):
            raise ValueError("a pipe or device, not a file")
        with _container(path) as container:
            if not container.streams.video:
                raise UserError(f"video: {str(path)!r} has no video stream")
            stream = container.streams.video[0]
            if stream.codec_context.width * stream.codec_context.height > MAX_PIXELS:
                size = f"{stream.codec_context.width}x{stream.codec_context.height}"
                raise UserError(f"video: {str(path)!r} says it has {size} pixels, more than {MAX_PIXELS:,}")
            stream.codec_context.options = {"max_pixels": str(MAX_PIXELS)}  # frames can be larger than the header says
            stream.thread_type = "AUTO"
            yield container, stream
    except (OSError, av.FFmpegError, ValueError) as error:
        if isinstance(error, UserError):
            raise
        raise UserError(f"video: cannot read {str(path)!r} ({_reason(error)})") from None


def _container(path: str | Path) -> InputContainer:
    try:
        return av.open(str(path), container_options={"format_whitelist": ",".join(CONTAINERS)})
    except av.FFmpegError as error:
        if error.errno != errno.EINVAL:
            raise
        raise UserError(
            f"video: {str(path)!r} is no clip that is read; make it an MP4: ffmpeg -i IN OUT.mp4"
        ) from None


def _rate(stream: av.VideoStream) -> float:
    """Frames a second by the header, 0 where it says none that can be."""
    rate = float(stream.average_rate or stream.guessed_rate or 0)
    return rate if 0 < rate <= MAX_RATE else 0.0


def _told_frames(stream: av.VideoStream) -> int:
    return stream.frames if 0 < stream.frames <= MAX_FRAMES else 0


def _sample(frames: Iterable[av.VideoFrame], count: int, fps: float | None, rate: float) -> Iterator[av.VideoFrame]:
    """The frames on screen at 0, 1 / fps, …; fewer than `count` where the video ends before."""
    if fps is None:
        yield from islice(frames, count)
        return
    shown, yielded = None, 0
    for time, frame in _timed(frames, rate):
        while shown is not None and yielded < count and yielded / fps + CLOCK_TOLERANCE < time:
            yield shown
            yielded += 1
        if yielded == count:
            return
        shown = frame


def _timed(frames: Iterable[av.VideoFrame], rate: float) -> Iterator[tuple[float, av.VideoFrame | None]]:
    """(seconds since the first frame, frame), then (when the last one leaves the screen, None)."""
    start = time = 0.0
    for number, frame in enumerate(frames):
        # Streams without time stamps are taken to run at their nominal rate.
        now = float(frame.time) if frame.time is not None else number / (rate or 1)
        start = now if number == 0 else start
        time = now - start
        yield time, frame
    yield time + (1 / rate if rate else 0), None


def _upright(
    frame: av.VideoFrame, pixel_aspect: float, colours: VideoReformatter | None = None
) -> tuple[Image.Image, float]:
    """The frame as it is shown, and its pixels' width over their height.

    `colours` is one for all frames of a video: a frame that makes its own spends most of its time on that.
    """
    colours = colours or VideoReformatter()
    if any(component.is_alpha for component in frame.format.components):
        array = _on_white(colours.reformat(frame, format="rgba").to_ndarray())
    else:
        array = colours.reformat(frame, format="rgb24").to_ndarray()
    array, turned = _as_displayed(array, frame)
    return Image.fromarray(array), 1 / pixel_aspect if turned else pixel_aspect


def _on_white(array: np.ndarray) -> np.ndarray:
    """RGBA as RGB: what is transparent is white, as in pictures, whatever colours are hidden there."""
    alpha = array[..., 3:].astype(np.uint16)
    return ((array[..., :3] * alpha + 255 * (255 - alpha) + 127) // 255).astype(np.uint8)


def _as_displayed(array: np.ndarray, frame: av.VideoFrame) -> tuple[np.ndarray, bool]:
    """The picture turned and mirrored as its file asks for, and whether its height and width have changed places.

    A point (x, y) goes to (a x + c y, b x + d y) of FFmpeg's display matrix (libavutil/display.h).
    """
    data = frame.side_data.get("DISPLAYMATRIX")
    if data is None:
        return array, False
    a, b, _, c, d, *_ = np.frombuffer(bytes(data), np.int32)
    turned = abs(int(a)) < abs(int(b))
    if turned:
        array = array.swapaxes(0, 1)
    right, down = (c, b) if turned else (a, d)
    return np.ascontiguousarray(array[:: -1 if down < 0 else 1, :: -1 if right < 0 else 1]), turned


def _check_frame(frame: av.VideoFrame, stream: av.VideoStream, path: str | Path) -> None:
    """Refuse what would be read wrongly without a word.

    Raises:
        UserError: a picture that the decoder could not restore, or high dynamic range.
    """
    if frame.is_corrupt:
        raise UserError(f"video: {str(path)!r} is damaged: a frame cannot be decoded whole; replace it")
    transfer = getattr(frame, "color_trc", stream.codec_context.color_trc)  # frames tell theirs since PyAV 17
    if (name := HDR.get(int(transfer or 0))) is not None:
        raise UserError(
            f"video: {str(path)!r} is high dynamic range ({name}), whose colours would come out wrong; convert it: "
            "ffmpeg -i IN -vf zscale=t=linear:npl=100,tonemap=hable,zscale=p=bt709:t=bt709:m=bt709,format=yuv420p OUT"
        )


def _decoded(container: InputContainer, stream: av.VideoStream, path: str | Path) -> Iterator[av.VideoFrame]:
    """The video's frames, each looked at."""
    for frame in container.decode(stream):
        _check_frame(frame, stream, path)
        yield frame


def _without_gaps(frames: Iterable[av.VideoFrame], rate: float, path: str | Path) -> Iterator[av.VideoFrame]:
    """The frames, as long as their time stamps go on.

    Raises:
        UserError: they jump, so that one picture would stand in for those that are missing.
    """
    last: float | None = None
    for frame in frames:
        now = frame.time
        if now is not None and last is not None and abs(now - last) > max(GAP_SECONDS, GAP_FRAMES / (rate or 1)):
            raise UserError(
                f"video: {str(path)!r} jumps from {last:.2f} to {now:.2f} seconds; cut it there, or write its frames "
                "anew at one rate: ffmpeg -i IN -vf setpts=N/FRAME_RATE/TB OUT"
            )
        last = now
        yield frame


def _cropped(image: Image.Image, crop: Crop | None, path: str | Path) -> Image.Image:
    if crop is None:
        return image
    left, top, right, bottom = crop
    if not (0 <= left < right <= image.width and 0 <= top < bottom <= image.height):
        raise UserError(f"video: crop {list(crop)} leaves the {image.width}x{image.height} frames of {str(path)!r}")
    return image.crop(crop)


def _reason(error: Exception) -> str:
    return str(getattr(error, "strerror", None) or error).split("\n")[0]


def _too_short(path: str | Path, found: int, wanted: int, fps: float | None) -> str:
    if not found:
        return f"{str(path)!r} has no frames"
    at = f" at {fps:g} frames a second" if fps else ""
    return f"{str(path)!r} is too short: {found} frames{at}, {wanted} are needed; lower num_frames or raise fps"
