"""A loop that gives every token a timestep, as Wan 2.2 TI2V-5B's does, with references in its passes."""

from contextlib import contextmanager

import pytest
import torch
from diffusers import WanPipeline
from tiny_adapter import picture, save_tiny_adapter
from tiny_generation import generate
from tiny_models import tiny_pipeline_of_22

import refalign_adapter as ra

SIZE = {"height": 64, "width": 96, "num_frames": 5}
VIDEO, REFERENCE = 12, 6
"""Tokens: 2 frames of 2 x 3, and as many as a frame has."""
MODES = {
    "joint, video": {"attention": "joint", "lora_scope": "all"},
    "joint, clean": {"attention": "joint", "lora_scope": "all", "reference_timestep": "clean"},
    "isolated/reference": {"attention": "isolated", "lora_scope": "reference"},
    "isolated/all": {"attention": "isolated", "lora_scope": "all"},
}
PROMPTS = ["a cat", "two dogs"]
IMAGES = [[picture(0)], [picture(1), picture(2, (10, 60))]]


@pytest.fixture(scope="module", params=MODES)
def folder(request, tmp_path_factory):
    """An adapter of each kind for the transformer of 48 channels."""
    transformer = tiny_pipeline_of_22().transformer
    return save_tiny_adapter(tmp_path_factory.mktemp("adapter") / "folder", transformer, **MODES[request.param])


def load(folder, *, of_tokens):
    """The same model in a pipeline that gives a timestep for every token, or one for each video."""
    base = WanPipeline(**tiny_pipeline_of_22().components, expand_timesteps=of_tokens)
    pipe = ra.load_adapter(base, folder)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def video(pipe, images, **changes):
    latents = torch.randn(2, 48, 2, 4, 6, generator=torch.Generator().manual_seed(0))
    return generate(pipe, PROMPTS, images, latents=latents, negative_prompt="ugly", **SIZE, **changes)


@contextmanager
def timesteps_of(transformer):
    """Of each call inside the context: how many timesteps a sample has, and the last sample's last one."""
    seen = []
    handle = transformer.condition_embedder.register_forward_hook(
        lambda _, args, kwargs, __: seen.append((kwargs.get("timestep_seq_len") or 1, args[0].flatten()[-1].item())),
        with_kwargs=True,
    )
    try:
        yield seen
    finally:
        handle.remove()


@pytest.mark.parametrize("batch", [False, True], ids=["one by one", "batched"])
def test_the_video_is_that_of_one_timestep_for_each(folder, batch):
    videos = [video(load(folder, of_tokens=of_tokens), IMAGES, batch_guidance=batch) for of_tokens in (True, False)]
    torch.testing.assert_close(*videos, atol=2e-5, rtol=1e-4)
    others = [[picture(3)], [picture(4), picture(5)]]
    assert (video(load(folder, of_tokens=True), others, batch_guidance=batch) - videos[0]).abs().max() > 1e-3


def test_references_have_timesteps_of_their_own_where_they_ride_along(folder):
    pipe = load(folder, of_tokens=True)
    assert pipe.config.expand_timesteps
    with timesteps_of(pipe.transformer) as seen:
        video(pipe, IMAGES, num_inference_steps=1)
    joint, clean = pipe.branch.config.attention == "joint", pipe.branch.config.reference_timestep == "clean"
    riding = (VIDEO + 2 * REFERENCE, 0.0 if clean else 1000.0) if joint else (VIDEO, 1000.0)
    prefill = [] if joint else [(1, 0.0)]  # once, before the passes
    assert seen == [*prefill, riding, riding, (VIDEO, 1000.0)]


def test_sides_are_multiples_of_32(folder):
    with pytest.raises(ra.ConfigError) as caught:
        load(folder, of_tokens=True)("a cat", height=80, width=90, num_frames=6)
    assert caught.value.problems == [
        "num_frames must be a multiple of 4 plus 1, got 6; try 5",
        "height must be a multiple of 32, got 80; try 64",
        "width must be a multiple of 32, got 90; try 96",
    ]
