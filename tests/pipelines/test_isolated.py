"""Isolated adapters: references run once per generation, whatever it does with them; without them it is the base."""

from typing import Any

import numpy as np
import pytest
import torch
from tiny_adapter import SIZE, anatomy, picture, save_tiny_adapter
from tiny_generation import IMAGES, LATENTS, calls_of, generate, noise
from tiny_models import tiny_pipeline

import refalign_adapter as ra
from refalign_adapter.media.canvas import content_tokens, place_on_canvas, prepare_reference

VIDEO = LATENTS
PREFILL = (2, 16, 1, 4, 6)


@pytest.mark.parametrize(
    ("scales", "passes"), [((7.5, 5.0), 3), ((7.5, 1.0), 2), ((1.0, 5.0), 2), ((5.0, 5.0), 2), ((1.0, 1.0), 1)]
)
def test_references_run_once_and_passes_run_the_video_alone(isolated, scales, passes):
    with calls_of(isolated.transformer) as calls:
        generate(isolated, "a cat", IMAGES, guidance_scale=scales[0], image_guidance_scale=scales[1])
    assert calls == [PREFILL] + [VIDEO] * 2 * passes
    with calls_of(isolated.transformer) as calls:
        generate(isolated, "a cat", IMAGES, num_inference_steps=5, guidance_scale=scales[0])
    assert calls.count(PREFILL) == 1


def test_without_references_none_are_run(isolated):
    with calls_of(isolated.transformer) as calls:
        generate(isolated, "a cat", [])
    assert calls == [VIDEO] * 4


def encode(pipe, image, height=32, width=48):
    canvas = np.array(prepare_reference(image, height=height, width=width))
    pixels = torch.from_numpy(canvas).permute(2, 0, 1)[None] / 127.5 - 1
    return pipe.branch.family.encode_images(pipe, pixels).unsqueeze(2)


def test_it_is_the_method_written_out(isolated):
    pipe = isolated
    got = generate(pipe, "a cat", IMAGES, negative_prompt="ugly", guidance_scale=6.0, image_guidance_scale=4.0)

    references = torch.cat([encode(pipe, image) for image in IMAGES], 2)
    text, negative = pipe.encode_prompt("a cat", "ugly", max_sequence_length=16)
    scheduler = pipe.scheduler
    scheduler.set_timesteps(2)
    x = noise()
    for sigma, after, t in zip(scheduler.sigmas[:-1], scheduler.sigmas[1:], scheduler.timesteps, strict=True):
        with torch.no_grad():
            call = lambda embeds: pipe.transformer(x, t.expand(1), embeds, return_dict=False)[0]  # noqa: B023, E731
            neither = call(negative)
            with pipe.branch.references(references):  # run anew in each call
                image_only, both = call(negative), call(text)
        velocity = neither + 4.0 * (image_only - neither) + 6.0 * (both - image_only)
        x = x + (after - sigma) * velocity
    torch.testing.assert_close(got, x, atol=2e-5, rtol=1e-5)


def test_references_and_their_order_matter(isolated):
    outputs = [generate(isolated, "a cat", given) for given in (IMAGES, IMAGES[::-1], IMAGES[:1], None)]
    for index, one in enumerate(outputs):
        for other in outputs[index + 1 :]:
            assert (one - other).abs().max() > 1e-3
    assert torch.equal(generate(isolated, "a cat", IMAGES), outputs[0])


@pytest.mark.parametrize("scales", [(7.5, 5.0), (1.0, 5.0), (1.0, 1.0)])
def test_prompts_with_different_numbers_of_references_get_what_they_get_alone(isolated, scales):
    prompts = ["a cat", "a dog runs", "nothing"]
    images = [[picture(0)], [picture(1), picture(2), picture(0)], []]
    given = {"guidance_scale": scales[0], "image_guidance_scale": scales[1]}
    latents = noise(3, batch=3)
    together = generate(isolated, prompts, images, latents=latents, **given)
    for index, prompt in enumerate(prompts):
        alone = generate(isolated, prompt, images[index], latents=latents[index : index + 1], **given)
        torch.testing.assert_close(together[index : index + 1], alone, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("batch", [False, True])
def test_several_videos_of_a_prompt_come_one_after_the_other(isolated, batch):
    latents = noise(5, batch=4)
    images = [[picture(0)], [picture(1), picture(2)]]
    given = {"num_videos_per_prompt": 2, "batch_guidance": batch}
    together = generate(isolated, ["a", "b"], images, negative_prompt=["ugly", "dark"], latents=latents, **given)
    alone = generate(isolated, "b", images[1], negative_prompt="dark", latents=latents[3:])
    torch.testing.assert_close(together[3:], alone, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_without_references_a_reference_scoped_adapter_makes_the_bases_own_videos(isolated_adapters, dtype):
    base: Any = tiny_pipeline()
    base.set_progress_bar_config(disable=True)
    base.transformer.to(dtype)
    given = {"negative_prompt": "ugly", "max_sequence_length": 16, "latents": noise(), **SIZE}
    settings = [
        {"guidance_scale": scale, "output_type": kind} | given
        for scale, kind in ((1.0, "latent"), (5.3, "latent"), (5.3, "pt"))
    ]
    expected = [base("a cat", num_inference_steps=3, **setting).frames for setting in settings]
    pipe = ra.load_adapter(base, isolated_adapters["reference"])
    pipe.set_progress_bar_config(disable=True)
    for setting, frames in zip(settings, expected, strict=True):
        got = pipe("a cat", None, num_inference_steps=3, **setting).frames
        assert torch.equal(got, frames)
        assert torch.equal(base("a cat", num_inference_steps=3, **setting).frames, frames)
    assert not torch.equal(pipe("a cat", IMAGES, num_inference_steps=3, **settings[0]).frames, expected[0])


def test_passes_without_references_are_the_bases_in_a_reference_scoped_adapter(fresh_isolated):
    pipe, base, seen = fresh_isolated, tiny_pipeline(), []
    handle = pipe.transformer.register_forward_hook(
        lambda _, args, kwargs, output: seen.append((args, kwargs, output[0])), with_kwargs=True
    )
    generate(pipe, "a cat", IMAGES, guidance_scale=1.0, image_guidance_scale=3.0)
    handle.remove()
    assert len(seen) == 5
    for index in (2, 4):  # after the references' own pass: text with references, then alone
        args, kwargs, alone = seen[index]
        with torch.no_grad():
            assert torch.equal(alone, base.transformer(*args, **kwargs)[0])
        assert not torch.equal(seen[index - 1][2], alone)


def canvas_latents(pipe, images, **changes):
    """What the prefill ran on, and what it kept."""
    with calls_of(pipe.transformer) as calls:
        cache = pipe.encode_references(images, **SIZE | changes)
    return calls, cache


def test_smaller_canvases_for_references(tmp_path):
    pipe = ra.load_adapter(
        tiny_pipeline(), save_tiny_adapter(tmp_path / "a", attention="isolated", lora_scope="all", reference_scale=0.5)
    )
    pipe.set_progress_bar_config(disable=True)
    calls, cache = canvas_latents(pipe, IMAGES, height=64, width=96)
    assert calls == [(2, 16, 1, 4, 6)]
    assert cache.tokens == 2 * 2 * 3
    calls, cache = canvas_latents(pipe, IMAGES, height=16, width=16)
    assert calls == [(2, 16, 1, 2, 2)]  # one token is the least
    assert cache.tokens == 2
    references = torch.cat([encode(pipe, image, 32, 48) for image in IMAGES], 2)
    expected = pipe.branch.encode_references(references, frames=2)
    got = pipe.encode_references(IMAGES, height=64, width=96, num_frames=5)
    assert all(map(torch.equal, got.keys, expected.keys))


def test_a_canvas_of_their_own_whatever_the_videos(tmp_path):
    own = {"attention": "isolated", "lora_scope": "reference", "reference_size": [48, 32]}
    pipe = ra.load_adapter(tiny_pipeline(), save_tiny_adapter(tmp_path / "a", **own))
    pipe.set_progress_bar_config(disable=True)
    for size in ({"height": 64, "width": 96}, {"height": 16, "width": 16}):
        calls, cache = canvas_latents(pipe, IMAGES, **size)
        assert calls == [(2, 16, 1, 6, 4)]
        assert cache.tokens == 2 * 3 * 2
    references = torch.cat([encode(pipe, image, 48, 32) for image in IMAGES], 2)
    expected = pipe.branch.encode_references(references, frames=2)
    got = pipe.encode_references(IMAGES, height=64, width=96, num_frames=5)
    assert all(map(torch.equal, got.keys, expected.keys))
    assert torch.equal(
        generate(pipe, "a cat", IMAGES),
        generate(pipe, "a cat", reference_cache=pipe.encode_references(IMAGES, **SIZE)),
    )


def test_a_canvas_that_cannot_be_cut_into_tokens_is_refused_at_loading(tmp_path):
    folder = save_tiny_adapter(tmp_path / "a", attention="isolated", lora_scope="all", reference_size=[40, 30])
    base = tiny_pipeline()
    before = anatomy(base.transformer)
    with pytest.raises(ra.UserError) as caught:
        ra.load_adapter(base, folder)
    assert str(caught.value) == (
        "adapter: reference_size must be a multiple of what a token covers, [16, 16] pixels, got [40, 30]; try "
        "[32, 32]"
    )
    assert anatomy(base.transformer) == before


def test_references_beyond_the_video_are_for_its_size_and_any_length(tmp_path):
    place = {"reference_frame": -1, "reference_place": "beyond", "reference_size": [32, 32]}
    folder = save_tiny_adapter(tmp_path / "a", attention="isolated", lora_scope="reference", **place)
    pipe = ra.load_adapter(tiny_pipeline(), folder)
    pipe.set_progress_bar_config(disable=True)
    cache = pipe.encode_references(IMAGES, **SIZE)
    assert (cache.frames, cache.grid) == (None, (2, 3))
    expected = generate(pipe, "a cat", IMAGES)
    assert torch.equal(generate(pipe, "a cat", reference_cache=cache), expected)
    longer = {"num_frames": 9, "latents": torch.randn(1, 16, 3, 4, 6)}
    assert torch.equal(
        generate(pipe, "a cat", reference_cache=cache, **longer), generate(pipe, "a cat", IMAGES, **longer)
    )
    with pytest.raises(ra.UserError) as caught:
        pipe("a cat", reference_cache=cache, **SIZE | {"height": 48})
    assert str(caught.value) == (
        "reference_cache: made for videos of 32 x 48 pixels (height x width), this one has 48 x 48; call "
        "encode_references(..., height=48, width=48)"
    )


def test_background_is_left_out(tmp_path):
    folder = save_tiny_adapter(tmp_path / "a", attention="isolated", lora_scope="reference", drop_background=True)
    pipe = ra.load_adapter(tiny_pipeline(), folder)
    pipe.set_progress_bar_config(disable=True)
    size = {"height": 32, "width": 96, "num_frames": 5}
    square, wide = picture(0, (20, 20)), picture(1, (96, 32))
    canvas = place_on_canvas(square.convert("RGBA"), 32, 96)
    tokens = torch.from_numpy(content_tokens(canvas, 2, 6))
    assert 0 < tokens.sum() < tokens.numel()
    _, cache = canvas_latents(pipe, [square], **size)
    assert cache.tokens == int(tokens.sum())
    expected = pipe.branch.encode_references(encode(pipe, square, 32, 96), None, tokens[None, None], frames=2)
    assert all(map(torch.equal, cache.keys, expected.keys))

    latents = torch.randn(2, 16, 2, 4, 12, generator=torch.Generator().manual_seed(1))
    together = generate(pipe, ["a", "b"], [[square, wide], [wide]], **size | {"latents": latents})
    for index, (prompt, images) in enumerate({"a": [square, wide], "b": [wide]}.items()):
        alone = generate(pipe, prompt, images, **size | {"latents": latents[index : index + 1]})
        torch.testing.assert_close(together[index : index + 1], alone, atol=1e-4, rtol=1e-4)
    with torch.no_grad():
        whole = pipe.branch.encode_references(encode(pipe, square, 32, 96), frames=2)
    a, b = (generate(pipe, "a", reference_cache=given, **size | {"latents": latents[:1]}) for given in (whole, cache))
    assert (a - b).abs().max() > 1e-4


def test_a_weight_for_all_loras_cannot_reach_references(isolated, pipe):
    with calls_of(isolated.transformer) as calls, pytest.raises(ra.UserError, match="'scale' does not reach refer"):
        generate(isolated, "a cat", IMAGES, attention_kwargs={"scale": 0.5})
    assert calls == []
    generate(isolated, "a cat", attention_kwargs={"scale": 0.5})
    weak = generate(pipe, "a cat", IMAGES, attention_kwargs={"scale": 0.5})
    assert not torch.equal(weak, generate(pipe, "a cat", IMAGES))
