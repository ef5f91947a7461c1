"""The recipes that come along: valid, launched as their first line says, copied with what that line names."""

import ast
import dataclasses

import pytest
import yaml
from accelerate.commands.config.config_args import load_config_from_file

from refalign_adapter.errors import UserError
from refalign_adapter.recipes.file import changes, load_recipe
from refalign_adapter.recipes.shipped import copy_recipe, list_recipes, recipe_path, recipes_folder

NAMES = list_recipes()
SMALL_GPU = {
    "wan2.1-t2v-1.3b": {},
    "wan2.1-t2v-14b": {
        "offload_activations": True,
        "quantization": "nf4",
        "adapter.reference_scale": 0.5,
        "data.num_frames": 49,
        "data.cache_dir": "cache/wan2.1-t2v-14b/stage1-24gb",
    },
    "wan2.2-ti2v-5b": {"offload_activations": True},
}
"""Models, and what lets the first stage fit 24 GB."""


def test_what_comes_along():
    stages = [f"{model}/stage{name}" for model in SMALL_GPU for name in ("1", "1-24gb", "2")]
    assert NAMES == ["demo/isolated", *stages]


@pytest.mark.parametrize("name", NAMES)
def test_recipe_is_valid_and_opens_with_its_command(name):
    recipe = load_recipe(recipe_path(name))
    words = recipe_path(name).read_text().splitlines()[0].split()
    assert words[:4] == ["#", "accelerate", "launch", "--config_file"]
    assert (recipes_folder().parent / words[4]).is_file()
    assert words[5:] == ["-m", "refalign_adapter.train", "--config", f"recipes/configs/{name}.yaml"]
    if name.endswith(("stage1", "stage2")):
        config = yaml.safe_load((recipes_folder().parent / words[4]).read_text())
        batch = recipe.train_batch_size * recipe.gradient_accumulation_steps * config["num_processes"]
        assert (batch, recipe.max_train_steps) == (128, 3000)
        size = (704, 1280, 121) if name.startswith("wan2.2") else (480, 832, 81)
        assert (recipe.data.height, recipe.data.width, recipe.data.num_frames) == size
        assert (recipe.alignment.weight, recipe.alignment.negative_weight, recipe.adapter.align_layers) == (1, 1, 9)
        assert dataclasses.astuple(recipe.dropout_shares()) == (0.1, 0.0, 0.0)
        assert (recipe.adapter.attention, recipe.adapter.lora_scope) == ("isolated", "reference")
        assert "# ours" in next(
            line for line in recipe_path(name).read_text().splitlines() if "learning_rate:" in line
        )


@pytest.mark.parametrize("model", SMALL_GPU)
def test_second_stage_goes_on_from_the_first(model):
    first, second = (load_recipe(recipe_path(f"{model}/stage{number}")) for number in (1, 2))
    assert second.init_adapter == f"{first.output_dir}/adapter"
    assert second.adapter == first.adapter
    assert second.learning_rate == first.learning_rate / 5  # as in the paper


@pytest.mark.parametrize("model", SMALL_GPU)
def test_first_stage_for_a_small_gpu_is_the_first_stage(model):
    name = f"{model}/stage1"
    full, small = (load_recipe(recipe_path(each)) for each in (name, f"{name}-24gb"))
    found = {field: value for field, _, value in changes(full.model_dump(), small.model_dump())}
    assert found == {"output_dir": f"outputs/{name}-24gb", **SMALL_GPU[model]}
    assert "estimated" in recipe_path(f"{name}-24gb").read_text()


@pytest.mark.parametrize("path", sorted(recipes_folder().glob("accelerate/*.yaml")), ids=lambda path: path.stem)
def test_accelerate_reads_its_configurations(path):
    config = load_config_from_file(str(path))
    assert config.mixed_precision == ("no" if path.stem == "cpu" else "bf16")


def test_a_copy_names_its_copies(tmp_path):
    copy = copy_recipe("wan2.1-t2v-1.3b/stage1", tmp_path / "mine" / "recipe.yaml")
    first = copy.read_text().splitlines()[0]
    assert first == (
        f"# accelerate launch --config_file {tmp_path}/mine/multi_gpu_bf16.yaml -m refalign_adapter.train "
        f"--config {tmp_path}/mine/recipe.yaml"
    )
    assert load_recipe(copy) == load_recipe(recipe_path("wan2.1-t2v-1.3b/stage1"))
    assert (tmp_path / "mine" / "multi_gpu_bf16.yaml").is_file()
    assert copy_recipe("demo/isolated", tmp_path).name == "demo-isolated.yaml"
    with pytest.raises(UserError, match="exists already; choose another name"):
        copy_recipe("demo/isolated", tmp_path)


def test_unknown_recipe_is_told_with_those_there_are():
    with pytest.raises(UserError, match=r"^recipe: there is no 'wan2.1-t2v-14b/stage'; choose one of demo/isolated, "):
        recipe_path("wan2.1-t2v-14b/stage")


def test_scripts_are_the_packages_commands():
    for name in ("train", "cache"):
        tree = ast.parse((recipes_folder() / f"{name}.py").read_text())
        imports = [node.module for node in ast.walk(tree) if isinstance(node, ast.ImportFrom)]
        assert imports == [f"refalign_adapter.{name}"]
