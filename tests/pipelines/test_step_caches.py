"""diffusers' step caches: every kind works with references, in both attentions, or is refused with the reason."""

import diffusers.hooks
import pytest
import torch
from diffusers import FasterCacheConfig, FirstBlockCacheConfig, PyramidAttentionBroadcastConfig
from tiny_generation import IMAGES, calls_of, generate

import refalign_adapter as ra
from refalign_adapter.pipelines.step_caches import BY_CONTEXT, COUNTING, REFUSED

GIVEN = {"num_inference_steps": 5, "guidance_scale": 5.0, "image_guidance_scale": 5.0}
RATIOS = {"num_inference_steps": 5, "mag_ratios": [1.02] * 5}


def config(name, **values):
    """Of a kind that this version of diffusers has."""
    if not hasattr(diffusers.hooks, name):
        pytest.skip(f"diffusers {diffusers.__version__} has no {name}")
    return getattr(diffusers.hooks, name)(**values)


EXACT = {
    "FirstBlockCacheConfig": {"threshold": 0.0},
    "MagCacheConfig": {"threshold": 0.0, "retention_ratio": 0.0, **RATIOS},
    "SeaCacheConfig": {"threshold": 0.0},
    "TaylorSeerCacheConfig": {"cache_interval": 1, "disable_cache_before_step": 1, "use_lite_mode": True},
    "TextKVCacheConfig": {},
}
"""Settings with which nothing is skipped."""

SKIPPING = {
    "FirstBlockCacheConfig": {"threshold": 0.2},
    "MagCacheConfig": {"threshold": 0.3, **RATIOS},
    "SeaCacheConfig": {"threshold": 1.0},
    "TaylorSeerCacheConfig": {"cache_interval": 3, "disable_cache_before_step": 2, "use_lite_mode": True},
}
"""Settings that skip some blocks."""


@pytest.fixture
def cached(either):
    """A function that enables a cache for the length of the test."""
    yield lambda settings: either.transformer.enable_cache(settings)
    if either.transformer.is_cache_enabled:
        either.transformer.disable_cache()


def blocks_run(pipe, *arguments, **changes):
    """A video, and how often its last block ran."""
    seen = []
    handle = pipe.transformer.blocks[-1].ffn.register_forward_hook(lambda *_: seen.append(1))
    got = generate(pipe, *arguments, **GIVEN | changes)
    handle.remove()
    return got, len(seen)


def test_the_lists_name_every_kind_of_this_version():
    kinds = {name for name in vars(diffusers.hooks) if name.endswith("CacheConfig")}
    kinds |= {"PyramidAttentionBroadcastConfig"}
    assert kinds <= BY_CONTEXT | REFUSED.keys()
    assert not BY_CONTEXT & REFUSED.keys()
    assert BY_CONTEXT == EXACT.keys()


@pytest.mark.parametrize("name", sorted(EXACT))
def test_a_cache_that_skips_nothing_changes_nothing(either, cached, name):
    given = {"image_guidance_scale": 3.0, "batch_guidance": True}
    expected, blocks = blocks_run(either, "a cat", IMAGES, **given)
    cached(config(name, **EXACT[name]))
    got, same = blocks_run(either, "a cat", IMAGES, **given)
    assert same == blocks
    torch.testing.assert_close(got, expected, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("name", sorted(SKIPPING))
def test_a_cache_that_skips_makes_a_video_again_and_forgets_the_last(either, cached, name):
    expected, blocks = blocks_run(either, "a cat", IMAGES)
    cached(config(name, **SKIPPING[name]))
    first, fewer = blocks_run(either, "a cat", IMAGES)
    assert fewer < blocks
    assert 1e-4 < (first - expected).abs().max() < 1
    blocks_run(either, "a dog", IMAGES[:1], num_inference_steps=2)
    again, same = blocks_run(either, "a cat", IMAGES)
    assert same == fewer
    assert torch.equal(again, first)
    either.transformer.disable_cache()
    assert torch.equal(blocks_run(either, "a cat", IMAGES)[0], expected)


@pytest.mark.parametrize("images", [IMAGES, None], ids=["references", "none"])
@pytest.mark.parametrize("name", sorted(BY_CONTEXT - COUNTING))
def test_passes_may_be_left_out_where_calls_are_not_counted(either, cached, name, images):
    given = {"image_guidance_scale": 3.0, "guidance_refresh": 3, "num_inference_steps": 7}
    expected, blocks = blocks_run(either, "a cat", images, **given)
    cached(config(name, **EXACT[name]))
    got, same = blocks_run(either, "a cat", images, **given)
    prefill = images is not None and either.branch.config.attention == "isolated"
    assert same == blocks == 4 * (3 if images else 2) + 3 + prefill
    torch.testing.assert_close(got, expected, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("name", sorted(SKIPPING.keys() - COUNTING))
def test_a_cache_that_skips_and_passes_left_out_make_a_video_again(either, cached, name):
    given = {"image_guidance_scale": 3.0, "guidance_refresh": 2}
    expected, blocks = blocks_run(either, "a cat", IMAGES, **given)
    cached(config(name, **SKIPPING[name]))
    first, fewer = blocks_run(either, "a cat", IMAGES, **given)
    assert fewer < blocks
    assert 1e-4 < (first - expected).abs().max() < 1
    blocks_run(either, "a dog", IMAGES[:1], num_inference_steps=2)
    assert torch.equal(blocks_run(either, "a cat", IMAGES, **given)[0], first)


@pytest.mark.parametrize("images", [IMAGES, None], ids=["references", "none"])
@pytest.mark.parametrize("name", sorted(COUNTING))
def test_caches_that_count_calls_have_guidance_computed_in_every_step(either, cached, name, images):
    cached(config(name, **EXACT[name]))
    with calls_of(either.transformer) as calls, pytest.raises(ra.UserError) as caught:
        generate(either, "a cat", images, guidance_refresh=2)
    assert calls == []
    assert str(caught.value) == (
        f"guidance_refresh must be 1 with this step cache, got 2: {name} counts the calls of a pass as steps; call "
        "pipe.transformer.disable_cache(), or enable FirstBlockCacheConfig"
    )


def test_caches_without_contexts_have_guidance_computed_in_every_step(either, cached):
    current = lambda: either.current_timestep  # noqa: E731
    cached(PyramidAttentionBroadcastConfig(spatial_attention_block_skip_range=2, current_timestep_callback=current))
    with pytest.raises(ra.UserError, match="got 2: PyramidAttentionBroadcastConfig does not tell passes apart; call"):
        generate(either, "a cat", guidance_refresh=2)


@pytest.mark.parametrize("name", sorted(SKIPPING))
def test_references_encoded_beforehand_are_never_skipped(isolated, name):
    expected = isolated.encode_references(IMAGES, height=32, width=48, num_frames=5)
    isolated.transformer.enable_cache(config(name, **SKIPPING[name]))
    try:
        for _ in range(3):
            with calls_of(isolated.transformer) as calls:
                got = isolated.encode_references(IMAGES, height=32, width=48, num_frames=5)
            assert len(calls) == 1
            assert all(map(torch.equal, got.keys + got.values, expected.keys + expected.values))
    finally:
        isolated.transformer.disable_cache()


@pytest.mark.parametrize(
    ("settings", "reason"),
    [
        (PyramidAttentionBroadcastConfig, "PyramidAttentionBroadcastConfig keeps one state for all passes"),
        (FasterCacheConfig, "FasterCacheConfig takes every call for a pair of passes, without and with a prompt"),
    ],
)
def test_caches_that_would_mix_up_passes_are_refused(either, cached, settings, reason):
    cached(settings(spatial_attention_block_skip_range=2, current_timestep_callback=lambda: either.current_timestep))
    with calls_of(either.transformer) as calls, pytest.raises(ra.UserError, match=reason) as caught:
        generate(either, "a cat", IMAGES)
    assert calls == []
    assert "\n" not in str(caught.value)
    assert "call pipe.transformer.disable_cache(), or enable FirstBlockCacheConfig" in str(caught.value)


def test_a_kind_that_nobody_has_tried_is_refused(either, monkeypatch):
    monkeypatch.setattr(either.transformer, "_cache_config", type("NewCacheConfig", (), {})())
    with pytest.raises(ra.UserError, match="NewCacheConfig is not known to tell passes with and without references"):
        generate(either, "a cat", IMAGES)


def test_without_references_they_are_diffusers_own_affair(either, cached):
    cached(FirstBlockCacheConfig(threshold=0.0))
    expected = generate(either, "a cat")
    either.transformer.disable_cache()
    torch.testing.assert_close(generate(either, "a cat"), expected, atol=1e-6, rtol=0)
