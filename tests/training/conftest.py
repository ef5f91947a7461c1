"""A tiny world on disk, made once: base, teacher, clips with references, cache, and a recipe on top of them."""

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from PIL import Image
from tiny_models import save_tiny_pipeline, tiny_dinov2

from refalign_adapter.data.cache import cache_dataset
from refalign_adapter.data.options import options_of
from refalign_adapter.data.video import write_video
from refalign_adapter.training.recipe_file import load_recipe

ROWS, SIZE, FRAMES = 10, 48, 5


@pytest.fixture(scope="session")
def tiny_world(tmp_path_factory):
    """A folder with `base`, `teacher`, `clips/metadata.jsonl`, `cache` and `recipe.yaml`."""
    folder = tmp_path_factory.mktemp("world")
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


@pytest.fixture
def make_recipe(tiny_world, tmp_path):
    """`make_recipe("key=value", …)`: the tiny recipe with changes, writing to the test's own folder."""

    def make(*overrides):
        return load_recipe(tiny_world / "recipe.yaml", [f"output_dir={tmp_path / 'out'}", *overrides])

    return make


@pytest.fixture(scope="session")
def economical_world(tiny_world, tmp_path_factory):
    """Overrides of the tiny recipe for a LoRA on references alone, which are small and lose their background."""
    overrides = [
        f"data.cache_dir={tmp_path_factory.mktemp('economical')}",
        "adapter.attention=isolated",
        "adapter.lora_scope=reference",
        "adapter.reference_scale=0.5",
        "adapter.drop_background=true",
    ]
    cache_dataset(options_of(load_recipe(tiny_world / "recipe.yaml", overrides)), device="cpu")
    return overrides


@pytest.fixture
def launch(tiny_world):
    """`launch(output_dir, "key=value", …, launcher=[…])`: run the training command; returns the process's result."""
    train = ("-m", "refalign_adapter.train")

    def run(output_dir, *overrides, launcher=(), environment=None, config=tiny_world / "recipe.yaml", module=train):
        arguments = [*module, "--config", config, f"output_dir={output_dir}", *overrides]
        command = [sys.executable, *launcher, *arguments]
        return subprocess.run(
            list(map(str, command)),
            env={**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": "", **(environment or {})},
            capture_output=True,
            text=True,
            timeout=250,
            check=False,
        )

    return run


@pytest.fixture(autouse=True)
def _one_thread():
    """Two cores are shared; and a fixed number of threads keeps sums bit-identical."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)
