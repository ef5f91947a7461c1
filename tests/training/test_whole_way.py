"""Every family's whole way: cached, estimated, trained with validation and samples, merged, generated with."""

import pytest
from family_case import MODES
from family_cases import CASES
from tiny_data import write_data

import refalign_adapter as ra
from refalign_adapter.commands.app import main as command
from refalign_adapter.data.cache.build import cache_dataset
from refalign_adapter.export.folder import open_adapter
from refalign_adapter.families.lookup import PLUGINS
from refalign_adapter.media.video import probe_video
from refalign_adapter.recipes.cache_options import options_of
from refalign_adapter.recipes.file import load_recipe
from refalign_adapter.train import main as train

SIDE, FRAMES = 64, 9


def run(capsys, *arguments):
    with pytest.raises(SystemExit) as stop:
        command(list(map(str, arguments)))
    assert not stop.value.code, capsys.readouterr()


@pytest.fixture(scope="module")
def clips(tmp_path_factory):
    """Of as many frames as any family takes for two latent ones; returns their manifest."""
    return write_data(tmp_path_factory.mktemp("clips"), count=6, frames=FRAMES, height=SIDE, width=SIDE)


@pytest.mark.parametrize("mode", MODES, ids="/".join)
@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
def test_from_data_to_a_video(tiny_world, clips, tmp_path, capsys, case, mode):
    case.pipeline().save_pretrained(tmp_path / "base")
    family, module = case.family, type(case.family).__module__
    attention, scope = mode
    picture = clips.parent / "references" / "0_0.png"
    changes = [
        f"pretrained_model_name_or_path={tmp_path / 'base'}",
        f"family={module}:FAMILY",
        f"output_dir={tmp_path / 'out'}",
        f"data.cache_dir={tmp_path / 'cache'}",
        f"data.train_data={clips}",
        f"data.num_frames={FRAMES}",
        f"data.height={SIDE}",
        f"data.width={SIDE}",
        f"adapter.attention={attention}",
        f"adapter.lora_scope={scope}",
        "dropout.references=0",
        "dropout.both=0",
        "gradient_checkpointing=true",
        "max_train_steps=2",
        "validation_steps=2",
        "sample_steps=2",
        f"sample_prompts=[{{prompt: a cat, references: [{picture}]}}]",
        "sample.num_inference_steps=2",
    ]
    config = tiny_world / "recipe.yaml"
    cache_dataset(options_of(load_recipe(config, changes)), device="cpu")
    run(capsys, "estimate", "--config", config, *changes)
    assert train(["--config", str(config), *changes]) == 0, capsys.readouterr()
    adapter = tmp_path / "out" / "adapter"
    assert list((tmp_path / "out").rglob("*.mp4"))
    written = [*adapter.rglob("*.json"), *(tmp_path / "cache").rglob("*.json")]
    assert written
    assert [path for path in written if module in path.read_text()] == []
    assert any(weight.any() for name, weight in open_adapter(adapter).tensors().items() if "lora_B" in name)
    pipe = ra.load_adapter(case.pipeline(), adapter, family=family)
    assert pipe.branch.config.attention == attention
    if scope == "all":
        assert not hasattr(ra.merge_and_unload(pipe).transformer, "peft_config")
    if family.key in PLUGINS.known():
        size = ["--height", SIDE, "--width", SIDE, "--num-frames", FRAMES, "--num-inference-steps", 2]
        given = ["--base", tmp_path / "base", "--adapter", adapter, "--prompt", "a cat", "--reference", picture]
        run(capsys, "generate", *given, "--output", tmp_path / "cat.mp4", *size)
        facts = probe_video(tmp_path / "cat.mp4")
        assert (facts.height, facts.width) == (SIDE, SIDE)
