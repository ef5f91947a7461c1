"""A tiny world on disk to train in: base, teacher, clips with references, cache, and a recipe on top of them."""

import json
from pathlib import Path

import numpy as np
import yaml
from PIL import Image
from tiny_models import save_tiny_pipeline, tiny_dinov2

from refalign_adapter.data.cache.build import cache_dataset
from refalign_adapter.media.video_file import write_video
from refalign_adapter.recipes.cache_options import options_of
from refalign_adapter.recipes.file import load_recipe

ROWS, SIZE, FRAMES = 10, 48, 5


def make_world(folder: Path) -> Path:
    """Write `base`, `teacher`, `clips/metadata.jsonl`, `cache` and `recipe.yaml` into a folder; returns it."""
    save_tiny_pipeline(folder / "base")
    tiny_dinov2(folder / "teacher")
    _write_clips(folder / "clips")
    values = {
        "pretrained_model_name_or_path": str(folder / "base"),
        "output_dir": str(folder / "out"),
        "max_train_steps": 6,
        "train_batch_size": 2,
        "gradient_accumulation_steps": 2,
        "learning_rate": 1e-3,
        "min_8bit_size": 16,
        "checkpointing_steps": 3,
        "report_to": None,
        "adapter": {
            "attention": "joint",
            "r": 4,
            "lora_alpha": 4,
            "lora_dropout": 0.1,
            "align_layers": 2,
            "teachers": [str(folder / "teacher")],
            "max_sequence_length": 16,
        },
        "data": {
            "train_data": str(folder / "clips" / "metadata.jsonl"),
            "validation_rows": 3,
            "cache_dir": str(folder / "cache"),
            "height": SIZE,
            "width": SIZE,
            "num_frames": FRAMES,
            "fps": None,
            "reference_variants": 2,
        },
    }
    (folder / "recipe.yaml").write_text(yaml.safe_dump(values))
    cache_dataset(options_of(load_recipe(folder / "recipe.yaml")), device="cpu")
    return folder


def _write_clips(folder: Path) -> None:
    generator = np.random.default_rng(0)
    rows = []
    for index in range(ROWS):
        frames = generator.integers(0, 255, (FRAMES, SIZE, SIZE, 3), dtype=np.uint8)
        write_video(folder / f"{index}.mp4", frames, fps=16)
        references = []
        for number in range(index % 3 + 1):
            name = f"{index}_{number}.png"
            Image.fromarray(generator.integers(0, 255, (SIZE, SIZE, 3), dtype=np.uint8)).save(folder / name)
            references.append({"image": name})
        pair = "regular" if index % 2 else "cross"
        rows.append({"file_name": f"{index}.mp4", "caption": f"clip {index}", "references": references, "pair": pair})
    (folder / "metadata.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
