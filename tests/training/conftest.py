"""A tiny world on disk, made once: base, teacher, clips with references, cache, and a recipe on top of them."""

import os
import subprocess
import sys

import pytest
import torch
from tiny_world import make_world

from refalign_adapter.data.cache.build import cache_dataset
from refalign_adapter.recipes.cache_options import options_of
from refalign_adapter.recipes.file import load_recipe

MINIMAL = "pretrained_model_name_or_path: base\noutput_dir: out\ndata: {cache_dir: cache}\n"


@pytest.fixture(scope="session")
def tiny_world(tmp_path_factory):
    """A folder with `base`, `teacher`, `clips/metadata.jsonl`, `cache` and `recipe.yaml`."""
    return make_world(tmp_path_factory.mktemp("world"))


@pytest.fixture
def make_recipe(tiny_world, tmp_path):
    """`make_recipe("key=value", …)`: the tiny recipe with changes, writing to the test's own folder."""

    def make(*overrides):
        return load_recipe(tiny_world / "recipe.yaml", [f"output_dir={tmp_path / 'out'}", *overrides])

    return make


@pytest.fixture
def recipe_file(tmp_path):
    """`recipe_file("more: yaml")`: a file with what a recipe must say and more; returns its path."""

    def write(text="", head=MINIMAL):
        path = tmp_path / "recipe.yaml"
        path.write_text(head + text)
        return path

    return write


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
