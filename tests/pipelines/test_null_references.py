"""What passes without references see where latents of zero stand for them, as in the paper's released code."""

import pytest
import torch
from tiny_adapter import SIZE, picture, save_tiny_adapter
from tiny_generation import IMAGES, calls_of, generate, noise
from tiny_models import tiny_pipeline

import refalign_adapter as ra
from refalign_adapter.branch.reference_cache import ReferenceCache
from refalign_adapter.pipelines.references import load_canvases

KINDS = {
    "joint": {},
    "isolated, reference": {"attention": "isolated", "lora_scope": "reference"},
    "isolated, all": {"attention": "isolated", "lora_scope": "all", "drop_background": True},
}


@pytest.fixture(scope="module", params=KINDS)
def pipe(request, tmp_path_factory):
    """A pipeline whose adapter replaces references by zeros; to be left as it was."""
    folder = tmp_path_factory.mktemp("zeros") / "a"
    pipe = ra.load_adapter(tiny_pipeline(), save_tiny_adapter(folder, **KINDS[request.param], null_reference="zeros"))
    pipe.set_progress_bar_config(disable=True)
    return pipe


def written_out(pipe, images, negative, scales):
    """Three passes of every step; the two without references see zeros in their places."""
    grid = (2, 3) if pipe.branch.config.drop_background else None
    canvases = load_canvases([images], SIZE["height"], SIZE["width"], grid)
    latents = torch.cat(
        [pipe.branch.family.encode_images(pipe, one[None])[:, :, None] for one in canvases.pixels[0]], 2
    )
    text, unconditional = pipe.encode_prompt("a cat", negative, max_sequence_length=16)
    scheduler, x = pipe.scheduler, noise()
    scheduler.set_timesteps(2)
    for sigma, after, t in zip(scheduler.sigmas[:-1], scheduler.sigmas[1:], scheduler.timesteps, strict=True):

        def call(embeds, references, x=x, t=t):
            with torch.no_grad(), pipe.branch.references(references, tokens=canvases.tokens):
                return pipe.transformer(x, t.expand(1), embeds, return_dict=False)[0]

        neither, image = (call(unconditional, part) for part in (torch.zeros_like(latents), latents))
        velocity = neither + scales[1] * (image - neither) + scales[0] * (call(text, latents) - image)
        x = x + (after - sigma) * velocity
    return x


@pytest.mark.parametrize("batch", [False, True])
def test_it_is_the_method_written_out(pipe, batch):
    given = {"guidance_scale": 6.0, "image_guidance_scale": 4.0, "negative_prompt": "ugly", "batch_guidance": batch}
    got = generate(pipe, "a cat", IMAGES, **given)
    torch.testing.assert_close(got, written_out(pipe, IMAGES, "ugly", (6.0, 4.0)), atol=5e-5, rtol=1e-5)


def test_prompts_with_different_numbers_of_references_get_what_they_get_alone(pipe):
    prompts, images = ["a", "b"], [[picture(0)], [picture(1), picture(2)]]
    given = {"latents": noise(1, batch=4), "num_videos_per_prompt": 2, "batch_guidance": True}
    together = generate(pipe, prompts, images, **given)
    alone = generate(pipe, "b", images[1], latents=noise(1, batch=4)[3:])
    torch.testing.assert_close(together[3:], alone, atol=1e-4, rtol=1e-4)


def test_without_any_references_nothing_stands_for_them(pipe):
    with calls_of(pipe.transformer) as calls:
        generate(pipe, "a cat", None)
    assert set(calls) == {(1, 16, 2, 4, 6)}


def test_cached_references_keep_what_stands_for_them(tmp_path):
    folder = save_tiny_adapter(tmp_path / "a", **KINDS["isolated, reference"], null_reference="zeros")
    pipe = ra.load_adapter(tiny_pipeline(), folder)
    pipe.set_progress_bar_config(disable=True)
    cache = pipe.encode_references(IMAGES, **SIZE)
    assert cache.nbytes == 2 * cache.null.nbytes
    expected = generate(pipe, "a cat", IMAGES)
    read = ReferenceCache.load(cache.save(tmp_path / "cache.safetensors"))
    for given in (cache, read, cache.to("cpu")):
        assert torch.equal(generate(pipe, "a cat", None, reference_cache=given), expected)
    plain = save_tiny_adapter(tmp_path / "b", **KINDS["isolated, reference"])
    other = ra.load_adapter(tiny_pipeline(), plain)
    with pytest.raises(ra.UserError, match="of other weights or another strength"):
        generate(other, "a cat", None, reference_cache=cache)
    with pytest.raises(ra.UserError, match="made without what passes without references read"):
        generate(
            pipe, "a cat", None, reference_cache=ra.ReferenceCache(cache.keys, cache.values, adapter=cache.adapter)
        )
