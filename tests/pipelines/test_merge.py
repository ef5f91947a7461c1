"""Fused, unfused and merged, the LoRA makes the same videos; merged, nothing of PEFT is left."""

import numpy as np
import pytest
import torch
from diffusers import WanTransformer3DModel
from peft import LoraConfig
from peft.tuners.tuners_utils import BaseTunerLayer
from tiny_adapter import SIZE, anatomy, picture, save_tiny_adapter, velocity
from tiny_models import tiny_pipeline, tiny_transformer

import refalign_adapter as ra


def video(pipe):
    generator = torch.Generator().manual_seed(0)
    images = [picture(0), picture(1)]
    return pipe("a cat", images, num_inference_steps=2, generator=generator, **SIZE).frames


def tuners(transformer):
    return [module for module in transformer.modules() if isinstance(module, BaseTunerLayer)]


def test_fuse_and_unfuse_as_in_diffusers(fresh_pipe):
    expected, loaded = video(fresh_pipe), velocity(fresh_pipe.transformer)
    fresh_pipe.fuse_lora()
    assert all(layer.merged for layer in tuners(fresh_pipe.transformer))
    np.testing.assert_allclose(video(fresh_pipe), expected, atol=1e-5)
    fresh_pipe.unfuse_lora()
    assert not any(layer.merged for layer in tuners(fresh_pipe.transformer))
    torch.testing.assert_close(velocity(fresh_pipe.transformer), loaded, atol=1e-5, rtol=1e-5)
    np.testing.assert_allclose(video(fresh_pipe), expected, atol=1e-5)
    fresh_pipe.fuse_lora(lora_scale=0.5)
    assert np.abs(video(fresh_pipe) - expected).max() > 1e-4


@pytest.mark.parametrize("fused", [False, True])
def test_merged_it_makes_the_same_video_without_peft(fresh_pipe, fused):
    pipe, expected = fresh_pipe, video(fresh_pipe)
    if fused:
        pipe.fuse_lora()
    assert ra.merge_and_unload(pipe) is pipe
    assert tuners(pipe.transformer) == []
    assert not hasattr(pipe.transformer, "peft_config")
    assert "contain the LoRA, for good" in pipe.changes[0]
    base = tiny_transformer()
    assert [(name, type(module)) for name, module in pipe.transformer.named_modules()] == [
        (name, type(module)) for name, module in base.named_modules()
    ]
    assert list(pipe.transformer.state_dict()) == list(base.state_dict())
    np.testing.assert_allclose(video(pipe), expected, atol=1e-5)
    ra.merge_and_unload(pipe)
    merged = velocity(pipe.transformer)
    pipe.unload()
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in pipe.transformer.modules())
    assert torch.equal(velocity(pipe.transformer), merged)
    with pytest.raises(ra.UserError, match="no reference adapter is loaded"):
        ra.merge_and_unload(pipe)


@pytest.fixture
def of_scope_all(isolated_adapters):
    pipe = ra.load_adapter(tiny_pipeline(), isolated_adapters["all"])
    pipe.set_progress_bar_config(disable=True)
    return pipe


def test_isolated_of_scope_all_is_fused_and_merged(of_scope_all):
    pipe = of_scope_all
    expected = video(pipe)
    pipe.fuse_lora()
    assert all(layer.merged for layer in tuners(pipe.transformer))
    np.testing.assert_allclose(video(pipe), expected, atol=1e-5)
    pipe.unfuse_lora()
    np.testing.assert_allclose(video(pipe), expected, atol=1e-5)
    ra.merge_and_unload(pipe)
    assert tuners(pipe.transformer) == []
    np.testing.assert_allclose(video(pipe), expected, atol=1e-5)
    cache = pipe.encode_references([picture(0), picture(1)], **SIZE)
    generator = torch.Generator().manual_seed(0)
    got = pipe("a cat", reference_cache=cache, num_inference_steps=2, generator=generator, **SIZE).frames
    np.testing.assert_allclose(got, expected, atol=1e-5)


@pytest.mark.parametrize(
    "act",
    [
        lambda pipe: pipe.fuse_lora(),
        lambda pipe: pipe.fuse_lora(adapter_names="refalign"),
        lambda pipe: pipe.fuse_lora(["transformer"], 0.5, adapter_names=["refalign"]),
        ra.merge_and_unload,
    ],
)
def test_what_acts_on_references_alone_is_not_fused_or_merged(fresh_isolated, act):
    pipe = fresh_isolated
    before, output, weights = anatomy(pipe.transformer), video(pipe), velocity(pipe.transformer)
    with pytest.raises(ra.UserError, match="acts on reference tokens alone .* video tokens use too") as caught:
        act(pipe)
    assert "\n" not in str(caught.value)
    assert anatomy(pipe.transformer) == before
    assert torch.equal(velocity(pipe.transformer), weights)
    assert np.array_equal(video(pipe), output)


def test_another_lora_is_fused_beside_it(fresh_isolated):
    pipe = fresh_isolated
    config = LoraConfig(r=2, target_modules=["to_q"], init_lora_weights=False)
    pipe.transformer.add_adapter(config, adapter_name="style")
    pipe.set_adapters(["refalign", "style"])
    expected, cache = velocity(pipe.transformer), pipe.encode_references([picture(0)], **SIZE)
    pipe.fuse_lora(adapter_names=["style"])
    torch.testing.assert_close(velocity(pipe.transformer), expected, atol=1e-5, rtol=1e-5)
    assert pipe("a cat", reference_cache=cache, num_inference_steps=1, **SIZE).frames.shape == (1, 5, 32, 48, 3)
    pipe.unfuse_lora()
    torch.testing.assert_close(velocity(pipe.transformer), expected, atol=1e-5, rtol=1e-5)


def test_it_is_for_what_load_adapter_returns():
    with pytest.raises(ra.UserError, match="expected what load_adapter returns, got WanTransformer3DModel"):
        ra.merge_and_unload(tiny_transformer())


@pytest.mark.parametrize("attention", ["joint", "isolated"])
def test_a_base_that_was_merged_saved_and_loaded_knows_the_adapter_inside(tmp_path, attention, caplog):
    folders = [
        save_tiny_adapter(tmp_path / name, attention=attention, lora_scope="all", **changes)
        for name, changes in (("a", {}), ("b", {"lora_alpha": 3, "r": 2}))
    ]
    pipe = ra.load_adapter(tiny_pipeline(), folders[0])
    pipe.set_progress_bar_config(disable=True)
    expected = video(pipe)
    ra.merge_and_unload(pipe).transformer.save_pretrained(tmp_path / "merged")
    base = tiny_pipeline()
    base.register_modules(transformer=WanTransformer3DModel.from_pretrained(tmp_path / "merged"))
    assert "not expected and will be ignored" not in caplog.text
    before, output = anatomy(base.transformer), velocity(base.transformer)
    with pytest.raises(
        ra.UserError, match="another adapter was merged into its transformer's weights before they were"
    ):
        ra.load_adapter(base, folders[1])
    assert anatomy(base.transformer) == before
    again = ra.load_adapter(base, folders[0])
    again.set_progress_bar_config(disable=True)
    assert not hasattr(base.transformer, "peft_config")
    np.testing.assert_allclose(video(again), expected, atol=1e-5)
    again.unload()
    assert anatomy(base.transformer) == before
    assert torch.equal(velocity(base.transformer), output)
