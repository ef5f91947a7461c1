"""Loading shares and tells, unloading undoes, a failure leaves nothing; a stock pipeline takes the same folder."""

import json
import logging
from typing import Any

import pytest
import torch
from diffusers import WanPipeline, WanVideoToVideoPipeline
from peft import LoraConfig
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from tiny_adapter import SIZE, anatomy, picture, save_tiny_adapter, velocity, weights_of
from tiny_models import tiny_pipeline, tiny_transformer

import refalign_adapter as ra
from refalign_adapter.branch.attach import branch_of
from refalign_adapter.branch.lora import lora_parameters
from refalign_adapter.pipelines.reference_class import reference_class

PATTERNS: dict[str, Any] = {"rank_pattern": {"attn1.to_q": 2}, "alpha_pattern": {"ffn.net.2": 3, "attn2.to_k": 16}}
SCOPES: dict[str, dict[str, Any]] = {
    "all": {"attention": "joint"},
    "reference": {"attention": "isolated", "lora_scope": "reference", "align_layers": 1},
}


@pytest.fixture(scope="module")
def shared_base():
    """A pipeline whose transformer every test leaves as it was."""
    return tiny_pipeline()


@pytest.fixture
def base(shared_base):
    before, output = anatomy(shared_base.transformer), velocity(shared_base.transformer)
    yield shared_base
    if (branch := branch_of(shared_base.transformer)) is not None:
        branch.detach()
        shared_base.transformer.requires_grad_(True)
    assert anatomy(shared_base.transformer) == before
    assert torch.equal(velocity(shared_base.transformer), output)


def style(transformer):
    """Another LoRA, at half its strength."""
    config = LoraConfig(r=2, target_modules=["to_q"], init_lora_weights=False)
    with torch.random.fork_rng([]):
        torch.manual_seed(5)
        transformer.add_adapter(config, adapter_name="style")
    transformer.set_adapters(["style"], weights=[0.5])


def test_components_are_shared_and_nothing_else_changes(adapter):
    base: Any = tiny_pipeline()
    base.transformer.to(torch.bfloat16)
    before = dict(base.components)
    types = {name: parameter.dtype for name, parameter in base.transformer.named_parameters()}
    pipe = ra.load_adapter(base, str(adapter))
    assert type(pipe) is reference_class(WanPipeline)
    assert type(pipe).__name__ == "WanReferencePipeline"
    assert isinstance(pipe, WanPipeline)
    assert all(value is before[name] for name, value in pipe.components.items())
    assert {name: pipe.config[name] for name in ("boundary_ratio", "expand_timesteps")} == {
        "boundary_ratio": None,
        "expand_timesteps": False,
    }
    after = {name.replace(".base_layer", ""): p.dtype for name, p in base.transformer.named_parameters()}
    assert {name: after[name] for name in types} == types
    assert pipe.vae.dtype == torch.float32
    branch: Any = pipe.branch
    assert branch.config.r == 4
    assert not any(parameter.requires_grad for parameter in base.transformer.parameters())


def test_what_changes_is_told_and_unload_undoes_it(base, adapter, caplog):
    before, output = anatomy(base.transformer), velocity(base.transformer)
    with caplog.at_level(logging.INFO, "refalign_adapter"):
        pipe = ra.load_adapter(base, adapter)
    assert "LoRA named 'refalign' on 30 layers" in pipe.changes[0]
    assert "pipeline given to load_adapter" in pipe.changes[0]
    assert len(pipe.changes) == 3
    assert [record.getMessage() for record in caplog.records] == list(pipe.changes)
    assert (velocity(base.transformer) - output).abs().max() > 1e-3
    pipe("a cat", [picture()], num_inference_steps=1, output_type="latent", **SIZE)
    for _ in range(2):
        pipe.unload()
        assert anatomy(base.transformer) == before
        assert torch.equal(velocity(base.transformer), output)
        assert pipe.changes == ()
        assert branch_of(base.transformer) is None
    with pytest.raises(ra.UserError, match="no reference adapter is loaded"):
        pipe("a cat", [picture()], **SIZE)


def test_frozen_parts_and_modes_are_given_back(adapter):
    base = tiny_pipeline()
    base.transformer.proj_out.requires_grad_(False)
    base.transformer.blocks[0].train()
    before = anatomy(base.transformer)
    ra.load_adapter(base, adapter).unload()
    assert anatomy(base.transformer) == before


def test_the_same_name_needs_the_first_unloaded(base, adapter, tmp_path):
    other = save_tiny_adapter(tmp_path / "other", r=2, lora_alpha=1, target_modules=["to_v"])
    pipe = ra.load_adapter(base, adapter)
    loaded = velocity(base.transformer)
    for given in (base, pipe):
        with pytest.raises(ra.UserError, match=r"'refalign' is on this transformer already; .* unload\(\)") as caught:
            ra.load_adapter(given, other)
        assert "\n" not in str(caught.value)
    assert torch.equal(velocity(base.transformer), loaded)
    pipe.unload()
    second = ra.load_adapter(base, other)
    assert second.branch.config.r == 2
    assert not torch.equal(velocity(base.transformer), loaded)
    second.unload()
    third = ra.load_adapter(base, adapter, adapter_name="again")
    assert torch.equal(velocity(base.transformer), loaded)
    third.unload()


def test_unloading_after_fusing_takes_the_lora_out_again(adapter):
    base = tiny_pipeline()
    before, output = anatomy(base.transformer), velocity(base.transformer)
    pipe = ra.load_adapter(base, adapter)
    pipe.fuse_lora()
    pipe.unload()
    assert anatomy(base.transformer) == before
    torch.testing.assert_close(velocity(base.transformer), output, atol=1e-5, rtol=1e-5)


def test_another_lora_stays_on_at_its_strength(adapter):
    base = tiny_pipeline()
    style(base.transformer)
    output = velocity(base.transformer)
    pipe = ra.load_adapter(base, adapter)
    assert set(base.transformer.active_adapters()) == {"style", "refalign"}
    assert not torch.equal(velocity(base.transformer), output)
    pipe.unload()
    assert base.transformer.active_adapters() == ["style"]
    assert torch.equal(velocity(base.transformer), output)
    assert sum(anatomy(base.transformer)["hooks"]) == 0


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(
    "changes", [{}, {"lora_alpha": 32}, {"lora_alpha": 1.5, **PATTERNS}], ids=["plain", "alpha", "patterns"]
)
def test_a_stock_pipeline_gives_the_same_output(tmp_path, dtype, changes):
    trained = tiny_transformer()
    folder = save_tiny_adapter(tmp_path / "a", trained, **changes)
    ours, stock = tiny_pipeline(), tiny_pipeline()
    for pipe in (ours, stock):
        pipe.transformer.to(dtype)
    ra.load_adapter(ours, folder)
    stock.load_lora_weights(str(folder))
    output = velocity(ours.transformer)
    assert torch.equal(output, velocity(stock.transformer))
    assert not torch.equal(output, velocity(tiny_transformer().to(dtype)))


@pytest.mark.parametrize("scope", SCOPES)
def test_the_loaded_adapter_is_the_trained_one(tmp_path, scope):
    trained = tiny_transformer()
    fields: dict[str, Any] = {"r": 4, "lora_alpha": 10, "align_layers": 1, **PATTERNS, **SCOPES[scope]}
    branch = ra.attach(trained, ra.RefAlignConfig(**fields), seed=0)
    for name, parameter in branch.named_parameters():
        if "lora_B" in name:
            parameter.data.normal_(0, 0.1, generator=torch.Generator().manual_seed(len(name)))
    branch.save_pretrained(tmp_path / "a")
    references = torch.randn(1, 16, 2, 4, 6, generator=torch.Generator().manual_seed(9))
    with branch.references(references):
        expected = velocity(trained)
    names = [name for name, _ in branch.named_parameters()]
    assert any("attn2" in name for name in names) == (scope == "all")
    for folder in ("a", "b"):  # the latter is the former, loaded and saved again
        pipe = ra.load_adapter(tiny_pipeline(), tmp_path / folder)
        assert [name for name, _ in pipe.branch.named_parameters()] == names
        with pipe.branch.references(references):
            assert torch.equal(velocity(pipe.transformer), expected)
        pipe.branch.save_pretrained(tmp_path / "b")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_weights_have_the_type_that_diffusers_own_loader_gives(adapter, tmp_path, dtype):
    pipes = [tiny_pipeline() for _ in range(3)]
    for pipe in pipes:
        pipe.transformer.to(dtype)
    pipes[0].load_lora_weights(str(adapter), adapter_name="refalign")
    ra.load_adapter(pipes[1], adapter)
    ra.load_adapter(pipes[2], save_tiny_adapter(tmp_path / "a", **SCOPES["reference"]))
    for pipe in pipes:
        types = {parameter.dtype for _, parameter in lora_parameters(pipe.transformer, "refalign")}
        assert types == {dtype}


def rewrite(folder, weights=lambda given: given, metadata=lambda given: given):
    """Change the weights file's tensors or metadata."""
    path = weights_of(folder)
    with safe_open(path, "pt") as file:
        meta = file.metadata()
    tensors = weights(load_file(path))
    save_file(tensors, path, metadata=metadata(meta))


def damage_config(folder):
    (folder / "refalign_config.json").write_text("{")


def another_base(folder):
    path = folder / "refalign_config.json"
    values = json.loads(path.read_text())
    values["base"]["num_layers"] = 40
    path.write_text(json.dumps(values | {"base_model": "some/base"}))


def pickled(folder):
    weights_of(folder).unlink()
    torch.save({}, folder / "pytorch_lora_weights.bin")


BROKEN = {
    "truncated": (
        lambda folder: weights_of(folder).write_bytes(weights_of(folder).read_bytes()[:-99]),
        "cannot be loaded",
    ),
    "no safetensors": (lambda folder: weights_of(folder).write_bytes(b"no weights"), "cannot be loaded"),
    "no weights": (lambda folder: weights_of(folder).unlink(), "lacks {file}"),
    "no config": (lambda folder: (folder / "refalign_config.json").unlink(), "lacks refalign_config.json"),
    "broken config": (damage_config, "not readable JSON"),
    "another base": (another_base, r"made for another base \(some/base\): it has num_layers 40, this one has 3"),
    "pickle": (pickled, r"holds a pickle \(pytorch_lora_weights.bin\)"),
    "weights missing": (
        lambda folder: rewrite(folder, lambda given: dict(list(given.items())[:-2])),
        "2 weights are missing, 0 unknown and 0 of another shape, such as transformer.blocks",
    ),
    "another model's weights": (
        lambda folder: rewrite(
            folder, lambda given: {name.replace("transformer.", "unet."): t for name, t in given.items()}
        ),
        "'unet.blocks.* is no weight of a {file}",
    ),
    "metadata lost": (
        lambda folder: rewrite(folder, metadata=lambda _: {"format": "pt"}),
        "says lora_alpha 4 and refalign_config.json 8; its metadata was lost",
    ),
    "other shapes": (
        lambda folder: rewrite(folder, lambda given: {name: t[:, :-1].contiguous() for name, t in given.items()}),
        "0 unknown and {count} of another shape",
    ),
}


@pytest.mark.parametrize("scope", SCOPES)
@pytest.mark.parametrize("case", BROKEN)
def test_a_broken_adapter_is_one_line_and_leaves_the_pipeline_as_it_was(base, tmp_path, scope, case):
    breaks, message = BROKEN[case]
    folder = save_tiny_adapter(tmp_path / "broken", **SCOPES[scope])
    path = weights_of(folder)
    facts = {"file": path.name, "count": len(load_file(path))}
    breaks(folder)
    for name, fact in facts.items():
        message = message.replace(f"{{{name}}}", str(fact))
    with pytest.raises(ra.UserError, match=message) as caught:
        ra.load_adapter(base, folder)
    assert "\n" not in str(caught.value)
    assert branch_of(base.transformer) is None


@pytest.mark.parametrize("source", ["nowhere", "/nowhere/at/all"])
def test_a_folder_that_is_not_there(base, source):
    with pytest.raises(ra.UserError, match=f"folder '{source}' does not exist"):
        ra.load_adapter(base, source)


def test_a_hub_id_without_a_hub_is_one_line(base):
    with pytest.raises(ra.UserError, match="^adapter: cannot read 'some/adapter': it is not cached") as caught:
        ra.load_adapter(base, "some/adapter")
    assert "\n" not in str(caught.value)


def test_a_name_in_use_is_refused_and_keeps_its_lora(adapter):
    base = tiny_pipeline()
    style(base.transformer)
    output = velocity(base.transformer)
    with pytest.raises(ra.UserError, match="adapter_name: 'style' is in use"):
        ra.load_adapter(base, adapter, adapter_name="style")
    assert torch.equal(velocity(base.transformer), output)


@pytest.mark.parametrize(
    "act", [lambda pipe: pipe.fuse_lora(), lambda pipe: pipe.disable_lora()], ids=["fused", "off"]
)
def test_an_adapter_that_would_do_nothing_is_refused(adapter, act):
    base = tiny_pipeline()
    style(base.transformer)
    act(base)
    with pytest.raises(ra.UserError, match="LoRAs are fused or switched off"):
        ra.load_adapter(base, adapter)


def test_what_is_no_text_to_video_pipeline_is_refused(base, adapter):
    with pytest.raises(ra.UserError, match="pipe: expected a diffusers pipeline .*, got WanTransformer3DModel"):
        ra.load_adapter(base.transformer, adapter)
    names = ("tokenizer", "text_encoder", "transformer", "vae", "scheduler")
    other = WanVideoToVideoPipeline(**{name: base.components[name] for name in names})
    with pytest.raises(ra.UserError, match="pipe: expected a WanPipeline, got WanVideoToVideoPipeline"):
        ra.load_adapter(other, adapter)
    two = WanPipeline(**base.components | {"transformer_2": base.transformer}, boundary_ratio=0.9)
    with pytest.raises(ra.UserError, match="two transformers"):
        ra.load_adapter(two, adapter)
    with pytest.raises(ra.UserError, match="made for another base.*: it has num_attention_heads 2, this one has 4"):
        ra.load_adapter(tiny_pipeline(num_attention_heads=4), adapter)
