"""Offloading by diffusers' own hooks, as far as a machine without a GPU can show: the same video, bit for bit."""

import inspect

import pytest
import torch
from accelerate import cpu_offload_with_hook
from diffusers.hooks import apply_group_offloading, group_offloading
from tiny_adapter import SIZE
from tiny_generation import IMAGES, generate
from tiny_models import tiny_pipeline

import refalign_adapter as ra

CPU = torch.device("cpu")
IN_GROUPS = pytest.mark.skipif(
    "current_accelerator().type" in inspect.getsource(group_offloading) and not torch.accelerator.is_available(),
    reason="this version of diffusers offloads in groups with an accelerator only",
)


def by_model(pipe):
    pipe.enable_model_cpu_offload(device="cpu")


def by_blocks(pipe):
    pipe.transformer.enable_group_offload(CPU, CPU, "block_level", num_blocks_per_group=2)


def by_layers(pipe):
    pipe.transformer.enable_group_offload(CPU, CPU, "leaf_level")
    for model in (pipe.vae, pipe.text_encoder):
        apply_group_offloading(model, CPU, CPU, "leaf_level")


def by_accelerate(pipe):
    cpu_offload_with_hook(pipe.transformer, CPU)


WAYS = [by_model, by_accelerate, *(pytest.param(way, marks=IN_GROUPS) for way in (by_blocks, by_layers))]


@pytest.mark.parametrize("way", WAYS, ids=lambda way: way.__name__)
@pytest.mark.parametrize("kind", ["joint", "isolated"])
def test_offloaded_it_makes_the_same_videos(fresh_pipe, fresh_isolated, way, kind):
    pipe = fresh_pipe if kind == "joint" else fresh_isolated
    given = (IMAGES, None, IMAGES)
    expected = [generate(pipe, "a cat", images) for images in given]
    way(pipe)
    for images, video in zip(given, expected, strict=True):
        assert torch.equal(generate(pipe, "a cat", images), video)
    if kind == "isolated":
        cache = pipe.encode_references(IMAGES, **SIZE)
        assert torch.equal(generate(pipe, "a cat", reference_cache=cache), expected[0])


def test_the_vae_comes_to_its_device_before_it_is_asked_where_it_is(fresh_isolated, monkeypatch):
    pipe = fresh_isolated
    pipe.enable_model_cpu_offload(device="cpu")
    order, encode, move = [], pipe.branch.family.encode_images, pipe.vae._hf_hook.pre_forward
    monkeypatch.setattr(pipe.vae._hf_hook, "pre_forward", lambda *given: order.append("moved") or move(*given))
    monkeypatch.setattr(pipe.branch.family, "encode_images", lambda *given: order.append("asked") or encode(*given))
    pipe.encode_references(IMAGES, **SIZE)
    assert order[:2] == ["moved", "asked"]


@IN_GROUPS
def test_an_adapter_comes_off_an_offloaded_transformer(isolated_adapters):
    base = tiny_pipeline()
    base.set_progress_bar_config(disable=True)
    expected = generate(base, "a cat", guidance_scale=5.0, max_sequence_length=16)
    base.transformer.enable_group_offload(CPU, CPU, "block_level", num_blocks_per_group=1)
    pipe = ra.load_adapter(base, isolated_adapters["reference"])
    assert generate(pipe, "a cat", IMAGES).isfinite().all()
    pipe.unload()
    assert torch.equal(generate(base, "a cat", guidance_scale=5.0, max_sequence_length=16), expected)
