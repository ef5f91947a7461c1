"""A second LoRA, for style or for few steps, keeps its effect exactly; references are read by what it makes."""

import diffusers.models.transformers.transformer_wan as transformer_wan
import pytest
import torch
from peft import LoraConfig
from tiny_adapter import SIZE, anatomy
from tiny_generation import IMAGES, LATENTS, calls_of, generate, noise
from tiny_models import tiny_pipeline

import refalign_adapter as ra

ONE_PASS = {"guidance_scale": 1.0, "image_guidance_scale": 1.0}


def add_second(pipe, weight=0.5):
    """A LoRA that makes a visible difference, switched on beside those that are."""
    transformer = pipe.transformer
    names = transformer.active_adapters() if getattr(transformer, "peft_config", None) else []
    config = LoraConfig(r=2, target_modules=["to_q", "to_v", "ffn.net.2"], init_lora_weights=False)
    with torch.random.fork_rng([]):
        torch.manual_seed(5)
        transformer.add_adapter(config, adapter_name="second")
    transformer.set_adapters([*names, "second"], weights=[1.0] * len(names) + [weight])
    transformer.requires_grad_(False)


@pytest.fixture
def with_second():
    """The base with that LoRA alone."""
    base = tiny_pipeline()
    base.set_progress_bar_config(disable=True)
    add_second(base)
    return base


@pytest.fixture(params=[True, False], ids=["loaded before", "loaded after"])
def both(request, isolated_adapters):
    base = tiny_pipeline()
    if request.param:
        add_second(base)
    pipe = ra.load_adapter(base, isolated_adapters["reference"])
    if not request.param:
        add_second(pipe)
    pipe.set_progress_bar_config(disable=True)
    return pipe


@pytest.mark.parametrize("scale", [1.0, 5.3])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_without_references_it_is_the_base_with_that_lora_to_the_bit(both, with_second, scale, dtype):
    given = {"guidance_scale": scale, "max_sequence_length": 16, "negative_prompt": "ugly"}
    for pipe in (both, with_second):
        pipe.transformer.to(dtype)
    got, expected = (generate(pipe, "a cat", **given) for pipe in (both, with_second))
    assert torch.equal(got, expected)
    base = tiny_pipeline()
    base.transformer.to(dtype)
    base.set_progress_bar_config(disable=True)
    assert (generate(base, "a cat", **given) - expected).abs().max() > 1e-3


def test_scales_of_one_cost_one_pass_a_step(both):
    with calls_of(both.transformer) as calls:
        generate(both, "a cat", IMAGES, num_inference_steps=4, **ONE_PASS)
    assert calls == [(2, 16, 1, 4, 6)] + [LATENTS] * 4
    with calls_of(both.transformer) as calls:
        generate(both, "a cat", num_inference_steps=4, guidance_scale=1.0)
    assert calls == [LATENTS] * 4


class Reading:
    """In place of the dispatcher: self-attention also attends to cached keys and values, block by block."""

    def __init__(self, cache, blocks, original):
        self.cache, self.blocks, self.original, self.calls = cache, blocks, original, 0

    def __call__(self, query, key, value, **kwargs):
        block, is_cross = divmod(self.calls % (2 * self.blocks), 2)
        self.calls += 1
        if not is_cross:
            key, value = torch.cat([key, self.cache.keys[block]], 1), torch.cat([value, self.cache.values[block]], 1)
        return self.original(query, key, value, **kwargs)


def test_with_references_it_is_the_base_with_that_lora_reading_their_cache(
    both, with_second, isolated_adapters, monkeypatch
):
    cache = both.encode_references(IMAGES, **SIZE)
    got = generate(both, "a cat", reference_cache=cache, **ONE_PASS)
    assert torch.equal(generate(both, "a cat", IMAGES, **ONE_PASS), got)
    reading = Reading(cache, 3, transformer_wan.dispatch_attention_fn)
    monkeypatch.setattr(transformer_wan, "dispatch_attention_fn", reading)
    expected = generate(with_second, "a cat", guidance_scale=1.0, max_sequence_length=16)
    assert reading.calls == 2 * 2 * 3
    torch.testing.assert_close(got, expected, atol=1e-5, rtol=1e-5)
    monkeypatch.undo()
    alone = ra.load_adapter(tiny_pipeline(), isolated_adapters["reference"])
    same = alone.encode_references(IMAGES, **SIZE)
    assert all(map(torch.equal, cache.keys + cache.values, same.keys + same.values))
    assert (generate(alone, "a cat", reference_cache=same, **ONE_PASS) - got).abs().max() > 1e-3


def test_its_weight_changes_the_video_and_not_the_references(both):
    cache = both.encode_references(IMAGES, **SIZE)
    before = generate(both, "a cat", reference_cache=cache)
    both.set_adapters(["refalign", "second"], [1.0, 0.1])
    assert (generate(both, "a cat", reference_cache=cache) - before).abs().max() > 1e-3
    both.set_adapters(["refalign", "second"], [1.0, 0.5])
    assert torch.equal(generate(both, "a cat", reference_cache=cache), before)
    both.set_adapters(["refalign", "second"], [0.3, 0.5])
    assert (generate(both, "a cat", IMAGES) - before).abs().max() > 1e-4
    assert torch.equal(generate(both, "a cat", latents=noise(1)), generate(both, "a cat", None, latents=noise(1)))


def test_unloading_leaves_it(both, with_second):
    expected = generate(with_second, "a cat", guidance_scale=1.0, max_sequence_length=16)
    generate(both, "a cat", IMAGES)
    both.unload()
    assert both.transformer.active_adapters() == ["second"]
    assert sum(anatomy(both.transformer)["hooks"]) == 0
    base = type(tiny_pipeline())(**{name: part for name, part in both.components.items() if part is not None})
    base.set_progress_bar_config(disable=True)
    assert torch.equal(generate(base, "a cat", guidance_scale=1.0, max_sequence_length=16), expected)
