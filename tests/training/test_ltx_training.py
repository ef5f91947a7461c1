"""LTX-Video from clips to a video: cached, estimated, trained and validated, sampled, loaded, generated with."""

import json

import pytest
import torch
import yaml
from tiny_data import write_data
from tiny_ltx import tiny_ltx_pipeline
from tiny_models import tiny_dinov2

import refalign_adapter as ra
from refalign_adapter.commands.app import main as command
from refalign_adapter.data.cache.build import cache_dataset
from refalign_adapter.errors import ConfigError
from refalign_adapter.export.folder import open_adapter
from refalign_adapter.recipes.cache_options import options_of
from refalign_adapter.recipes.file import load_recipe
from refalign_adapter.train import main as train
from refalign_adapter.training.base_model import read_base
from refalign_adapter.training.setup import step_options
from refalign_adapter.training.step import TrainingStep


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    """A folder with `base`, clips and `recipe.yaml`."""
    folder = tmp_path_factory.mktemp("ltx")
    tiny_ltx_pipeline().save_pretrained(folder / "base")
    tiny_dinov2(folder / "teacher")
    manifest = write_data(folder / "data", frames=9, height=64, width=96, fps=25)
    values = {
        "pretrained_model_name_or_path": str(folder / "base"),
        "output_dir": str(folder / "out"),
        "max_train_steps": 2,
        "train_batch_size": 2,
        "learning_rate": 1e-2,
        "min_8bit_size": 16,
        "gradient_checkpointing": True,
        "validation_steps": 2,
        "sample_steps": 2,
        "sample_prompts": [
            {"prompt": "a thing moves", "references": [str(folder / "data" / "references" / "0_0.png")]}
        ],
        "sample": {"num_inference_steps": 2},
        "report_to": None,
        "adapter": {"r": 4, "align_layers": 2, "teachers": [str(folder / "teacher")], "max_sequence_length": 16},
        "data": {
            "train_data": str(manifest),
            "validation_rows": 1,
            "cache_dir": str(folder / "cache"),
            "height": 64,
            "width": 96,
            "num_frames": 9,
            "fps": 25,
        },
    }
    (folder / "recipe.yaml").write_text(yaml.safe_dump(values))
    return folder


MODES = ["isolated/reference", "isolated/all", "joint/all", "joint/all/clean"]


@pytest.mark.parametrize("mode", MODES)
def test_it_is_trained_and_generates(world, tmp_path, capsys, mode):
    attention, scope, *clean = mode.split("/")
    shares = 0 if scope == "reference" else 0.1
    changes = [
        f"output_dir={tmp_path / 'out'}",
        f"adapter.attention={attention}",
        f"adapter.lora_scope={scope}",
        f"dropout={{references: {shares}, both: {shares}}}",
        *(f"adapter.reference_timestep={value}" for value in clean),
    ]
    config = world / "recipe.yaml"
    cache_dataset(options_of(load_recipe(config, changes)), device="cpu")
    with pytest.raises(SystemExit) as stop:
        command(["estimate", "--config", str(config), *changes])
    assert not stop.value.code, capsys.readouterr()
    assert train(["--config", str(config), *changes]) == 0, capsys.readouterr()
    adapter, (sample,) = tmp_path / "out" / "adapter", (tmp_path / "out").rglob("*.mp4")
    assert sample.stat().st_size
    assert json.loads((adapter / "refalign_config.json").read_text())["base"]["family"] == "ltx"
    assert any(weight.any() for name, weight in open_adapter(adapter).tensors().items() if "lora_B" in name)
    video = tmp_path / "video.mp4"
    given = {"base": world / "base", "adapter": adapter, "prompt": "a thing", "output": video, "device": "cpu"}
    given |= {"height": 64, "width": 96, "num-frames": 9, "num-inference-steps": 2, "fps": 25}
    image = ["--reference", str(world / "data" / "references" / "0_0.png")]
    with pytest.raises(SystemExit) as stop:
        command(["generate", *image, *(part for name, value in given.items() for part in (f"--{name}", str(value)))])
    assert not stop.value.code, capsys.readouterr()
    assert video.stat().st_size


def test_sigmas_are_shifted_by_the_number_of_the_videos_tokens(world):
    recipe = load_recipe(world / "recipe.yaml")
    _, shift = read_base(recipe)
    assert [shift(tokens) for tokens in (1024, 4096)] == pytest.approx([2.585710, 7.767901], abs=1e-6)
    branch = ra.attach(tiny_ltx_pipeline().transformer, recipe.adapter_config())
    step = TrainingStep(branch, [], step_options(recipe, shift))
    assert step.shift(torch.empty(2, 16, 4, 16, 16)) == shift(1024)
    _, given = read_base(load_recipe(world / "recipe.yaml", ["flow.shift=4"]))
    assert given(1024) == given(4096) == 4


def test_clips_of_another_rate_are_refused(world):
    options = options_of(load_recipe(world / "recipe.yaml", ["data.fps=16", "data.height=80"]))
    with pytest.raises(ConfigError) as caught:
        cache_dataset(options, device="cpu")
    assert [problem.split(" must")[0] for problem in caught.value.problems] == ["height", "data.fps"]
    assert "data.fps must be 25, of which 'ltx' makes positions, or null; got 16" in caught.value.problems
