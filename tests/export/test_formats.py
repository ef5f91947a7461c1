"""Weights files: stock loaders take what is for all tokens and refuse what is for references alone."""

import json
import logging

import pytest
import torch
from diffusers import WanPipeline
from peft import LoraConfig, PeftConfig, get_peft_model_state_dict, set_peft_model_state_dict
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from tiny_adapter import anatomy, save_tiny_adapter, velocity, weights_of
from tiny_models import tiny_pipeline, tiny_transformer

import refalign_adapter as ra
from refalign_adapter.export.folder import open_adapter
from refalign_adapter.export.formats import FORMATS, REFERENCE, STOCK, format_of, require_scope_all

SCOPED = {"attention": "isolated", "lora_scope": "reference", "align_layers": 1}
CONFIGS = {"all": {"attention": "joint", "align_layers": 1}, "reference": SCOPED}


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """One adapter of each scope; not to be changed."""
    root = tmp_path_factory.mktemp("adapters")
    return {scope: save_tiny_adapter(root / scope, **changes) for scope, changes in CONFIGS.items()}


def lora_metadata(folder):
    """The LoraConfig's fields that stock loaders read."""
    form = format_of(open_adapter(folder).config)
    with safe_open(folder / form.file_name, "pt") as file:
        text = file.metadata()[form.metadata_key]
    return {name.removeprefix("transformer."): value for name, value in json.loads(text).items()}


def weights_on(transformer, name="refalign"):
    return get_peft_model_state_dict(transformer, adapter_name=name)


@pytest.mark.parametrize("scope", FORMATS)
def test_names_go_there_and_back(scope):
    form = FORMATS[scope]
    transformer = tiny_transformer()
    branch = ra.attach(transformer, ra.RefAlignConfig(r=2, **CONFIGS[scope]))
    names = list(weights_on(transformer))
    keys = [form.key(name) for name in names]
    assert len(names) == len(list(branch.named_parameters())) > 0
    assert len(set(keys)) == len(keys)
    assert [form.name(key) for key in keys] == names
    assert all(key.startswith("transformer.") for key in keys)
    assert all(("lora" in key) == (scope == "all") for key in keys)
    (other,) = (item for item in FORMATS.values() if item is not form)
    for key in (other.key(names[0]), names[0], "unet." + names[0]):
        with pytest.raises(ra.UserError, match=f"is no weight of a {form.file_name}"):
            form.name(key)


def test_keys_are_as_documented():
    name = "blocks.0.attn1.to_out.0.lora_B.weight"
    assert STOCK.key(name) == "transformer.blocks.0.attn1.to_out.0.lora_B.weight"
    assert REFERENCE.key(name) == "transformer.blocks.0.attn1.to_out.0.reference_up.weight"


@pytest.mark.parametrize("scope", FORMATS)
def test_a_saved_folder_has_one_weights_file_with_what_the_strength_depends_on(tmp_path, scope):
    patterns = {"rank_pattern": {"attn1.to_q": 2}, "alpha_pattern": {"attn1.to_k": 16}}
    transformer = tiny_transformer()
    branch = ra.attach(transformer, ra.RefAlignConfig(r=4, lora_alpha=10, **patterns, **CONFIGS[scope]), seed=0)
    branch.save_pretrained(tmp_path / "a")
    assert sorted(path.name for path in (tmp_path / "a").iterdir()) == sorted(
        ["README.md", "refalign_config.json", FORMATS[scope].file_name]
    )
    assert weights_of(tmp_path / "a") == tmp_path / "a" / FORMATS[scope].file_name
    read, trained = open_adapter(tmp_path / "a").tensors(), weights_on(transformer)
    assert read.keys() == trained.keys()
    assert all(torch.equal(read[name], trained[name]) for name in read)
    metadata = lora_metadata(tmp_path / "a")
    assert {name: metadata[name] for name in ("r", "lora_alpha")} == {"r": 4, "lora_alpha": 10}
    assert {name: metadata[name] for name in patterns} == patterns
    assert sorted(metadata["target_modules"]) == sorted(branch.config.target_modules)
    assert metadata.keys() == {"r", "lora_alpha", "rank_pattern", "alpha_pattern", "target_modules"}


def test_half_the_size_in_half_the_precision(tmp_path):
    transformer = tiny_transformer()
    branch = ra.attach(transformer, ra.RefAlignConfig(r=4, **SCOPED), seed=0)
    branch.save_pretrained(tmp_path / "a", dtype=torch.bfloat16)
    trained = weights_on(transformer)
    assert all(torch.equal(t, trained[name].bfloat16()) for name, t in open_adapter(tmp_path / "a").tensors().items())


STOCK_LOADERS = {
    "load_lora_weights(folder)": lambda pipe, folder: pipe.load_lora_weights(str(folder)),
    "load_lora_weights(file)": lambda pipe, folder: pipe.load_lora_weights(
        str(folder), weight_name=REFERENCE.file_name
    ),
    "load_lora_weights(state)": lambda pipe, folder: pipe.load_lora_weights(load_file(weights_of(folder))),
    "load_lora_adapter(folder)": lambda pipe, folder: pipe.transformer.load_lora_adapter(
        str(folder), use_safetensors=True
    ),
    "load_lora_adapter(file)": lambda pipe, folder: pipe.transformer.load_lora_adapter(
        str(folder), weight_name=REFERENCE.file_name
    ),
    "load_lora_adapter(file, prefix)": lambda pipe, folder: pipe.transformer.load_lora_adapter(
        str(folder), weight_name=REFERENCE.file_name, prefix=None
    ),
    "PeftConfig": lambda pipe, folder: PeftConfig.from_pretrained(str(folder)),
}


@pytest.mark.parametrize("load", STOCK_LOADERS.values(), ids=STOCK_LOADERS)
def test_stock_loaders_refuse_what_is_for_references_alone(folders, load):
    pipe = tiny_pipeline()
    before, output = anatomy(pipe.transformer), velocity(pipe.transformer)
    with pytest.raises((ValueError, IndexError)):
        load(pipe, folders["reference"])
    assert anatomy(pipe.transformer) == before
    assert torch.equal(velocity(pipe.transformer), output)


def test_stock_loaders_take_what_is_for_all_tokens(folders):
    base = velocity(tiny_transformer())
    for name in ("load_lora_weights(folder)", "load_lora_weights(state)", "load_lora_adapter(folder)"):
        pipe = tiny_pipeline()
        STOCK_LOADERS[name](pipe, folders["all"])
        assert (velocity(pipe.transformer) - base).abs().max() > 1e-3


def test_under_another_prefix_diffusers_loads_nothing(folders):
    transformer = tiny_transformer()
    before, output = anatomy(transformer), velocity(transformer)
    transformer.load_lora_adapter(str(folders["reference"]), use_safetensors=True, prefix="unet")
    assert anatomy(transformer) == before
    assert torch.equal(velocity(transformer), output)


@pytest.mark.parametrize("prefix", ["", "base_model.model."])
def test_peft_takes_nothing_of_it(folders, prefix):
    transformer = tiny_transformer()
    transformer.add_adapter(LoraConfig(r=4, lora_alpha=8, target_modules=["to_q", "to_k"]))
    before = {name: tensor.clone() for name, tensor in transformer.state_dict().items()}
    state = load_file(weights_of(folders["reference"]))
    state = {prefix + key.removeprefix("transformer."): tensor for key, tensor in state.items()}
    result = set_peft_model_state_dict(transformer, state, adapter_name="default")
    assert len(result.unexpected_keys) == len(state)
    assert all(torch.equal(tensor, before[name]) for name, tensor in transformer.state_dict().items())


@pytest.mark.parametrize("order", [("all", "reference"), ("reference", "all")], ids=" then ".join)
def test_saving_over_an_adapter_of_the_other_scope_leaves_one_weights_file(tmp_path, order):
    for scope in order:
        save_tiny_adapter(tmp_path / "a", **CONFIGS[scope])
        (tmp_path / "a" / "notes.txt").write_text("mine")
    assert sorted(path.name for path in (tmp_path / "a").iterdir()) == sorted(
        ["README.md", "notes.txt", "refalign_config.json", FORMATS[order[1]].file_name]
    )
    assert open_adapter(tmp_path / "a").path == tmp_path / "a"


@pytest.mark.parametrize("scope", FORMATS)
def test_a_folder_with_both_or_the_wrong_weights_is_refused(tmp_path, folders, scope):
    (other,) = set(FORMATS) - {scope}
    folder = save_tiny_adapter(tmp_path / "a", **CONFIGS[scope])
    wrong = folder / FORMATS[other].file_name
    wrong.write_bytes(weights_of(folders[other]).read_bytes())
    both = f"holds {STOCK.file_name} and {REFERENCE.file_name}, .* lora_scope '{scope}', .*; delete {wrong.name}$"
    with pytest.raises(ra.UserError, match=both) as caught:
        open_adapter(folder)
    assert "\n" not in str(caught.value)
    weights_of(folder).unlink()
    message = f"holds {wrong.name}, .* lora_scope '{scope}', whose weights are in {FORMATS[scope].file_name} alone"
    with pytest.raises(ra.UserError, match=message) as caught:
        open_adapter(folder)
    assert "\n" not in str(caught.value)
    wrong.unlink()
    with pytest.raises(ra.UserError, match=f"is no adapter folder, it lacks {FORMATS[scope].file_name}"):
        open_adapter(folder)
    (folder / "refalign_config.json").unlink()
    with pytest.raises(ra.UserError, match=f"it lacks refalign_config.json and {STOCK.file_name}"):
        open_adapter(folder)


@pytest.mark.parametrize("scope", FORMATS)
def test_renaming_the_file_does_not_help(tmp_path, folders, scope):
    (other,) = set(FORMATS) - {scope}
    folder = save_tiny_adapter(tmp_path / "a", **CONFIGS[scope])
    weights_of(folder).write_bytes(weights_of(folders[other]).read_bytes())
    with pytest.raises(ra.UserError, match="is no weight of a"):
        open_adapter(folder)


def test_the_hub_is_asked_for_both_names(tmp_path, monkeypatch, folders):
    asked = {}

    def snapshot_download(repo_id, **options):
        asked.update(options, repo_id=repo_id)
        return str(folders["reference"])

    monkeypatch.setattr("huggingface_hub.snapshot_download", snapshot_download)
    assert open_adapter("you/adapter", revision="main", token="secret").path == folders["reference"]
    assert asked == {
        "repo_id": "you/adapter",
        "repo_type": "model",
        "local_files_only": True,  # no test goes out
        "revision": "main",
        "token": "secret",
        "allow_patterns": ["refalign_config.json", STOCK.file_name, REFERENCE.file_name],
    }


def test_formats_that_cannot_hold_the_scope_are_refused_with_the_reason():
    for attention in ("joint", "isolated"):
        config = ra.RefAlignConfig(attention=attention, lora_scope="all")
        require_scope_all(config, "format")
        assert format_of(config) is STOCK
    config = ra.RefAlignConfig(attention="isolated", lora_scope="reference")
    assert format_of(config) is REFERENCE
    with pytest.raises(ra.UserError, match="^kohya: .* reference tokens alone .* video tokens too; save it") as caught:
        require_scope_all(config, "kohya")
    assert "\n" not in str(caught.value)


@pytest.fixture(scope="module")
def both(folders, tmp_path_factory):
    """A pipeline with an adapter of either scope and a style LoRA."""
    other = save_tiny_adapter(tmp_path_factory.mktemp("adapters") / "other", r=6, lora_alpha=6, **CONFIGS["all"])
    pipe = tiny_pipeline()
    pipe.transformer.add_adapter(
        LoraConfig(r=4, target_modules=["to_q", "to_k", "to_v"], init_lora_weights=False), adapter_name="style"
    )
    pipe = ra.load_adapter(pipe, other, adapter_name="all")
    return ra.load_adapter(pipe, folders["reference"], adapter_name="scoped")


CHANGED = {
    "as they are": lambda state: state,
    "cast": lambda state: {name: tensor.half() for name, tensor in state.items()},
    "renamed": lambda state: {f"blocks.{index}": tensor.clone() for index, tensor in enumerate(state.values())},
    "some of them": lambda state: {name: tensor for name, tensor in state.items() if ".attn1.to_v." in name},
}


@pytest.mark.parametrize("change", CHANGED.values(), ids=CHANGED)
def test_a_pipeline_does_not_write_weights_for_references_alone_as_stock_weights(tmp_path, both, change):
    layers = change(weights_on(both.transformer, "scoped"))
    with pytest.raises(ra.UserError, match="^save_lora_weights: this adapter acts on reference tokens alone"):
        both.save_lora_weights(tmp_path / "a", layers)
    with pytest.raises(ra.UserError, match="^save_lora_weights: "):
        both.save_lora_weights(save_directory=tmp_path / "a", transformer_lora_layers=layers)
    assert not (tmp_path / "a").exists()


@pytest.mark.parametrize("name", ["all", "style"])
def test_a_pipeline_writes_other_loras_as_diffusers_does(tmp_path, both, name):
    layers = weights_on(both.transformer, name)
    metadata = {"r": 6, "lora_alpha": 8}
    both.save_lora_weights(tmp_path / "ours", layers, transformer_lora_adapter_metadata=metadata)
    WanPipeline.save_lora_weights(tmp_path / "stock", layers, transformer_lora_adapter_metadata=metadata)
    ours, stock = (tmp_path / kind / STOCK.file_name for kind in ("ours", "stock"))
    with safe_open(ours, "pt") as one, safe_open(stock, "pt") as two:
        assert one.metadata() == two.metadata()
    one, two = load_file(ours), load_file(stock)
    assert one.keys() == two.keys()
    assert all(torch.equal(one[name], two[name]) for name in one)
    with pytest.raises(ValueError, match="at least one of|must pass"):
        both.save_lora_weights(tmp_path / "none")


def test_lost_metadata_is_told_by_the_strength(tmp_path, caplog):
    folder = save_tiny_adapter(tmp_path / "a", **SCOPED)
    path = weights_of(folder)
    with safe_open(path, "pt") as file:
        assert json.loads(file.metadata()[REFERENCE.metadata_key])["transformer.lora_alpha"] == 8
    save_file(load_file(path), path, metadata={"format": "pt"})
    with caplog.at_level(logging.ERROR), pytest.raises(ra.UserError, match="says lora_alpha 4 and .* 8; its metadata"):
        ra.load_adapter(tiny_pipeline(), folder)
