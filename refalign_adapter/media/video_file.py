"""Videos out: one mp4 file, written whole or not at all.

Shape letters: F frames, H and W height and width in pixels.
"""

from __future__ import annotations

from fractions import Fraction
from pathlib import Path
from typing import Any

import av
import numpy as np

from ..atomic import atomic_file
from ..errors import UserError


def write_video(path: str | Path, frames: Any, fps: float) -> None:
    """Write an mp4 (H.264, 4:2:0, which stock players read) at high quality, atomically.

    Args:
        path: the file, replaced if it exists.
        frames: (F, H, W, 3) RGB as an array, a tensor or a list of images: uint8, or floats in [0, 1]. An odd height
            or width grows by one row or column that repeats the last, as 4:2:0 needs even sizes.
        fps: frames a second, positive.

    Raises:
        UserError: frames of another shape or range, or a folder that cannot be written.
    """
    array = _to_uint8(frames)
    array = np.pad(array, ((0, 0), (0, array.shape[1] % 2), (0, array.shape[2] % 2), (0, 0)), mode="edge")
    try:
        with atomic_file(path) as temporary, av.open(str(temporary), "w", format="mp4") as container:
            stream = container.add_stream("libx264", rate=Fraction(fps).limit_denominator(1001))
            stream.height, stream.width = array.shape[1:3]
            stream.pix_fmt = "yuv420p"
            stream.options = {"crf": "12", "preset": "medium"}
            for frame in array:
                container.mux(stream.encode(av.VideoFrame.from_ndarray(np.ascontiguousarray(frame), format="rgb24")))
            container.mux(stream.encode())
    except (OSError, av.FFmpegError) as error:
        raise UserError(
            f"output: cannot write {str(path)!r} ({' '.join(str(getattr(error, 'strerror', None) or error).split())})"
        ) from None


def _to_uint8(frames: Any) -> np.ndarray:
    if isinstance(frames, (list, tuple)):
        frames = np.stack([np.asarray(frame) for frame in frames]) if frames else np.zeros(0)
    array = frames.detach().cpu().numpy() if hasattr(frames, "detach") else np.asarray(frames)
    if array.ndim != 4 or array.shape[-1] != 3 or 0 in array.shape:
        raise UserError(f"frames must be (frames, height, width, 3), got {array.shape}")
    if array.dtype == np.uint8:
        return array
    if not np.issubdtype(array.dtype, np.floating) or not (array.min() >= 0 and array.max() <= 1):
        raise UserError(f"frames must be uint8 or floats in [0, 1], got {array.dtype} up to {array.max()}")
    return (array * 255).round().astype(np.uint8)
