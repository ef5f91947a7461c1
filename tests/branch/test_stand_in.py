"""Stand-In's own model (arXiv 2508.07901) as an adapter: isolated attention, references beyond the video's end.

The fixture holds the outputs of its released code on random weights: the first step runs the reference, the second
reads what the first one kept.
"""

import json
from pathlib import Path

import pytest
import torch
from diffusers import WanTransformer3DModel
from safetensors import safe_open

import refalign_adapter as ra
from refalign_adapter.branch.reference_cache import ReferenceCache

FIXTURE = Path(__file__).parents[1] / "data" / "stand_in.safetensors"
NAMES = {"to_q": "q_loras", "to_k": "k_loras", "to_v": "v_loras", "lora_A": "down", "lora_B": "up"}


@pytest.fixture(scope="module")
def stand_in():
    with safe_open(FIXTURE, "pt") as file:
        tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118  # not a dict
        config, rank = json.loads(file.metadata()["config"]), int(file.metadata()["rank"])
    transformer = WanTransformer3DModel(**config)
    weights = {name.removeprefix("transformer."): t for name, t in tensors.items() if name.startswith("transformer.")}
    transformer.load_state_dict(weights)
    return transformer.eval(), tensors, rank


def adapt(stand_in, **fields):
    transformer, tensors, rank = stand_in
    attention = tuple(f"attn1.{name}" for name in ("to_q", "to_k", "to_v"))
    base = {"attention": "isolated", "lora_scope": "reference", "reference_frame": -1, "reference_place": "beyond"}
    lora = {"r": rank, "lora_alpha": rank, "target_modules": attention, "align_layers": 0}
    branch = ra.attach(transformer, ra.RefAlignConfig(**base | lora | fields), seed=0)
    for name, parameter in branch.named_parameters():
        _, block, _, layer, part, *_ = name.split(".")
        parameter.data = tensors[f"lora.blocks.{block}.self_attn.{NAMES[layer]}.{NAMES[part]}.weight"].clone()
    return transformer, branch


@torch.no_grad()
def step(transformer, tensors, number):
    return transformer(tensors["in.latents"], tensors[f"in.timestep_{number}"], tensors["in.text"]).sample


def test_both_steps_are_stand_ins_own(stand_in):
    tensors, reference = stand_in[1], stand_in[1]["in.reference"]
    transformer, branch = adapt(stand_in)
    try:
        assert sum(1 for _ in branch.named_parameters()) == 16  # of its 18, the last block's query is read by nobody
        torch.testing.assert_close(step(transformer, tensors, 1), tensors["out.plain"], atol=1e-5, rtol=0)
        with branch.references(reference):
            torch.testing.assert_close(step(transformer, tensors, 1), tensors["out.step_1"], atol=1e-5, rtol=0)
        video = tensors["in.latents"]
        cache = branch.encode_references(reference, frames=video.shape[2], size=tuple(video.shape[3:]))
        assert (cache.frames, cache.grid, cache.tokens) == (None, (4, 6), 64)
        with branch.references(cache):
            for number in (1, 2):
                expected = tensors[f"out.step_{number}"]
                torch.testing.assert_close(step(transformer, tensors, number), expected, atol=1e-5, rtol=0)
    finally:
        branch.detach()


@pytest.mark.parametrize("fields", [{"reference_frame": 0}, {"reference_place": "origin"}, {"reference_frame": None}])
def test_at_any_other_place_it_is_not(stand_in, fields):
    tensors = stand_in[1]
    transformer, branch = adapt(stand_in, **fields)
    with branch.references(tensors["in.reference"]):
        out = step(transformer, tensors, 1)
    branch.detach()
    assert (out - tensors["out.step_1"]).abs().max() > 2e-4  # twenty times what its own place gives


def test_the_cache_is_for_one_size_and_any_length(stand_in, tmp_path):
    tensors = stand_in[1]
    transformer, branch = adapt(stand_in)
    cache = branch.encode_references(tensors["in.reference"], frames=3, size=(8, 12))
    read = ReferenceCache.load(cache.save(tmp_path / "face.safetensors"))
    assert (read.frames, read.grid) == (None, (4, 6))
    text, time = tensors["in.text"], tensors["in.timestep_1"]
    try:
        with torch.no_grad():
            for frames in (1, 5):
                video = torch.randn(1, 4, frames, 8, 12, generator=torch.Generator().manual_seed(frames))
                with branch.references(read):
                    got = transformer(video, time, text).sample
                with branch.references(tensors["in.reference"]):
                    assert torch.equal(got, transformer(video, time, text).sample)
            with branch.references(read), pytest.raises(ra.UserError, match=r"4 x 6 tokens .*, this one has 6 x 4"):
                transformer(torch.zeros(1, 4, 1, 12, 8), time, text)
        with pytest.raises(ra.UserError, match=r"^size: .* give its latent \(height, width\)$"):
            branch.encode_references(tensors["in.reference"], frames=3)
    finally:
        branch.detach()
