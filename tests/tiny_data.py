"""Small real data sets: mp4 clips, PNG references with masks, a manifest."""

import json
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from refalign_adapter.media.video_file import write_video


def write_clip(
    path: Path, *, frames: int = 9, height: int = 32, width: int = 32, fps: float = 8, seed: int = 0
) -> None:
    """A moving random pattern."""
    path.parent.mkdir(parents=True, exist_ok=True)
    picture = np.random.default_rng(seed).integers(0, 256, (4, 4, 3), np.uint8)
    still = np.asarray(Image.fromarray(picture).resize((width, height)))
    write_video(path, np.stack([np.roll(still, 2 * step, axis=1) for step in range(frames)]), fps)


def write_reference(
    image: Path, mask: Path | None = None, *, height: int = 40, width: int = 30, seed: int = 0
) -> None:
    """A random rectangle on a grey ground, and its mask."""
    generator = np.random.default_rng(seed)
    pixels = np.full((height, width, 3), 128, np.uint8)
    pixels[8:-6, 5:-4] = generator.integers(0, 256, (height - 14, width - 9, 3))
    image.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(pixels).save(image)
    if mask is not None:
        marks = np.zeros((height, width), np.uint8)
        marks[8:-6, 5:-4] = 255
        mask.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(marks).save(mask)


def write_manifest(folder: Path, rows: list[dict[str, Any]]) -> Path:
    """`metadata.jsonl` with these rows; returns its path."""
    path = folder / "metadata.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def write_data(folder: Path, count: int = 4, **clip: Any) -> Path:
    """`count` rows with 1, 2, 3, 1, … references; every second row is a regular pair. Returns the manifest."""
    rows = []
    for number in range(count):
        write_clip(folder / f"clips/{number}.mp4", seed=number, **clip)
        references = []
        for index in range(number % 3 + 1):
            names = {"image": f"references/{number}_{index}.png", "mask": f"masks/{number}_{index}.png"}
            write_reference(folder / names["image"], folder / names["mask"], seed=10 * number + index)
            references.append({**names, "subject": f"subject {min(index, 1)}"})
        pair = ("cross", "regular")[number % 2]
        caption = f"thing {number} moves" + " about" * number
        rows.append({"file_name": f"clips/{number}.mp4", "caption": caption, "references": references, "pair": pair})
    return write_manifest(folder, rows)
