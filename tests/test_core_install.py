"""What `pip install refalign-adapter` alone gives: loading and generating; training says in one line what to install.

Stands for such an install: this one, with every package hidden that the core dependencies do not need.
"""

import importlib.metadata
import os
import re
import subprocess
import sys
from functools import cache

import pytest
from packaging.requirements import Requirement
from PIL import Image
from tiny_adapter import SIZE, save_tiny_adapter
from tiny_models import save_tiny_pipeline

HIDE = """
import sys
for name in {hidden!r}:
    sys.modules[name] = None  # as if it were not installed
"""
GENERATE = """
import torch
torch.set_num_threads(1)
from diffusers import WanPipeline
import refalign_adapter as ra
pipe = ra.load_adapter(WanPipeline.from_pretrained({base!r}), {adapter!r})
video = pipe("a dog", reference_images=ra.read_images({image!r}), num_inference_steps=1, **{size!r}).frames[0]
ra.write_video({output!r}, video, fps=8)
"""
COMMAND = """
from refalign_adapter.commands.app import main
main({arguments!r})
"""
RECIPE = "pretrained_model_name_or_path: base\noutput_dir: out\ndata: {cache_dir: cache, train_data: clips}\n"


@cache
def needed(name):
    """The distributions that one needs without extras, itself among them; Python's own tools count as there."""
    found, left = set(), [Requirement(name)]
    while left:
        requirement = left.pop()
        key = (re.sub(r"[-_.]+", "-", requirement.name).lower(), frozenset(requirement.extras))
        if key in found:
            continue
        found.add(key)
        try:
            required = importlib.metadata.requires(requirement.name) or []
        except importlib.metadata.PackageNotFoundError:  # of a marker for another platform's build
            continue
        for item in map(Requirement, required):
            extras = [*requirement.extras, ""]
            if item.marker is None or any(item.marker.evaluate({"extra": extra}) for extra in extras):
                left.append(item)
    return {name for name, _ in found} | {"pip", "setuptools"}


def hidden_modules():
    """Importable top-level names that only packages of extras bring."""
    core = needed("refalign-adapter")
    names = [
        name
        for name, owners in importlib.metadata.packages_distributions().items()
        if name.isidentifier() and not {re.sub(r"[-_.]+", "-", owner).lower() for owner in owners} & core
    ]
    return sorted(names)


def run(code, folder, **given):
    text = HIDE.format(hidden=hidden_modules()) + code.format(**given)
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": "", "HF_HUB_OFFLINE": "1"}
    return subprocess.run([sys.executable, "-c", text], cwd=folder, env=environment, capture_output=True, text=True)


def test_what_is_hidden_is_what_extras_bring():
    hidden = hidden_modules()
    assert {"bitsandbytes", "datasets", "ijson", "pycocotools", "tensorboard", "pytest", "matplotlib"} <= set(hidden)
    assert not {"torch", "diffusers", "peft", "accelerate", "transformers", "av", "PIL", "typer"} & set(hidden)


def test_loads_and_generates(tmp_path):
    base, adapter = save_tiny_pipeline(tmp_path / "base"), save_tiny_adapter(tmp_path / "adapter")
    Image.new("RGB", (40, 24), (200, 0, 0)).save(tmp_path / "a.png")
    paths = {"base": str(base), "adapter": str(adapter), "image": str(tmp_path / "a.png")}
    result = run(GENERATE, tmp_path, **paths, output=str(tmp_path / "out.mp4"), size=SIZE)
    assert result.returncode == 0, result.stderr
    assert (tmp_path / "out.mp4").stat().st_size > 0


@pytest.mark.parametrize(
    ("command", "changes", "lines"),
    [
        (
            "train",
            ["data.train_data=null"],
            [
                "error: recipe.yaml: optimizer: 'adamw8bit' is none of torch's, and bitsandbytes is not installed; "
                "pip install 'refalign-adapter[train]', or use adamw",
                "error: recipe.yaml: report_to: tensorboard is not installed; pip install 'refalign-adapter[train]', "
                "or set report_to=null",
            ],
        ),
        (
            "cache",
            ["data.train_data=rows.parquet"],
            [
                "error: train_data: cannot read 'rows.parquet': datasets is not installed; pip install "
                "'refalign-adapter[train]'"
            ],
        ),
    ],
)
def test_what_needs_more_says_what_to_install(tmp_path, command, changes, lines):
    (tmp_path / "recipe.yaml").write_text(RECIPE)
    (tmp_path / "rows.parquet").touch()
    result = run(COMMAND, tmp_path, arguments=[command, "--config", "recipe.yaml", *changes])
    assert result.returncode == 2, result.stderr
    assert result.stderr.splitlines() == lines
