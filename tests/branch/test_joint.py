"""Joint attention against the released code, and samples of one batch against the same samples alone."""

import json
from pathlib import Path

import pytest
import torch
from diffusers import WanTransformer3DModel
from safetensors import safe_open

import refalign_adapter as ra

FIXTURE = Path(__file__).parents[1] / "data" / "official_joint_forward.safetensors"


@pytest.fixture(scope="module")
def official():
    with safe_open(FIXTURE, "pt") as file:
        tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118  # not a dict
        config = json.loads(file.metadata()["config"])
    weights = {name.removeprefix("transformer."): t for name, t in tensors.items() if name.startswith("transformer.")}
    return config, weights, {name: t for name, t in tensors.items() if not name.startswith("transformer.")}


def build(official, dtype=torch.float32):
    config, weights, tensors = official
    transformer = WanTransformer3DModel(**config)
    transformer.load_state_dict(weights)
    return transformer.to(dtype).eval(), {
        name: t if name == "in.timestep" else t.to(dtype) for name, t in tensors.items()
    }


def call(transformer, tensors, **changes):
    arguments = {
        "hidden_states": tensors["in.latents"],
        "timestep": tensors["in.timestep"],
        "encoder_hidden_states": tensors["in.text"],
        "return_dict": False,
    }
    return transformer(**arguments | changes)[0]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_prediction_and_features_equal_the_released_code(official, dtype):
    transformer, tensors = build(official, dtype)
    branch = ra.attach(transformer, ra.RefAlignConfig(attention="joint", r=4, align_layers=3), seed=0)
    branch.capture = True
    with torch.no_grad(), branch.references(tensors["in.reference_latents"]):
        out = call(transformer, tensors)
    assert out.shape == tensors["in.latents"].shape
    torch.testing.assert_close(out, tensors["out.sample"], atol=1e-5, rtol=0)
    assert list(branch.features) == [0, 1, 2]
    for index, features in branch.features.items():
        assert features.shape == (1, 2, 24, 48)
        expected = tensors["out.reference_features"][:, index]
        torch.testing.assert_close(features.flatten(1, 2), expected, atol=1e-5, rtol=0)


def test_positional_arguments_and_return_dict_do_the_same(official):
    transformer, tensors = build(official)
    branch = ra.attach(transformer, ra.RefAlignConfig(attention="joint", r=4, align_layers=3), seed=0)
    with torch.no_grad(), branch.references(tensors["in.reference_latents"]):
        expected = call(transformer, tensors)
        positional = transformer(tensors["in.latents"], tensors["in.timestep"], tensors["in.text"])
    assert torch.equal(positional.sample, expected)


def test_without_references_a_fresh_branch_gives_the_base_output(official):
    transformer, tensors = build(official)
    with torch.no_grad():
        plain = call(transformer, tensors)
        branch = ra.attach(transformer, ra.RefAlignConfig(attention="joint", r=4, align_layers=3), seed=0)
        assert torch.equal(call(transformer, tensors), plain)
        with branch.references(None):
            assert torch.equal(call(transformer, tensors), plain)
        with branch.references(tensors["in.reference_latents"], torch.zeros(1, 2, dtype=torch.bool)):
            assert torch.equal(call(transformer, tensors), plain)
    assert branch.features == {}


def random_lora(branch, generator):
    for name, parameter in branch.named_parameters():
        if "lora_B" in name:
            parameter.data = torch.randn(parameter.shape, generator=generator, dtype=torch.float64).to(parameter) * 0.1


@pytest.mark.parametrize(
    "mask",
    [[[1, 1, 1], [1, 0, 0], [0, 0, 0]], [[0, 1, 1], [1, 0, 1], [0, 0, 1]], [[1, 1, 0], [0, 1, 0], [1, 0, 0]]],
    ids=["padded at the end", "gaps", "one too many"],
)
def test_a_sample_in_a_mixed_batch_gets_what_it_gets_alone(official, mask):
    transformer, tensors = build(official, torch.float64)
    generator = torch.Generator().manual_seed(0)
    branch = ra.attach(transformer, ra.RefAlignConfig(attention="joint", r=4, align_layers=[0, 2]), seed=0)
    random_lora(branch, generator)
    branch.capture = True
    draw = lambda *shape: torch.randn(shape, generator=generator, dtype=torch.float64)  # noqa: E731
    video, references, text = draw(3, 16, 2, 6, 8), draw(3, 16, 3, 6, 8), draw(3, 5, 16)
    timestep = torch.tensor([900.0, 500.0, 100.0], dtype=torch.float64)
    mask = torch.tensor(mask, dtype=torch.bool)
    with torch.no_grad(), branch.references(references, mask):
        together = transformer(video, timestep, text).sample
        features = branch.features
    for i in range(3):
        with torch.no_grad(), branch.references(references[i : i + 1, :, mask[i]]):
            alone = transformer(video[i : i + 1], timestep[i : i + 1], text[i : i + 1]).sample
        torch.testing.assert_close(together[i : i + 1], alone, atol=1e-10, rtol=0)
        for index in (0, 2):
            assert features[index].shape == (3, 3, 12, 48)
            assert not features[index][i, ~mask[i]].any()
            if mask[i].any():
                torch.testing.assert_close(features[index][i, mask[i]], branch.features[index][0], atol=1e-10, rtol=0)


def test_references_of_another_size_are_refused_and_leave_nothing_behind(official):
    transformer, tensors = build(official)
    branch = ra.attach(transformer, ra.RefAlignConfig(attention="joint", r=4, align_layers=3), seed=0)
    with torch.no_grad():
        plain = call(transformer, tensors)
        with branch.references(torch.randn(1, 16, 2, 4, 4)), pytest.raises(ra.UserError, match="must fit the video"):
            call(transformer, tensors)
        assert torch.equal(call(transformer, tensors), plain)


@pytest.mark.parametrize(
    ("latents", "mask", "message"),
    [
        (torch.zeros(1, 16, 8, 12), None, r"\(B, C, M, h, w\)"),
        (torch.zeros(1, 16, 2, 8, 12), torch.ones(1, 3), r"mask must have shape \(B, M\) = \(1, 2\)"),
    ],
)
def test_wrong_shapes_are_told(official, latents, mask, message):
    transformer, _ = build(official)
    branch = ra.attach(transformer, ra.RefAlignConfig(attention="joint", r=4, align_layers=3))
    with pytest.raises(ra.UserError, match=message):
        branch.references(latents, mask)


def test_an_exception_inside_a_block_leaves_no_state(official):
    transformer, tensors = build(official)
    branch = ra.attach(transformer, ra.RefAlignConfig(attention="joint", r=4, align_layers=3), seed=0)
    with torch.no_grad():
        plain = call(transformer, tensors)
        handle = transformer.blocks[1].register_forward_pre_hook(lambda *_: 1 / 0)
        with pytest.raises(ZeroDivisionError), branch.references(tensors["in.reference_latents"]):
            call(transformer, tensors)
        handle.remove()
        assert torch.equal(call(transformer, tensors), plain)
