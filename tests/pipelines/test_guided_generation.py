"""Guidance passes in fewer calls, and in a part of the steps only: calls counted, videos compared."""

import re

import pytest
import torch
from tiny_adapter import SIZE, picture
from tiny_generation import IMAGES, calls_of, generate, noise

import refalign_adapter as ra


def batches(pipe, *arguments, **changes):
    """The video, and the batch size of each call of the transformer on it."""
    with calls_of(pipe.transformer) as calls:
        got = generate(pipe, *arguments, **changes)
    return got, [call[0] for call in calls if call[2] > 1]


@pytest.mark.parametrize(
    ("scales", "sizes"), [((7.5, 5.0), [2, 1]), ((7.5, 1.0), [2]), ((1.0, 5.0), [1, 1]), ((1.0, 1.0), [1])]
)
def test_batched_passes_make_the_same_video_in_fewer_calls(either, scales, sizes):
    given = {"guidance_scale": scales[0], "image_guidance_scale": scales[1], "negative_prompt": "ugly"}
    apart, _ = batches(either, "a cat", IMAGES, **given)
    together, got = batches(either, "a cat", IMAGES, batch_guidance=True, **given)
    assert got == sizes * 2
    torch.testing.assert_close(together, apart, atol=1e-5, rtol=1e-5)


def test_batched_passes_without_references(either):
    apart, _ = batches(either, "a cat", negative_prompt="ugly")
    together, got = batches(either, "a cat", negative_prompt="ugly", batch_guidance=True)
    assert got == [2, 2]
    torch.testing.assert_close(together, apart, atol=1e-5, rtol=1e-5)


def test_batched_passes_of_prompts_with_different_numbers_of_references(either):
    prompts, images = ["a", "b"], [[picture(0)], [picture(1), picture(2)]]
    given = {"latents": noise(1, batch=4), "negative_prompt": ["c", "d"], "num_videos_per_prompt": 2}
    apart, _ = batches(either, prompts, images, **given)
    together, got = batches(either, prompts, images, batch_guidance=True, **given)
    assert got == [8, 4] * 2
    torch.testing.assert_close(together, apart, atol=1e-5, rtol=1e-5)


def test_texts_of_different_lengths_cannot_share_a_batch(isolated):
    with torch.no_grad():
        embeds, _ = isolated.encode_prompt("a cat", None, False, max_sequence_length=24)
    given = {"prompt_embeds": embeds, "negative_prompt": "ugly"}
    with pytest.raises(ra.UserError, match="batch_guidance: prompt and .* need equally many tokens, got 24"):
        generate(isolated, None, IMAGES, batch_guidance=True, **given)
    assert generate(isolated, None, IMAGES, **given).shape == noise().shape


@pytest.mark.parametrize("batch", [False, True])
@pytest.mark.parametrize("references", [True, False])
def test_guidance_acts_within_its_interval(either, references, batch):
    given = {"guidance_interval": (0.25, 0.5), "num_inference_steps": 4, "batch_guidance": batch}
    images = IMAGES if references else None
    got, sizes = batches(either, "a cat", images, **given)
    guided = ([2, 1] if batch else [1, 1, 1]) if references else ([2] if batch else [1, 1])
    assert sizes == [1] + guided + [1, 1]
    everywhere, _ = batches(either, "a cat", images, num_inference_steps=4)
    assert not torch.equal(got, everywhere)
    full, _ = batches(either, "a cat", images, **given | {"guidance_interval": (0.0, 1.0)})
    torch.testing.assert_close(full, everywhere, atol=1e-5, rtol=1e-5)


def test_outside_of_its_interval_there_is_no_guidance(either):
    first = {"num_inference_steps": 3, "guidance_interval": (0.9, 1.0)}  # begins after the last of three steps
    plain = {"num_inference_steps": 3, "guidance_scale": 1.0, "image_guidance_scale": 1.0}
    assert torch.equal(generate(either, "a cat", IMAGES, **first), generate(either, "a cat", IMAGES, **plain))


def test_a_bad_interval_is_told_with_the_scales_before_any_model_runs(isolated):
    with calls_of(isolated.transformer) as calls, pytest.raises(ra.ConfigError) as caught:
        isolated("a cat", IMAGES, guidance_scale=0, guidance_interval=(1, 0), **SIZE)
    assert calls == []
    assert [re.split(" must", problem)[0] for problem in caught.value.problems] == [
        "guidance_scale",
        "guidance_interval",
    ]
