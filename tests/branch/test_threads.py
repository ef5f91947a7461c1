"""Threads that share a transformer take turns or are refused; they never get each other's references."""

import threading

import pytest
import torch
from tiny_models import tiny_transformer

import refalign_adapter as ra


def draw(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


@torch.no_grad()
def run(transformer):
    return transformer(draw(1, 16, 2, 8, 8), torch.tensor([500.0]), draw(1, 5, 32, seed=2)).sample


def in_thread(task):
    """What `task` returns or raises in a thread of its own."""
    result = []

    def catch():
        try:
            result.append(task())
        except Exception as error:
            result.append(error)

    thread = threading.Thread(target=catch)
    thread.start()
    thread.join(30)
    return result[0]


@pytest.fixture(params=["joint", "isolated"])
def adapted(request):
    transformer = tiny_transformer()
    return transformer, ra.attach(
        transformer, ra.RefAlignConfig(attention=request.param, lora_scope="all", r=4, align_layers=1), seed=0
    )


def test_a_second_thread_is_refused_while_references_wait(adapted):
    transformer, branch = adapted
    references = draw(1, 16, 1, 8, 8, seed=3)
    with branch.references(references):
        assert "in use with references in another thread" in str(in_thread(lambda: run(transformer)))
        expected = run(transformer)

    def with_references():
        with branch.references(references):
            return run(transformer)

    assert torch.equal(in_thread(with_references), expected)
    assert torch.equal(in_thread(lambda: run(transformer)), run(transformer))


def test_a_second_thread_is_refused_in_the_middle_of_a_pass(adapted):
    transformer, branch = adapted
    seen = []
    handle = transformer.blocks[1].register_forward_hook(
        lambda *_: seen.append(in_thread(lambda: run(transformer))) if not seen else None
    )
    with branch.references(draw(1, 16, 1, 8, 8, seed=3)):
        got = run(transformer)
    handle.remove()
    assert isinstance(seen[0], ra.UserError)
    with branch.references(draw(1, 16, 1, 8, 8, seed=3)):
        assert torch.equal(run(transformer), got)
