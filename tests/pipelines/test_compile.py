"""Regional torch.compile, as in diffusers: whole graphs, and no more of them with more steps or generations."""

import pytest
import torch
from tiny_adapter import SIZE, picture
from tiny_generation import IMAGES, generate
from tiny_models import tiny_pipeline
from torch._dynamo.utils import counters

import refalign_adapter as ra


@pytest.fixture
def graphs():
    """A function that counts the graphs so far; the compiler begins and ends the test anew."""
    torch._dynamo.reset()
    counters.clear()
    yield lambda: counters["stats"]["unique_graphs"]
    torch._dynamo.reset()
    counters.clear()


def compiled(pipe):
    pipe.transformer.compile_repeated_blocks(fullgraph=True, backend="eager")


def test_graphs_do_not_multiply(either_fresh, graphs):
    pipe, blocks = either_fresh
    expected = generate(pipe, "a cat", IMAGES, num_inference_steps=3)
    compiled(pipe)
    generate(pipe, "a cat", IMAGES, num_inference_steps=1)
    first = graphs()
    assert 2 * blocks <= first <= 2 * blocks + 1  # passes without references and with; old versions make one more
    got = generate(pipe, "a cat", IMAGES, num_inference_steps=3)
    torch.testing.assert_close(got, expected, atol=1e-4, rtol=1e-4)
    generate(pipe, "a dog", IMAGES, num_inference_steps=2, latents=None)
    generate(pipe, "a dog")
    assert graphs() == first
    assert not counters["graph_break"]


@pytest.fixture(params=["joint", "reference", "all"])
def either_fresh(request, fresh_pipe, isolated_adapters):
    """A pipeline, and how many kinds of blocks it has: in reference scope the last one's LoRA has fewer layers."""
    if request.param == "joint":
        return fresh_pipe, 1
    pipe = ra.load_adapter(tiny_pipeline(), isolated_adapters[request.param])
    pipe.set_progress_bar_config(disable=True)
    return pipe, 2 if request.param == "reference" else 1


def test_isolated_needs_no_graph_of_its_own_for_each_number_of_references(isolated_adapters, graphs):
    pipe = ra.load_adapter(tiny_pipeline(), isolated_adapters["all"])
    pipe.set_progress_bar_config(disable=True)
    given = {"image_guidance_scale": 1.0, "num_inference_steps": 1}
    numbers = (2, 1, 3, 4)
    expected = [generate(pipe, "a cat", [picture(0)] * number, **given) for number in numbers]
    compiled(pipe)
    for number, video in zip(numbers, expected, strict=True):
        got = generate(pipe, "a cat", [picture(0)] * number, **given)
        torch.testing.assert_close(got, video, atol=1e-4, rtol=1e-4)
    first = graphs()
    assert 2 <= first <= 3  # the second is for any number; old versions make one more
    cache = pipe.encode_references(IMAGES, **SIZE)
    got = generate(pipe, "a cat", reference_cache=cache, **given)
    assert graphs() == first
    together = generate(pipe, "a cat", reference_cache=cache, batch_guidance=True, **given)
    torch.testing.assert_close(together, got, atol=1e-4, rtol=1e-4)
    assert first < graphs() <= first + 2
    assert not counters["graph_break"]
