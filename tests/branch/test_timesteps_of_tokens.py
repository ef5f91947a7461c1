"""A timestep for every token, as Wan 2.2 TI2V-5B's pipeline gives it, or one for each sample."""

import pytest
import torch
from tiny_models import tiny_pipeline_of_22

import refalign_adapter as ra

FRAMES, ROWS, COLUMNS = 3, 2, 3
TOKENS = FRAMES * ROWS * COLUMNS
MODES = [("joint", "all", "video"), ("joint", "all", "clean"), ("isolated", "reference"), ("isolated", "all")]


def draw(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def attached(attention, scope, place="video"):
    transformer = tiny_pipeline_of_22().transformer.double()
    options = {"attention": attention, "lora_scope": scope, "r": 4, "align_layers": 1, "max_sequence_length": 16}
    branch = ra.attach(transformer, ra.RefAlignConfig(**options, reference_timestep=place), seed=0)
    for index, (name, parameter) in enumerate(branch.named_parameters()):
        parameter.data = parameter.data.double()
        if "lora_B" in name:
            parameter.data += 0.1 * draw(*parameter.shape, seed=index)
    return transformer, branch


def outcome(transformer, branch, timestep):
    """The velocity and the gradients of its square."""
    video, text, references = draw(2, 48, FRAMES, 2 * ROWS, 2 * COLUMNS), draw(2, 5, 32, seed=1), draw(2, 48, 2, 4, 6)
    branch.transformer.zero_grad()
    with branch.references(references):
        velocity = transformer(video, timestep, text, return_dict=False)[0]
    velocity.square().mean().backward()
    return velocity.detach(), [parameter.grad.clone() for _, parameter in branch.named_parameters()]


@pytest.mark.parametrize("mode", MODES, ids="/".join)
def test_one_for_every_token_is_one_for_the_sample(mode):
    transformer, branch = attached(*mode)
    of_samples = torch.tensor([300.0, 800.0], dtype=torch.float64)
    velocity, gradients = outcome(transformer, branch, of_samples)
    of_tokens = of_samples[:, None].expand(-1, TOKENS)
    again, of_all = outcome(transformer, branch, of_tokens)
    torch.testing.assert_close(again, velocity, atol=1e-12, rtol=1e-10)
    assert len(gradients) == len(of_all)
    for one, other in zip(gradients, of_all, strict=True):
        torch.testing.assert_close(other, one, atol=1e-12, rtol=1e-10)


def test_references_take_the_last_tokens_and_clean_ones_take_none():
    """A first frame at 0, as where a picture is given: joint references are as noisy as the video's end."""
    outputs = {}
    timestep = torch.full((2, TOKENS), 700.0, dtype=torch.float64)
    timestep[:, : ROWS * COLUMNS] = 0
    for place in ("video", "clean"):
        transformer, branch = attached("joint", "all", place)
        seen = []
        handle = transformer.condition_embedder.register_forward_hook(
            lambda _, args, __, seen=seen: seen.append(args[0])
        )
        outputs[place] = outcome(transformer, branch, timestep)[0]
        handle.remove()
        of_references = seen[0].reshape(2, -1)[:, TOKENS:]
        assert of_references.shape == (2, 2 * ROWS * COLUMNS)
        assert of_references.unique().tolist() == [700.0 if place == "video" else 0.0]
    assert not torch.equal(outputs["video"], outputs["clean"])
