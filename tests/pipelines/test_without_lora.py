"""Adapters of r 0: how references and guidance go with a base that was trained whole, without a LoRA."""

import json

import pytest
import torch
from tiny_adapter import SIZE, anatomy, picture, save_tiny_adapter, velocity
from tiny_generation import IMAGES, generate
from tiny_models import tiny_pipeline, tiny_transformer

import refalign_adapter as ra
from refalign_adapter.export.folder import open_adapter

KINDS = {"joint": {}, "isolated": {"attention": "isolated", "lora_scope": "reference"}}
BARE = {"r": 0, "lora_alpha": 64}


@pytest.fixture(params=KINDS)
def folder(request, tmp_path):
    return save_tiny_adapter(tmp_path / "bare", **KINDS[request.param] | BARE)


def load(pipe, folder, **options):
    made = ra.load_adapter(pipe, folder, **options)
    made.set_progress_bar_config(disable=True)
    return made


def style(pipe, name="style"):
    """Put a LoRA of another kind on a pipeline's transformer."""
    from peft import LoraConfig

    pipe.transformer.add_adapter(LoraConfig(r=2, target_modules=["to_q"], init_lora_weights=False), adapter_name=name)
    pipe.transformer.requires_grad_(False)


def test_the_folder_holds_no_weights_and_loads(folder, tmp_path):
    assert sorted(path.name for path in folder.iterdir()) == ["README.md", "refalign_config.json"]
    card = (folder / "README.md").read_text()
    assert "there is no LoRA (r 0) and no file of weights" in card
    assert "load_lora_weights" not in card
    base = tiny_pipeline()
    before, plain = anatomy(base.transformer), velocity(base.transformer)
    pipe = load(base, folder)
    assert pipe.changes[0] == "Adapter 'refalign' holds no LoRA: the transformer's weights are its base's own."
    assert list(pipe.branch.named_parameters()) == []
    assert not any(parameter.requires_grad for parameter in pipe.transformer.parameters())
    assert torch.equal(velocity(pipe.transformer), plain)
    again = pipe.branch.save_pretrained(tmp_path / "again")
    assert [path.read_bytes() for path in sorted(again.iterdir())] == [
        path.read_bytes() for path in sorted(folder.iterdir())
    ]
    pipe.unload()
    assert anatomy(base.transformer) == before


def test_videos_are_those_of_a_lora_that_does_nothing(folder, tmp_path):
    config = ra.RefAlignConfig.load(folder)
    kept = {"attention": config.attention, "lora_scope": config.lora_scope}
    transformer = tiny_transformer()
    branch = ra.attach(transformer, ra.RefAlignConfig(r=2, align_layers=2, max_sequence_length=16, **kept), seed=0)
    branch.save_pretrained(tmp_path / "still")  # its up-projections are zero
    bare, still = load(tiny_pipeline(), folder), load(tiny_pipeline(), tmp_path / "still")
    for images in (IMAGES, None):
        assert torch.equal(generate(bare, "a cat", images), generate(still, "a cat", images))
    assert not torch.equal(generate(bare, "a cat", IMAGES), generate(bare, "a cat", None))


def test_attaching_and_detaching_leaves_the_transformer_as_it_was():
    transformer = tiny_transformer()
    before, plain = anatomy(transformer), velocity(transformer)
    branch = ra.attach(transformer, ra.RefAlignConfig(attention="joint", r=0, align_layers=1))
    assert branch.config.target_modules is None
    references = torch.randn(1, 16, 2, 4, 6, generator=torch.Generator().manual_seed(1))
    with branch.references(references):
        assert not torch.equal(velocity(transformer), plain)
    branch.detach()
    assert anatomy(transformer) == before
    assert torch.equal(velocity(transformer), plain)


def test_merging_has_nothing_to_add_and_references_go_on(folder):
    pipe = load(tiny_pipeline(), folder)
    expected = generate(pipe, "a cat", IMAGES)
    assert ra.merge_and_unload(pipe) is pipe
    assert torch.equal(generate(pipe, "a cat", IMAGES), expected)
    pipe.unload()


def test_other_loras_stay_off_isolated_references_and_can_be_switched(tmp_path):
    folder = save_tiny_adapter(tmp_path / "a", **KINDS["isolated"] | BARE)
    plain, base = load(tiny_pipeline(), folder), tiny_pipeline()
    style(base)
    pipe = load(base, folder)
    with_style = generate(pipe, "a cat", IMAGES)
    assert not torch.equal(with_style, generate(plain, "a cat", IMAGES))
    caches = [made.encode_references(IMAGES, **SIZE) for made in (plain, pipe)]
    for one, other in zip(*(cache.keys for cache in caches), strict=True):
        assert torch.equal(one, other)
    pipe.set_adapters("style", 0.0)
    assert torch.equal(generate(pipe, "a cat", IMAGES), generate(plain, "a cat", IMAGES))
    pipe.set_adapters("style", 1.0)
    with pytest.raises(ra.UserError, match=r"^set_adapters: 'refalign' holds no LoRA \(r 0\)"):
        pipe.set_adapters(["style", "refalign"])
    for merge in (pipe.fuse_lora, lambda: ra.merge_and_unload(pipe)):
        with pytest.raises(ra.UserError, match=r"^fuse_lora: \['style'\] fused beside .* would act on references too"):
            merge()


def test_another_lora_is_merged_into_a_joint_ones_base(tmp_path):
    base = tiny_pipeline()
    style(base)
    pipe = load(base, save_tiny_adapter(tmp_path / "a", **BARE))
    expected = generate(pipe, "a cat", IMAGES)
    ra.merge_and_unload(pipe)
    assert not getattr(pipe.transformer, "peft_config", None)
    torch.testing.assert_close(generate(pipe, "a cat", IMAGES), expected, atol=1e-4, rtol=1e-4)
    pipe.save_pretrained(tmp_path / "whole")
    assert open_adapter(tmp_path / "whole/reference_adapters/refalign").config == pipe.branch.config
    pipe.unload()
    assert not pipe.transformer._forward_hooks


def test_no_other_reference_adapter_can_be_beside_it(folder, adapter):
    for first, second in ((folder, adapter), (adapter, folder)):
        base = tiny_pipeline()
        load(base, first)
        before = anatomy(base.transformer)
        with pytest.raises(
            ra.UserError, match=r"^pipe: adapter '\w+' holds no LoRA .* delete_adapters\(\['refalign'\]\)"
        ):
            load(base, second, adapter_name="other")
        assert anatomy(base.transformer) == before


def test_references_cached_with_another_base_of_the_same_shape_are_refused(tmp_path):
    folder = save_tiny_adapter(tmp_path / "a", **KINDS["isolated"] | BARE)
    cache = load(tiny_pipeline(), folder).encode_references(picture(0), **SIZE)
    with pytest.raises(ra.UserError, match="cached with adapter 'refalign' of other weights"):
        generate(load(tiny_pipeline(seed=1), folder), "a cat", None, reference_cache=cache)
    assert generate(load(tiny_pipeline(), folder), "a cat", None, reference_cache=cache).isfinite().all()


def test_weights_and_a_configuration_without_any_refuse_each_other(folder, adapter, tmp_path):
    import shutil

    mixed = shutil.copytree(adapter, tmp_path / "mixed")
    shutil.copy(folder / "refalign_config.json", mixed)
    with pytest.raises(ra.UserError, match=r"holds pytorch_lora_weights.safetensors, but .* says r 0"):
        open_adapter(mixed)
    values = json.loads((folder / "refalign_config.json").read_text())
    for changes, message in {
        "r": ({"r": 4}, "it lacks"),
        "base": ({"base": {}}, "base must say which base the adapter fits"),
        "pattern": ({"rank_pattern": {"to_q": 4}}, "rank_pattern must be left out with r 0"),
        "modules": ({"target_modules": ".*"}, "target_modules must be left out with r 0"),
    }.values():
        (folder / "refalign_config.json").write_text(json.dumps(values | changes))
        with pytest.raises(ra.UserError, match=message):
            open_adapter(folder)


def test_saving_over_an_adapter_with_weights_takes_them_away(adapter, tmp_path):
    import shutil

    there = shutil.copytree(adapter, tmp_path / "there")
    branch = ra.attach(tiny_transformer(), ra.RefAlignConfig(attention="joint", r=0, align_layers=1))
    branch.save_pretrained(there)
    assert open_adapter(there).shapes == {}
