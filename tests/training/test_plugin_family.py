"""A base whose classes are another package's: cached, estimated and trained, by a recipe that names its family."""

import pytest
import toy_video_dit
from tiny_toy import tiny_toy_pipeline

import refalign_adapter as ra
from refalign_adapter.commands.app import main as command
from refalign_adapter.data.cache.build import cache_dataset
from refalign_adapter.export.folder import open_adapter
from refalign_adapter.recipes.cache_options import options_of
from refalign_adapter.recipes.file import load_recipe
from refalign_adapter.train import main as train


@pytest.mark.parametrize("mode", ["isolated/reference", "joint/all"])
def test_a_recipe_may_name_a_family_by_its_path(tiny_world, tmp_path, capsys, mode):
    tiny_toy_pipeline().save_pretrained(tmp_path / "base")
    attention, scope = mode.split("/")
    changes = [
        f"pretrained_model_name_or_path={tmp_path / 'base'}",
        "family=toy_video_dit:FAMILY",
        f"output_dir={tmp_path / 'out'}",
        f"data.cache_dir={tmp_path / 'cache'}",
        f"adapter.attention={attention}",
        f"adapter.lora_scope={scope}",
        "dropout.references=0",
        "dropout.both=0",
        "gradient_checkpointing=true",
        "max_train_steps=2",
        "validation_steps=2",
        "sample_steps=2",
        f"sample_prompts=[{{prompt: a cat, references: [{tiny_world / 'clips' / '0_0.png'}]}}]",
        "sample.num_inference_steps=1",
    ]
    config = tiny_world / "recipe.yaml"
    cache_dataset(options_of(load_recipe(config, changes)), device="cpu")
    with pytest.raises(SystemExit) as stop:
        command(["estimate", "--config", str(config), *changes])
    assert not stop.value.code, capsys.readouterr()
    assert train(["--config", str(config), *changes]) == 0, capsys.readouterr()
    adapter = tmp_path / "out" / "adapter"
    assert list((tmp_path / "out").rglob("*.mp4"))
    written = [*adapter.rglob("*.json"), *(tmp_path / "cache").rglob("*.json")]
    assert written
    assert [path for path in written if "toy_video_dit" in path.read_text()] == []
    assert any(weight.any() for name, weight in open_adapter(adapter).tensors().items() if "lora_B" in name)
    pipe = ra.load_adapter(tiny_toy_pipeline(), adapter, family=toy_video_dit.FAMILY)
    assert pipe.branch.config.attention == attention
