"""Generation with references: the method written out, passes counted, batches against single calls, bad input."""

import re
from typing import Any

import numpy as np
import pytest
import torch
from tiny_adapter import SIZE, anatomy, picture
from tiny_generation import LATENTS, generate, noise
from tiny_models import tiny_pipeline

import refalign_adapter as ra
from refalign_adapter.media.canvas import prepare_reference

STEPS = {"num_inference_steps": 2}


@pytest.fixture
def calls(pipe):
    """What each call of the transformer got: number of frames that ride along."""
    seen = []
    handle = pipe.transformer.patch_embedding.register_forward_hook(
        lambda _, args, __: seen.append(args[0].shape[2] - 2)
    )
    yield seen
    handle.remove()


@pytest.mark.parametrize(
    ("scales", "riders"),
    [
        ((7.5, 5.0), [0, 2, 2]),
        ((7.5, 1.0), [2, 2]),
        ((1.0, 5.0), [0, 2]),
        ((5.0, 5.0), [0, 2]),
        ((1.0, 1.0), [2]),
    ],
)
def test_passes_of_a_step(pipe, calls, scales, riders):
    generate(pipe, "a cat", [picture(0), picture(1)], guidance_scale=scales[0], image_guidance_scale=scales[1])
    steps = calls[: len(riders)], calls[len(riders) :]
    assert [sorted(step) for step in steps] == [riders] * 2


@pytest.mark.parametrize(("scale", "riders"), [(7.5, [0, 0]), (1.0, [0])])
def test_passes_of_a_step_without_references(pipe, calls, scale, riders):
    generate(pipe, "a cat", [], guidance_scale=scale)
    assert calls == riders * 2


def test_it_is_the_method_written_out(pipe):
    images = [picture(0), picture(1, (10, 60))]
    got = generate(pipe, "a cat", images, negative_prompt="ugly", guidance_scale=6.0, image_guidance_scale=4.0)

    references = []
    for image in images:
        canvas = np.array(prepare_reference(image, height=32, width=48))
        video = torch.from_numpy(canvas).permute(2, 0, 1)[None, :, None] / 127.5 - 1
        with torch.no_grad():
            latent = pipe.vae.encode(video).latent_dist.mode()
        mean = torch.tensor(pipe.vae.config.latents_mean).view(1, -1, 1, 1, 1)
        std = torch.tensor(pipe.vae.config.latents_std).view(1, -1, 1, 1, 1)
        references.append((latent - mean) / std)
    references = torch.cat(references, 2)
    text, negative = pipe.encode_prompt("a cat", "ugly", max_sequence_length=16)
    scheduler = pipe.scheduler
    scheduler.set_timesteps(2)
    x = noise()
    for sigma, after, t in zip(scheduler.sigmas[:-1], scheduler.sigmas[1:], scheduler.timesteps, strict=True):
        with torch.no_grad():
            call = lambda embeds: pipe.transformer(x, t.expand(1), embeds, return_dict=False)[0]  # noqa: B023, E731
            neither = call(negative)
            with pipe.branch.references(references):
                image_only, both = call(negative), call(text)
        velocity = neither + 4.0 * (image_only - neither) + 6.0 * (both - image_only)
        x = x + (after - sigma) * velocity
    torch.testing.assert_close(got, x, atol=2e-5, rtol=1e-5)


def test_without_references_and_guidance_it_is_the_stock_pipeline_with_the_lora(pipe, adapter):
    stock: Any = tiny_pipeline()
    stock.load_lora_weights(adapter)
    stock.set_progress_bar_config(disable=True)
    given = {"latents": noise(), "max_sequence_length": 16, **SIZE, **STEPS}
    for scale in (1.0, 5.0):
        expected = stock("a cat", negative_prompt="ugly", guidance_scale=scale, output_type="latent", **given).frames
        got = pipe("a cat", negative_prompt="ugly", guidance_scale=scale, output_type="latent", **given).frames
        torch.testing.assert_close(got, expected, atol=1e-6, rtol=0)
    video = pipe("a cat", guidance_scale=1.0, **given).frames
    assert video.shape == (1, 5, 32, 48, 3)
    np.testing.assert_allclose(video, stock("a cat", guidance_scale=1.0, **given).frames, atol=1e-5)


def test_references_and_their_order_matter(pipe):
    images = [picture(0), picture(1)]
    outputs = [generate(pipe, "a cat", given) for given in (images, images[::-1], images[:1], None)]
    for index, one in enumerate(outputs):
        for other in outputs[index + 1 :]:
            assert (one - other).abs().max() > 1e-3
    assert torch.equal(generate(pipe, "a cat", images), outputs[0])


@pytest.mark.parametrize("scales", [(7.5, 5.0), (1.0, 5.0), (1.0, 1.0)])
def test_prompts_with_different_numbers_of_references_get_what_they_get_alone(pipe, scales):
    prompts = ["a cat", "a dog runs", "nothing"]
    images = [[picture(0)], [picture(1), picture(2), picture(0)], []]
    given = {"guidance_scale": scales[0], "image_guidance_scale": scales[1]}
    latents = noise(3, batch=3)
    together = generate(pipe, prompts, images, latents=latents, **given)
    for index, prompt in enumerate(prompts):
        alone = generate(pipe, prompt, images[index], latents=latents[index : index + 1], **given)
        torch.testing.assert_close(together[index : index + 1], alone, atol=1e-4, rtol=1e-4)


def test_several_videos_of_a_prompt_come_one_after_the_other(pipe):
    latents = noise(5, batch=4)
    images = [[picture(0)], [picture(1), picture(2)]]
    negative = ["ugly", "dark"]
    together = generate(pipe, ["a", "b"], images, negative_prompt=negative, latents=latents, num_videos_per_prompt=2)
    alone = generate(pipe, "b", images[1], negative_prompt="dark", latents=latents[3:])
    torch.testing.assert_close(together[3:], alone, atol=1e-4, rtol=1e-4)


def test_embeddings_in_place_of_texts(pipe):
    images = [picture(0)]
    with torch.no_grad():
        embeds, negative = pipe.encode_prompt("a cat", "ugly", max_sequence_length=16)
    expected = generate(pipe, "a cat", images, negative_prompt="ugly")
    given = {"prompt_embeds": embeds, "negative_prompt_embeds": negative}
    assert torch.equal(generate(pipe, None, images, **given), expected)
    twice = generate(pipe, None, images, latents=noise().repeat(2, 1, 1, 1, 1), num_videos_per_prompt=2, **given)
    torch.testing.assert_close(twice[1:], expected, atol=1e-5, rtol=1e-5)


def test_generators_decide_the_noise(pipe):
    make = lambda seed: torch.Generator().manual_seed(seed)  # noqa: E731
    one = generate(pipe, "a cat", [picture()], latents=None, generator=make(4))
    assert torch.equal(generate(pipe, "a cat", [picture()], latents=None, generator=make(4)), one)
    assert not torch.equal(generate(pipe, "a cat", [picture()], latents=None, generator=make(5)), one)
    images = [[picture()], [picture()]]
    both = generate(pipe, ["a cat", "a cat"], images, latents=None, generator=[make(5), make(4)])
    torch.testing.assert_close(both[1:], one, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize(
    ("kind", "shape"), [("np", (1, 5, 32, 48, 3)), ("pt", (1, 5, 3, 32, 48)), ("latent", LATENTS)]
)
def test_output_types(pipe, kind, shape):
    frames = generate(pipe, "a cat", [picture()], output_type=kind)
    assert frames.shape == shape
    if kind != "latent":
        assert 0 <= frames.min() <= frames.max() <= 1
    (as_tuple,) = pipe("a cat", [picture()], output_type=kind, latents=noise(), return_dict=False, **SIZE, **STEPS)
    assert np.array_equal(np.asarray(as_tuple), np.asarray(frames))


def test_a_single_frame_and_another_shape(pipe):
    assert generate(pipe, "a cat", [picture()], latents=None, num_frames=1, height=16, width=16).shape == (
        1,
        16,
        1,
        2,
        2,
    )
    assert generate(pipe, "a cat", [picture()], latents=None, num_frames=9, height=48, width=32).shape == (
        1,
        16,
        3,
        6,
        4,
    )


def test_callbacks_see_and_replace(pipe):
    seen = []

    def callback(given, step, timestep, values):
        seen.append((given is pipe, step, float(timestep), sorted(values)))
        return {"latents": torch.zeros_like(values["latents"])} if step == 1 else {}

    names = ["latents", "prompt_embeds", "negative_prompt_embeds"]
    got = generate(pipe, "a cat", [picture()], callback_on_step_end=callback, callback_on_step_end_tensor_inputs=names)
    assert not got.any()
    assert [(mine, step, given) for mine, step, _, given in seen] == [
        (True, 0, sorted(names)),
        (True, 1, sorted(names)),
    ]
    assert seen[0][2] == 1000 > seen[1][2]


def test_interrupt_stops_after_the_step(pipe, calls):
    def callback(given, *_):
        given._interrupt = True
        return {}

    generate(pipe, "a cat", [picture()], callback_on_step_end=callback, num_inference_steps=4)
    assert len(calls) == 3
    generate(pipe, "a cat", [picture()], num_inference_steps=1)
    assert len(calls) == 6


def test_text_is_as_long_as_the_adapter_was_trained_with(pipe):
    seen = []
    embedder = pipe.transformer.condition_embedder.text_embedder
    handle = embedder.register_forward_hook(lambda _, args, __: seen.append(args[0].shape[1]))
    generate(pipe, "a cat", [picture()])
    generate(pipe, "a cat", [picture()], max_sequence_length=24)
    handle.remove()
    assert set(seen[:6]) == {16}
    assert set(seen[6:]) == {24}


def test_caches_of_diffusers_are_told_which_pass_it_is(pipe, monkeypatch):
    latest, names, original = [], [], pipe.transformer.cache_context

    def cache_context(name, **values):  # diffusers' loop gives values since 0.41; its own call is not the latest
        latest[:] = [(name, values.get("step_index"), values.get("num_inference_steps"))]
        return original(name)

    monkeypatch.setattr(pipe.transformer, "cache_context", cache_context)
    handle = pipe.transformer.patch_embedding.register_forward_hook(lambda *_: names.extend(latest))
    generate(pipe, "a cat", [picture()])
    handle.remove()
    passes = ["text_references", "negative_references", "negative_alone"]
    assert names == [(name, step, 2) for step in range(2) for name in passes]


def test_bfloat16_transformer(adapter):
    base = tiny_pipeline()
    base.transformer.to(torch.bfloat16)
    pipe = ra.load_adapter(base, adapter)
    pipe.set_progress_bar_config(disable=True)
    frames = generate(pipe, "a cat", [picture()])
    assert frames.dtype == torch.float32
    assert frames.isfinite().all()


@pytest.mark.parametrize(
    ("changes", "messages"),
    [
        ({"height": 40}, ["height must be a multiple of 16, got 40; try 32"]),
        (
            {"width": 0, "num_frames": 7},
            ["num_frames must be .* 4 plus 1, got 7; try 9", "width must be .* 16, got 0"],
        ),
        ({"num_frames": 0}, ["num_frames must be a multiple of 4 plus 1, got 0; try 1"]),
        ({"num_inference_steps": 0, "num_videos_per_prompt": 0}, ["num_inference_steps must be", "num_videos_per_p"]),
        ({"guidance_scale": 0.0}, ["guidance_scale must be at least 1"]),
        ({"latents": noise()[:, :, :1]}, [r"latents must have shape \(1, 16, 2, 4, 6\) .*, got \(1, 16, 1, 4, 6\)"]),
        ({"prompt": None}, ["prompt: give a text, or prompt_embeds"]),
        ({"prompt": []}, [r"prompt: expected a text or a list of at least one, got \[\]"]),
        ({"prompt": [3]}, ["prompt: expected a text or"]),
        ({"prompt": 3}, ["prompt: expected a text or a list"]),
        ({"negative_prompt": ["a", "b"]}, ["negative_prompt: 1 prompts need one text or 1, got 2"]),
        ({"negative_prompt_embeds": torch.zeros(2, 4, 32)}, ["negative_prompt_embeds: 1 prompts need 1, got 2"]),
        ({"generator": [torch.Generator()] * 2}, ["generator: 1 videos need one generator or 1, got 2"]),
        ({"callback_on_step_end_tensor_inputs": ["nothing"]}, ["callback_on_step_end_tensor_inputs"]),
        (
            {"reference_images": ["a.png", 3]},
            [r"images\[0\]: 'a.png' does not exist", r"images\[1\]: expected a path"],
        ),
        ({"reference_images": [picture()] * 9}, ["9 references are too many, at most 8"]),
    ],
)
def test_bad_input_is_told_before_any_model_runs(pipe, calls, changes, messages):
    with pytest.raises(ra.UserError) as caught:
        generate(pipe, **{"prompt": "a cat", "reference_images": [picture()]} | changes)
    lines = str(caught.value).splitlines()
    assert len(lines) == len(messages), lines
    for line, message in zip(lines, messages, strict=True):
        assert re.search(message, line), line
    assert calls == []


def test_more_references_when_asked_for(pipe, calls, monkeypatch):
    monkeypatch.setattr(pipe, "max_references", 9)
    generate(pipe, "a cat", [picture()] * 9, guidance_scale=1.0, image_guidance_scale=1.0)
    assert calls == [9, 9]


def test_an_exception_in_the_middle_leaves_no_state(pipe):
    before, expected = anatomy(pipe.transformer), generate(pipe, "a cat", [picture()])
    plain = generate(pipe, "a cat")

    def callback(*_):
        raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        generate(pipe, "a cat", [picture()], callback_on_step_end=callback)
    block = pipe.transformer.blocks[1]
    handle = block.register_forward_pre_hook(lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        generate(pipe, "a cat", [picture()])
    handle.remove()
    assert pipe.current_timestep is None
    assert anatomy(pipe.transformer) == before
    assert torch.equal(generate(pipe, "a cat"), plain)
    assert torch.equal(generate(pipe, "a cat", [picture()]), expected)


def test_model_offloading_gives_the_same(fresh_pipe, monkeypatch):
    pipe = fresh_pipe
    expected = generate(pipe, "a cat", [picture()])
    pipe.enable_model_cpu_offload(device="cpu")
    order, encode, move = [], pipe.branch.family.encode_images, pipe.vae._hf_hook.pre_forward
    monkeypatch.setattr(pipe.vae._hf_hook, "pre_forward", lambda *given: order.append("moved") or move(*given))
    monkeypatch.setattr(pipe.branch.family, "encode_images", lambda *given: order.append("asked") or encode(*given))
    assert torch.equal(generate(pipe, "a cat", [picture()]), expected)
    assert order[:2] == ["moved", "asked"]
    assert torch.equal(generate(pipe, "a cat", [picture()]), expected)
