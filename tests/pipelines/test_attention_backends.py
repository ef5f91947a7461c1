"""Attention backends: set by diffusers' switch they serve references too; those without masks are refused in time."""

import pytest
import torch
from diffusers.models.attention_dispatch import _AttentionBackendRegistry
from tiny_adapter import SIZE, picture, save_tiny_adapter
from tiny_generation import IMAGES, calls_of, generate, noise
from tiny_models import tiny_pipeline

import refalign_adapter as ra
from refalign_adapter.pipelines.attention_backends import WITHOUT_MASK, backends_of, takes_mask

BACKENDS = {backend.value: function for backend, function in _AttentionBackendRegistry._backends.items()}


@pytest.fixture(autouse=True)
def native():
    """Every test leaves the dispatcher's active backend as it was."""
    before = _AttentionBackendRegistry.get_active_backend()[0]
    yield
    _AttentionBackendRegistry._active_backend = before


@pytest.mark.parametrize("name", sorted(BACKENDS))
def test_the_list_is_what_the_dispatcher_does(name):
    """A backend raises on a mask before it looks for its kernel, so that this needs no GPU and no kernel."""
    query = torch.zeros(1, 4, 2, 8)
    mask = torch.ones(1, 1, 1, 4, dtype=torch.bool)
    if "attn_mask" not in _AttentionBackendRegistry._supported_arg_names[_backend(name)]:
        assert not takes_mask(name)
        return
    refused = False
    try:
        BACKENDS[name](query=query, key=query, value=query, attn_mask=mask)
    except ValueError as error:
        refused = "attn_mask" in str(error)
    except (TypeError, RuntimeError, AttributeError, ImportError):
        pass  # it takes the mask, but has no kernel here
    assert takes_mask(name) != refused


def _backend(name):
    return next(backend for backend in _AttentionBackendRegistry._backends if backend.value == name)


def mark(transformer, name):
    """As `set_attention_backend` does, for a backend whose kernel is not here."""
    for processor in transformer.attn_processors.values():
        processor._attention_backend = _backend(name)


@pytest.fixture
def reset(either):
    yield
    either.transformer.reset_attention_backend()


@pytest.mark.parametrize("name", ["native", "_native_math", "flex"])
def test_backends_that_run_here_make_the_same_video(either, reset, name):
    prompts, images = ["a", "b"], [[picture(0)], [picture(1), picture(2)]]
    given = {"latents": noise(1, batch=2), "num_inference_steps": 1, "image_guidance_scale": 1.0}
    expected = generate(either, "a cat", IMAGES), generate(either, prompts, images, **given)
    either.transformer.set_attention_backend(name)
    family = either.branch.family
    assert backends_of(either.transformer, family) == {name}
    got = generate(either, "a cat", IMAGES), generate(either, prompts, images, **given)
    for one, other in zip(got, expected, strict=True):
        torch.testing.assert_close(one, other, atol=2e-5, rtol=1e-5)
    either.transformer.reset_attention_backend()
    _AttentionBackendRegistry._active_backend = _backend("native")
    assert backends_of(either.transformer, family) == {"native"}
    assert torch.equal(generate(either, "a cat", IMAGES), expected[0])


def test_the_switch_reaches_every_attention_and_comes_off_with_the_adapter(isolated_adapters):
    base = tiny_pipeline()
    pipe = ra.load_adapter(base, isolated_adapters["reference"])
    base.transformer.set_attention_backend("_native_math")
    seen = {processor._attention_backend.value for processor in base.transformer.attn_processors.values()}
    assert seen == {"_native_math"}
    pipe.unload()
    assert {processor._attention_backend.value for processor in base.transformer.attn_processors.values()} == seen


@pytest.mark.parametrize("name", sorted(WITHOUT_MASK & BACKENDS.keys()))
def test_without_masks_different_numbers_of_references_are_refused(either, reset, name):
    mark(either.transformer, name)
    with calls_of(either.transformer) as calls, pytest.raises(ra.UserError) as caught:
        generate(either, ["a", "b"], [[picture(0)], IMAGES], latents=noise(0, batch=2))
    assert calls == []
    assert str(caught.value) == (
        f"attention backend {name!r} takes no mask, which prompts with different numbers of reference tokens needs; "
        "choose another with pipe.transformer.set_attention_backend('native')"
    )


def test_without_masks_equal_numbers_of_references_are_fine(either, reset):
    given = (["a", "b"], [IMAGES, IMAGES[::-1]])
    expected = generate(either, *given, latents=noise(0, batch=2))
    either.transformer.set_attention_backend("_native_flash")
    got = generate(either, *given, latents=noise(0, batch=2))
    torch.testing.assert_close(got, expected, atol=2e-5, rtol=1e-5)


def test_without_masks_cached_references_of_different_numbers_are_refused(isolated):
    cache = isolated.encode_references([[picture(0)], IMAGES], **SIZE)
    mark(isolated.transformer, "sage")
    try:
        with pytest.raises(ra.UserError, match="'sage' takes no mask, which prompts with different numbers"):
            generate(isolated, ["a", "b"], reference_cache=cache, latents=noise(0, batch=2))
    finally:
        isolated.transformer.reset_attention_backend()


def test_without_masks_background_is_left_out_under_another_backend(tmp_path):
    folder = save_tiny_adapter(tmp_path / "a", attention="isolated", lora_scope="reference", drop_background=True)
    pipe = ra.load_adapter(tiny_pipeline(), folder)
    pipe.set_progress_bar_config(disable=True)
    narrow, full = [picture(0, (8, 32))], [picture(0, (48, 32))]
    cache = pipe.encode_references(narrow, **SIZE)
    assert cache.tokens < pipe.encode_references(full, **SIZE).tokens
    mark(pipe.transformer, "flash")
    for act in (lambda: generate(pipe, "a", narrow), lambda: pipe.encode_references(narrow, **SIZE)):
        with calls_of(pipe.transformer) as calls, pytest.raises(ra.UserError, match="leaving out the background of"):
            act()
        assert calls == []
    pipe._check_settings(cache)  # one prompt's own tokens need no mask, however many they are
    pipe._check_settings(pipe._read_references(full, 1, 32, 48))
    pipe.transformer.reset_attention_backend()
    assert torch.equal(generate(pipe, "a", narrow), generate(pipe, "a", reference_cache=cache))
