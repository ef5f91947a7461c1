"""Adapter folders: those of earlier versions load, the same weights give the same bytes, nothing local leaves."""

import json
import os
import shutil
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file
from tiny_adapter import save_tiny_adapter, velocity, weights_of
from tiny_models import tiny_pipeline, tiny_transformer

import refalign_adapter as ra
from refalign_adapter.export.folder import open_adapter
from refalign_adapter.export.formats import FACTS_KEY

OLD = Path(__file__).parents[1] / "data" / "adapters"
"""Folders written by version 0.1.0, before they had a format's version, and what its pipeline made with them."""


@pytest.mark.parametrize("name", ["joint", "isolated_all", "isolated_reference", "joint_regex"])
def test_folders_of_the_first_version_give_what_they_gave(tmp_path, name):
    references = torch.randn(1, 16, 2, 4, 6, generator=torch.Generator().manual_seed(9))
    expected = load_file(OLD / "expected.safetensors")[name]
    folder = OLD / name
    for _ in range(2):  # the second time as this version writes it
        pipe = ra.load_adapter(tiny_pipeline(), folder)
        with pipe.branch.references(references):
            torch.testing.assert_close(velocity(pipe.transformer), expected, atol=2e-5, rtol=0)
        folder = pipe.branch.save_pretrained(tmp_path / "again")
    values = json.loads((folder / "refalign_config.json").read_text())
    assert (values["format_version"], values["refalign_adapter_version"]) == (1, ra.__version__)
    before = json.loads((OLD / name / "refalign_config.json").read_text())
    assert [key for key in values if key in before] == list(before)  # in their order
    assert set(values) - set(before) == {"format_version", "refalign_adapter_version"}
    with safe_open(weights_of(folder), "pt") as file:
        facts = json.loads(file.metadata()[FACTS_KEY])
    assert facts == {"format_version": 1, "attention": values["attention"], "lora_scope": values["lora_scope"]}


@pytest.mark.parametrize(
    ("name", "unsaid"), [("joint", ["attention", "lora_scope"]), ("isolated_all", ["lora_scope"])]
)
def test_what_a_folder_of_the_first_version_does_not_say_is_what_was_the_default_then(tmp_path, name, unsaid):
    folder = shutil.copytree(OLD / name, tmp_path / "a")
    values = json.loads((folder / "refalign_config.json").read_text())
    (folder / "refalign_config.json").write_text(json.dumps({k: v for k, v in values.items() if k not in unsaid}))
    assert open_adapter(folder).config == open_adapter(OLD / name).config


def test_regular_expressions_of_a_recipe_are_saved_as_the_names_they_mean(tmp_path):
    folder = save_tiny_adapter(
        tmp_path / "a",
        target_modules=r"blocks\.\d\.attn1\.to_[qk]",
        rank_pattern={r"blocks\.[01]\.attn1\.to_q": 3},
        alpha_pattern={r".*to_k": 5},
    )
    values = json.loads((folder / "refalign_config.json").read_text())
    assert values["target_modules"] == sorted(f"blocks.{i}.attn1.to_{x}" for i in range(3) for x in "qk")
    assert values["rank_pattern"] == {f"blocks.{i}.attn1.to_q": 3 for i in range(2)}
    assert values["alpha_pattern"] == {f"blocks.{i}.attn1.to_k": 5 for i in range(3)}
    ours, stock = tiny_pipeline(), tiny_pipeline()
    ra.load_adapter(ours, folder)
    stock.load_lora_weights(str(folder))
    assert torch.equal(velocity(ours.transformer), velocity(stock.transformer))
    assert ra.RefAlignConfig.load(folder).rank_pattern == values["rank_pattern"]


@pytest.mark.parametrize("scope", ["all", "reference"])
def test_the_same_weights_give_the_same_bytes_with_the_umasks_mode(tmp_path, scope):
    before = os.umask(0o027)
    try:
        contents = set()
        for number in range(6):
            folder = save_tiny_adapter(tmp_path / str(number), attention="isolated", lora_scope=scope)
            files = sorted(folder.iterdir())
            contents.add(tuple(path.read_bytes() for path in files))
            assert {path.stat().st_mode & 0o777 for path in files} == {0o640}
    finally:
        os.umask(before)
    assert len(contents) == 1


def test_no_local_path_is_written(tmp_path):
    (tmp_path / "secret" / "my-base").mkdir(parents=True)
    (tmp_path / "secret" / "dino").mkdir()
    local = str(tmp_path / "secret")
    folder = save_tiny_adapter(
        tmp_path / "a", base_model=f"{local}/my-base", teachers=(f"{local}/dino/", "facebook/dinov2-base")
    )
    written = b"".join(path.read_bytes() for path in folder.iterdir())
    assert local.encode() not in written
    config = ra.RefAlignConfig.load(folder)
    assert (config.base_model, config.teachers) == ("my-base", ("dino", "facebook/dinov2-base"))


def lora(folder):
    folder.mkdir(parents=True, exist_ok=True)
    pipe = tiny_pipeline()
    ra.attach(pipe.transformer, ra.RefAlignConfig(attention="joint", r=2, align_layers=1))
    pipe.save_lora_weights(str(folder), transformer_lora_layers=_state(pipe.transformer))


def _state(transformer):
    from peft import get_peft_model_state_dict

    return get_peft_model_state_dict(transformer, adapter_name="refalign")


def renamed(old, new):
    """A LoRA under the names of another tool."""

    def make(folder):
        from safetensors.torch import save_file

        lora(folder)
        (path,) = folder.glob("*.safetensors")
        tensors = {key.replace(*old).replace(*new): tensor for key, tensor in load_file(path).items()}
        path.unlink()
        save_file(tensors, folder / "style.safetensors")

    return make


def control(folder):
    from safetensors.torch import save_file

    folder.mkdir()
    tensors = {f"transformer.patch_embedding.lora_{x}.weight": torch.zeros(2, 2) for x in "AB"}
    save_file(tensors, folder / "pytorch_lora_weights.safetensors")


def whole_file(folder):
    from safetensors.torch import save_file

    folder.mkdir()
    state = {f"model.{name}": tensor.clone() for name, tensor in tiny_transformer().state_dict().items()}
    save_file(state, folder / "wan2.1_t2v_1.3B.safetensors")


def run(folder):
    save_tiny_adapter(folder / "adapter")


def unfinished(folder):
    for step in (9, 10):
        save_tiny_adapter(folder / f"checkpoint-{step}" / "adapter")
    (folder / "checkpoint-x").mkdir()


def peft_adapter(folder):
    from peft import LoraConfig

    LoraConfig(r=2, target_modules=["to_q"]).save_pretrained(str(folder))


KINDS = {
    "a style LoRA": (lora, "holds pytorch_lora_weights.safetensors, a LoRA without references .* load_lora_weights"),
    "of ComfyUI": (renamed(("transformer.", "diffusion_model."), ("_A", "_down")), "holds style.safetensors, a LoRA "),
    "a control LoRA": (control, "holds .*, a control LoRA for further input channels"),
    "a pipeline": (lambda folder: tiny_pipeline().save_pretrained(folder), "is a whole diffusers pipeline, a base"),
    "a transformer": (
        lambda folder: tiny_transformer().save_pretrained(folder),
        r"is a whole model \(WanTransformer3DModel\), no adapter; WanTransformer3DModel.from_pretrained opens it",
    ),
    "a checkpoint": (whole_file, "holds wan2.1_t2v_1.3B.safetensors, the weights of a whole model"),
    "PEFT's own": (peft_adapter, "is an adapter of PEFT itself"),
    "a run": (run, "is a training run's folder; its adapter is '.*/a/adapter'"),
    "an unfinished run": (unfinished, "is a training run's folder; its adapter is '.*/a/checkpoint-10/adapter'"),
    "nothing": (lambda folder: folder.mkdir(), "is no adapter folder, it lacks refalign_config.json and pytorch"),
}


@pytest.mark.parametrize("kind", KINDS)
def test_what_is_of_another_kind_says_what_it_is_and_what_opens_it(tmp_path, kind):
    make, message = KINDS[kind]
    make(tmp_path / "a")
    with pytest.raises(ra.UserError, match=f"^adapter: .*/a' {message}") as caught:
        open_adapter(tmp_path / "a")
    assert "\n" not in str(caught.value)


def test_a_single_file_says_what_it_is(tmp_path):
    folder = save_tiny_adapter(tmp_path / "a")
    lora(tmp_path / "b")
    (tmp_path / "x.pt").touch()
    (tmp_path / "y.txt").touch()
    cases = {
        weights_of(folder): "is one file of an adapter; give its folder, '.*/a'$",
        tmp_path / "b" / "pytorch_lora_weights.safetensors": "is a LoRA without references",
        tmp_path / "x.pt": "is a pickle, which can run code",
        tmp_path / "y.txt": "is a file; give the folder that holds refalign_config.json",
    }
    for path, message in cases.items():
        with pytest.raises(ra.UserError, match=message):
            open_adapter(path)
