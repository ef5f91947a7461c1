"""`encode_references` and `reference_cache`: made once, used anywhere, saved; refused before any model runs."""

import re

import pytest
import torch
from tiny_adapter import SIZE, picture, save_tiny_adapter
from tiny_generation import IMAGES, calls_of, generate, noise
from tiny_models import tiny_pipeline

import refalign_adapter as ra


@pytest.fixture(scope="module")
def cache(isolated):
    return isolated.encode_references(IMAGES, **SIZE)


def test_one_serves_any_prompt_seed_and_guidance(isolated, cache):
    for prompt, seed, changes in (
        ("a cat", 0, {}),
        ("a dog runs", 1, {"num_inference_steps": 3}),
        ("a cat", 2, {"guidance_scale": 1.0, "image_guidance_scale": 1.0}),
        ("a cat", 3, {"batch_guidance": True, "negative_prompt": "ugly"}),
    ):
        given = {"latents": noise(seed)} | changes
        with calls_of(isolated.transformer) as calls:
            got = generate(isolated, prompt, reference_cache=cache, **given)
        assert all(call[2] == 2 for call in calls)  # no pass of references
        assert torch.equal(got, generate(isolated, prompt, IMAGES, **given))


def test_saved_and_loaded_it_makes_the_same_video_bit_for_bit(isolated, cache, tmp_path):
    path = cache.save(tmp_path / "references.safetensors")
    loaded = ra.ReferenceCache.load(path)
    assert loaded.nbytes == cache.nbytes == 3 * 2 * (2 * 6) * 48 * 4
    assert loaded.device == torch.device("cpu")
    expected = generate(isolated, "a cat", IMAGES, output_type="pt")
    assert torch.equal(generate(isolated, "a cat", reference_cache=loaded, output_type="pt"), expected)
    moved = cache.to("cpu")
    assert torch.equal(generate(isolated, "a cat", reference_cache=moved, output_type="pt"), expected)


def test_one_list_of_images_serves_several_prompts(isolated, cache):
    latents = noise(4, batch=4)
    given = {"latents": latents, "num_videos_per_prompt": 2}
    together = generate(isolated, ["a", "b"], reference_cache=cache, **given)
    torch.testing.assert_close(together, generate(isolated, ["a", "b"], [IMAGES, IMAGES], **given), atol=1e-5, rtol=0)
    alone = generate(isolated, "b", IMAGES, latents=latents[3:])
    torch.testing.assert_close(together[3:], alone, atol=1e-4, rtol=1e-4)


def test_a_list_per_prompt(isolated):
    images = [[picture(0)], [picture(1), picture(2)], []]
    cache = isolated.encode_references(images, **SIZE)
    assert len(cache) == 3
    prompts, latents = ["a", "b", "c"], noise(4, batch=6)
    given = {"latents": latents, "num_videos_per_prompt": 2}
    assert torch.equal(
        generate(isolated, prompts, reference_cache=cache, **given), generate(isolated, prompts, images, **given)
    )


def test_with_a_place_of_their_own_one_cache_serves_any_length(tmp_path):
    folder = save_tiny_adapter(tmp_path / "a", attention="isolated", lora_scope="reference", reference_frame=7)
    pipe = ra.load_adapter(tiny_pipeline(), folder)
    pipe.set_progress_bar_config(disable=True)
    cache = pipe.encode_references(IMAGES, **SIZE)
    for frames in (5, 9):
        given = {"num_frames": frames, "latents": None}
        one, other = (
            generate(pipe, "a cat", images, reference_cache=kept, generator=torch.Generator().manual_seed(0), **given)
            for images, kept in ((IMAGES, None), (None, cache))
        )
        assert torch.equal(one, other)


@pytest.mark.parametrize(
    ("changes", "messages"),
    [
        ({"reference_images": IMAGES}, ["reference_images: give either reference_images or reference_cache, which"]),
        ({"num_frames": 9, "latents": None}, ["for videos of 2 latent frames, num_frames 9 gives 3; call"]),
        ({"prompt": ["a", "b", "c"], "latents": None, "reference_cache": "two"}, ["for 2 prompts, got 3; encode"]),
        ({"reference_cache": "file.safetensors"}, [r"got str; ReferenceCache.load\(path\) reads a saved one"]),
    ],
)
def test_what_does_not_fit_is_told_before_any_model_runs(isolated, cache, changes, messages):
    if changes.get("reference_cache") == "two":
        changes = changes | {"reference_cache": isolated.encode_references([IMAGES, IMAGES], **SIZE)}
    with calls_of(isolated.transformer) as calls, pytest.raises(ra.UserError) as caught:
        generate(isolated, **{"prompt": "a cat", "reference_cache": cache} | changes)
    lines = str(caught.value).splitlines()
    assert len(lines) == len(messages)
    for line, message in zip(lines, messages, strict=True):
        assert re.search(message, line), line
    assert calls == []


def test_another_adapter_or_weight_is_told_before_any_model_runs(isolated_adapters, tmp_path):
    folder = isolated_adapters["reference"]
    pipe = ra.load_adapter(tiny_pipeline(), folder)
    pipe.set_progress_bar_config(disable=True)
    mine = pipe.encode_references(IMAGES, **SIZE)
    other = ra.load_adapter(
        tiny_pipeline(), save_tiny_adapter(tmp_path / "b", attention="isolated", lora_scope="all", lora_alpha=2)
    )
    wider = ra.load_adapter(
        tiny_pipeline(num_layers=4), save_tiny_adapter(tmp_path / "c", wide(), attention="isolated", lora_scope="all")
    )
    with calls_of(pipe.transformer) as calls:
        for cache, message in (
            (other.encode_references(IMAGES, **SIZE), "adapter 'refalign' of other weights or another strength"),
            (wider.encode_references(IMAGES, **SIZE), "cached with another base"),
        ):
            with pytest.raises(ra.UserError, match=message) as caught:
                generate(pipe, "a cat", reference_cache=cache)
            assert "\n" not in str(caught.value)
        pipe.set_adapters("refalign", 0.5)
        with pytest.raises(ra.UserError, match="of other weights or another strength; encode them again"):
            generate(pipe, "a cat", reference_cache=mine)
        pipe.set_adapters("refalign", 1.0)
        assert calls == []
    assert torch.equal(generate(pipe, "a cat", reference_cache=mine), generate(pipe, "a cat", IMAGES))


def wide():
    return tiny_pipeline(num_layers=4).transformer


def test_joint_attention_has_nothing_to_keep(pipe, isolated, cache):
    with calls_of(pipe.transformer) as calls:
        with pytest.raises(ra.UserError, match="attention 'joint' runs references along with the video and has noth"):
            pipe.encode_references(IMAGES, **SIZE)
        with pytest.raises(ra.UserError, match="joint attention reads no cached references"):
            generate(pipe, "a cat", reference_cache=cache)
    assert calls == []


@pytest.mark.parametrize(
    ("images", "changes", "message"),
    [
        ([], {}, "reference_images: give at least one image to encode"),
        (None, {}, "reference_images: give at least one image to encode"),
        (["missing.png"], {}, r"reference_images\[0\]: 'missing.png' does not exist"),
        ([picture()] * 9, {}, "9 references are too many, at most 8"),
        (IMAGES, {"height": 30, "num_frames": 4}, "(?s)num_frames must be .*height must be a multiple of 16"),
    ],
)
def test_bad_input_is_told_before_any_model_runs(isolated, images, changes, message):
    with calls_of(isolated.transformer) as calls, pytest.raises(ra.UserError, match=message):
        isolated.encode_references(images, **SIZE | changes)
    assert calls == []
