"""What training on LTX-Video draws by the size of the video, and the rate of frames that it takes."""

import shutil

import pytest
import torch
import yaml
from tiny_data import write_data
from tiny_ltx import tiny_ltx_pipeline
from tiny_models import tiny_dinov2

import refalign_adapter as ra
from refalign_adapter.data.cache.build import cache_dataset
from refalign_adapter.errors import ConfigError
from refalign_adapter.recipes.cache_options import options_of
from refalign_adapter.recipes.file import load_recipe
from refalign_adapter.training.base_model import read_base
from refalign_adapter.training.setup import step_options
from refalign_adapter.training.step import TrainingStep


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    """A folder with `base`, clips and `recipe.yaml`, whose rate is the recipes' own."""
    folder = tmp_path_factory.mktemp("ltx")
    tiny_ltx_pipeline().save_pretrained(folder / "base")
    tiny_dinov2(folder / "teacher")
    manifest = write_data(folder / "data", frames=9, height=64, width=96, fps=25)
    values = {
        "pretrained_model_name_or_path": str(folder / "base"),
        "output_dir": str(folder / "out"),
        "adapter": {"r": 4, "align_layers": 2, "teachers": [str(folder / "teacher")], "max_sequence_length": 16},
        "data": {"train_data": str(manifest), "cache_dir": str(folder / "cache"), "height": 64, "width": 96},
    }
    (folder / "recipe.yaml").write_text(yaml.safe_dump(values))
    return folder


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
    options = options_of(load_recipe(world / "recipe.yaml", ["data.height=80", "data.num_frames=9"]))
    with pytest.raises(ConfigError) as caught:
        cache_dataset(options, device="cpu")
    assert [problem.split(" must")[0] for problem in caught.value.problems] == ["height", "data.fps"]
    assert "data.fps must be 25, of which 'ltx' makes positions, or null; got 16" in caught.value.problems


def test_a_base_for_another_way_to_count_frames_is_refused(world, tmp_path):
    shutil.copytree(world / "base", tmp_path / "base")
    index = tmp_path / "base" / "model_index.json"
    index.write_text(index.read_text().replace("LTXPipeline", "LTXConditionPipeline"))
    recipe = load_recipe(world / "recipe.yaml", [f"pretrained_model_name_or_path={tmp_path / 'base'}"])
    with pytest.raises(ra.UserError, match="^base: this LTX-Video is for LTXConditionPipeline, "):
        read_base(recipe)
