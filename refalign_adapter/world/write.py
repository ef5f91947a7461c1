"""The world as files: mp4 clips, PNG references with their masks, and a manifest.

folder/metadata.jsonl            one row a clip
folder/clips/000001.mp4
folder/references/000001_0.png   the clip's first subject on white
folder/masks/000001_0.png        255 on the subject, 0 elsewhere
"""

import json
from fractions import Fraction
from pathlib import Path

import numpy as np

from ..atomic import atomic_file
from ..errors import ConfigError
from ..files import require_writable_folder
from .scenes import LATER, PAIRS, Clip, draw_clip
from .subjects import SPLITS

MANIFEST = "metadata.jsonl"


def write_world(
    folder: str | Path,
    *,
    clips: int,
    subjects_split: str = "train",
    seed: int = 0,
    height: int = 64,
    width: int = 64,
    num_frames: int = 9,
    fps: int = 8,
    subjects: int | None = None,
    same_kind: float = 0.0,
    pairs: str = "cross",
    reference_backgrounds: float = 0.0,
) -> Path:
    """Draw clips of the world and write them as a data set.

    Args:
        folder: where to write; created if missing.
        clips: how many clips.
        subjects_split: `train` or `eval`. No looks of one occur in the other.
        seed: the same seed gives the same pictures and frames.
        height, width: of videos and references in pixels; even, as mp4 needs.
        num_frames: frames a clip, 4k + 1.
        fps: frames a second.
        subjects: subjects in every clip, 1 to 3; None lets each clip draw its number.
        same_kind: share of clips, 0 to 1, whose subjects, two or three, are of one kind.
        pairs: `cross` or `regular`, see `draw_clip`.
        reference_backgrounds: share of clips, 0 to 1, whose references stand before a background; the others' stand on
            white. Masks tell where the subject is in either.

    Returns:
        The manifest, `folder/metadata.jsonl`; its paths are relative to the folder.

    Raises:
        ConfigError: values out of range, all at once.
        UserError: the folder cannot be written.
    """
    problems = _number_problems(clips, subjects_split, height, width, num_frames, fps, subjects)
    if problems := problems + _kind_problems(subjects, same_kind, pairs, reference_backgrounds):
        raise ConfigError(problems)
    root = require_writable_folder(folder, "folder")
    for name in ("clips", "references", "masks"):
        (root / name).mkdir(exist_ok=True)
    rows = []
    size = {"height": height, "width": width, "num_frames": num_frames}
    for number in range(1, clips + 1):
        stream = np.random.default_rng([seed, SPLITS.index(subjects_split), number, LATER, 1])
        alike, before_background = (stream.random(2) < (same_kind, reference_backgrounds)).tolist()
        clip = draw_clip(
            seed,
            number,
            split=subjects_split,
            subjects=subjects,
            same_kind=alike,
            pairs=pairs,
            reference_backgrounds=before_background,
            **size,
        )
        rows.append(_write_clip(root, f"{number:06d}", clip, fps, pairs))
    with atomic_file(root / MANIFEST) as temporary:
        temporary.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return root / MANIFEST


def write_video(path: str | Path, frames: np.ndarray, fps: int) -> None:
    """Write frames as H.264 in mp4, 4:2:0, which stock players decode, at nearly lossless quality.

    Args:
        path: the file; replaced as a whole or not at all.
        frames: uint8 (num_frames, height, width, 3), height and width even.
        fps: frames a second.
    """
    import av

    with atomic_file(path) as temporary, av.open(str(temporary), "w") as container:
        stream = container.add_stream("libx264", rate=Fraction(fps))
        stream.height, stream.width = frames.shape[1:3]
        stream.pix_fmt = "yuv420p"
        # One thread and a fixed quantiser: with rate control the same frames give other bytes from run to run.
        stream.options = {"qp": "10", "preset": "veryfast", "threads": "1"}
        for frame in frames:
            picture = av.VideoFrame.from_ndarray(np.ascontiguousarray(frame), format="rgb24")
            container.mux(stream.encode(picture.reformat(format="yuv420p")))
        container.mux(stream.encode())


def _write_clip(root: Path, name: str, clip: Clip, fps: int, pair: str) -> dict:
    """Write one clip's files; returns its row of the manifest."""
    row = {"file_name": f"clips/{name}.mp4", "caption": clip.caption, "references": [], "pair": pair}
    write_video(root / row["file_name"], clip.frames, fps)
    for index, subject in enumerate(clip.subjects):
        paths = {"image": f"references/{name}_{index}.png", "mask": f"masks/{name}_{index}.png"}
        clip.references[index].save(root / paths["image"])
        clip.masks[index].save(root / paths["mask"])
        row["references"].append({**paths, "subject": str(subject)})
    return row


def _number_problems(
    clips: int, split: str, height: int, width: int, num_frames: int, fps: int, subjects: int | None
) -> list[str]:
    problems = []
    if clips < 1:
        problems.append(f"clips must be at least 1, got {clips}")
    if split not in SPLITS:
        problems.append(f"subjects_split must be one of {', '.join(SPLITS)}, got {split!r}")
    for field, value in (("height", height), ("width", width)):
        if value < 32 or value % 2:
            problems.append(f"{field} must be even and at least 32, got {value}")
    if num_frames < 1 or num_frames % 4 != 1:
        problems.append(f"num_frames must be 4k + 1 (1, 5, 9, …), got {num_frames}")
    if fps < 1:
        problems.append(f"fps must be at least 1, got {fps}")
    if subjects is not None and subjects not in (1, 2, 3):
        problems.append(f"subjects must be 1, 2, 3 or None, got {subjects}")
    return problems


def _kind_problems(subjects: int | None, same_kind: float, pairs: str, reference_backgrounds: float) -> list[str]:
    shares = {"same_kind": same_kind, "reference_backgrounds": reference_backgrounds}
    problems = [f"{field} must be in [0, 1], got {value}" for field, value in shares.items() if not 0 <= value <= 1]
    if pairs not in PAIRS:
        problems.append(f"pairs must be one of {', '.join(PAIRS)}, got {pairs!r}")
    if same_kind and subjects == 1:
        problems.append("same_kind needs clips of 2 or 3 subjects, got subjects 1")
    return problems
