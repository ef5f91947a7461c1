"""No generation leaves a trace in another: exceptions, pipelines that share a transformer, nested calls, threads."""

import threading
from typing import Any

import pytest
import torch
from tiny_adapter import SIZE, anatomy, picture
from tiny_generation import IMAGES, generate
from tiny_models import tiny_pipeline

import refalign_adapter as ra
from refalign_adapter.pipelines.reference_class import build_pipeline

OTHERS = [picture(5)]


def raising(*_, **__):
    raise ZeroDivisionError


@pytest.fixture(scope="module")
def base_video():
    base: Any = tiny_pipeline()
    base.set_progress_bar_config(disable=True)
    return generate(base, "a cat", guidance_scale=7.5, max_sequence_length=16)


@pytest.mark.parametrize("where", ["callback", "prefill", "a pass without", "a pass with", "the VAE", "the scheduler"])
def test_an_exception_in_the_middle_leaves_no_state(fresh_isolated, base_video, monkeypatch, where):
    pipe = fresh_isolated
    expected, before, scheduler = (
        generate(pipe, "a cat", IMAGES),
        anatomy(pipe.transformer),
        dict(vars(pipe.scheduler)),
    )
    layer = pipe.transformer.blocks[1].attn1.to_out[0]
    calls, seen, forward = {"prefill": 1, "a pass without": 2, "a pass with": 3}, [], layer.forward

    def counted(*arguments):
        seen.append(1)
        return raising() if len(seen) == calls.get(where) else forward(*arguments)

    with monkeypatch.context() as patch:
        patch.setattr(layer, "forward", counted)
        if where == "the VAE":
            patch.setattr(pipe.vae, "encode", raising)
        if where == "the scheduler":
            patch.setattr(type(pipe.scheduler), "step", raising)
        with pytest.raises(ZeroDivisionError):
            generate(pipe, "a cat", IMAGES, callback_on_step_end=raising if where == "callback" else None)
    assert pipe.current_timestep is None
    assert anatomy(pipe.transformer) == before
    assert vars(pipe.scheduler).keys() == scheduler.keys()
    assert all(value is scheduler[name] for name, value in vars(pipe.scheduler).items())
    assert torch.equal(generate(pipe, "a cat"), base_video)
    assert torch.equal(generate(pipe, "a cat", IMAGES), expected)


def beside(pipe):
    """Another reference pipeline around the same components."""
    other = build_pipeline(pipe)
    other.set_progress_bar_config(disable=True)
    return other


def test_pipelines_that_share_a_transformer_take_turns(either):
    one, other = either, beside(either)
    stock: Any = build_stock(either)
    expected = generate(one, "a cat", IMAGES), generate(one, "a dog", OTHERS), generate(one, "a cat")
    for _ in range(2):
        assert torch.equal(generate(one, "a cat", IMAGES), expected[0])
        assert torch.equal(generate(other, "a dog", OTHERS), expected[1])
        assert torch.equal(generate(stock, "a cat", guidance_scale=7.5, max_sequence_length=16), expected[2])


def build_stock(pipe):
    """diffusers' own pipeline around the same components."""
    stock = type(tiny_pipeline())(**{name: value for name, value in pipe.components.items() if value is not None})
    stock.set_progress_bar_config(disable=True)
    return stock


@pytest.mark.parametrize(("same", "step_cache"), [(False, False), (True, True)])
def test_one_generation_inside_anothers_callback(either, same, step_cache):
    from diffusers import FirstBlockCacheConfig

    other = either if same else beside(either)
    given = {"num_inference_steps": 3}
    expected = [
        generate(either, "a cat", IMAGES, **given),
        generate(either, "a dog", OTHERS),
        generate(either, "a dog"),
    ]
    inner = []

    def callback(*_):
        inner.extend([generate(other, "a dog", OTHERS), generate(other, "a dog")])
        return {}

    if step_cache:  # that never skips, but would compare one generation's blocks with another's
        either.transformer.enable_cache(FirstBlockCacheConfig(threshold=0.0))
    try:
        outer = generate(either, "a cat", IMAGES, callback_on_step_end=callback, **given)
    finally:
        if step_cache:
            either.transformer.disable_cache()
    assert torch.equal(outer, expected[0])
    assert len(inner) == 6
    for got, wanted in zip(inner, expected[1:] * 3, strict=True):
        assert torch.equal(got, wanted)


class Held:
    """A generation in a thread of its own that waits in the middle of a block until it is let go."""

    def __init__(self, pipe, images, after=1):
        self.reached, self.go, self.result, self.error = threading.Event(), threading.Event(), None, None
        self.seen, self.after = 0, after
        self.handle = pipe.transformer.blocks[1].register_forward_pre_hook(self.wait)
        self.thread = threading.Thread(target=self.run, args=(pipe, images))
        self.thread.start()
        assert self.reached.wait(60)

    def wait(self, *_):
        if threading.current_thread() is self.thread:
            self.seen += 1
            if self.seen == self.after:
                self.reached.set()
                assert self.go.wait(60)

    def run(self, pipe, images):
        self.result = generate(pipe, "a cat", images)

    def finish(self):
        self.go.set()
        self.thread.join()
        self.handle.remove()
        return self.result


@pytest.mark.parametrize("after", [1, 2, 3], ids=["first call", "second", "third"])
def test_a_second_thread_is_refused_while_the_first_generates(either, after):
    other, stock, expected = beside(either), build_stock(either), generate(either, "a cat", IMAGES)
    isolated = other.branch.config.attention == "isolated"
    held = Held(either, IMAGES, after)
    try:
        for images in (OTHERS, None):
            with pytest.raises(ra.UserError, match="in use with references in another thread; let threads take turns"):
                generate(other, "a dog", images)
        if isolated:
            with pytest.raises(ra.UserError, match="in use with references in another thread"):
                other.encode_references(OTHERS, **SIZE)
        with pytest.raises(ra.UserError, match="in use with references in another thread"):
            generate(stock, "a dog", max_sequence_length=16)
    finally:
        result = held.finish()
    assert torch.equal(result, expected)
    assert torch.equal(generate(other, "a cat", IMAGES), expected)


def test_threads_that_take_turns(either):
    expected = [generate(either, "a cat", IMAGES), generate(either, "a cat", OTHERS)]
    pipes, lock, got = [either, beside(either)], threading.Lock(), {}

    def work(index):
        for round in range(2):
            with lock:
                got[index, round] = generate(pipes[index], "a cat", [IMAGES, OTHERS][index])

    threads = [threading.Thread(target=work, args=(index,)) for index in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(got) == 4
    for (index, _), video in got.items():
        assert torch.equal(video, expected[index])
