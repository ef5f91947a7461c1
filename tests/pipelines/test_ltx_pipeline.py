"""LTX-Video's pipeline, whose loop asks for both predictions of a step in one call, with and without references."""

import inspect

import pytest
import torch
from diffusers import FirstBlockCacheConfig
from family_case import Case, draw
from tiny_adapter import picture
from tiny_ltx import tiny_ltx_pipeline

import refalign_adapter as ra
from refalign_adapter.families.ltx import FAMILY

CASE = Case(FAMILY, tiny_ltx_pipeline)
SIZE = {"num_frames": 9, "height": 64, "width": 96}
LATENTS = (1, 16, 2, 2, 3)
IMAGES = [picture(0), picture(1, (10, 60))]
MODES = {"isolated": "reference", "joint": "all"}
modes = pytest.mark.parametrize("attention", list(MODES))


def packed(latents):
    return latents.flatten(2).transpose(1, 2)


NOISE = draw(*LATENTS, seed=4)
GIVEN = {
    "negative_prompt": "ugly",
    "latents": packed(NOISE),
    "num_inference_steps": 2,
    "output_type": "latent",
    "max_sequence_length": 16,
    **SIZE,
}


def stock(**options):
    pipe = tiny_ltx_pipeline(**options)
    pipe.set_progress_bar_config(disable=True)
    return pipe


@pytest.fixture(scope="module")
def adapters(tmp_path_factory):
    folder = tmp_path_factory.mktemp("adapters")
    for attention, scope in MODES.items():
        CASE.attached(attention, scope)[1].save_pretrained(folder / attention)
    return folder


@pytest.fixture
def load(adapters):
    return lambda attention, base=None: ra.load_adapter(base or stock(), adapters / attention)


def arguments_of_calls(pipe, *given, **changes):
    """The video, and the arguments of each of the transformer's calls on it; references' own are left out."""
    signature, seen = inspect.signature(type(pipe.transformer).forward), []
    handle = pipe.transformer.register_forward_pre_hook(
        lambda model, args, kwargs: seen.append(signature.bind(model, *args, **kwargs).arguments), with_kwargs=True
    )
    frames = pipe(*given, **GIVEN | changes).frames
    handle.remove()
    return frames, [call for call in seen if call.get("video_coords") is None]


def test_training_calls_the_transformer_as_the_stock_loop_does():
    pipe, latents = stock(), []
    keep = lambda pipe, step, time, values: latents.append(values["latents"]) or {}  # noqa: E731
    text, negative = (FAMILY.encode_text(pipe, [prompt], 16) for prompt in ("a cat", "ugly"))
    _, calls = arguments_of_calls(pipe, "a cat", callback_on_step_end=keep, num_inference_steps=3)
    sigmas = pipe.scheduler.sigmas
    assert sigmas[-2] == pytest.approx(0.1)  # shift_terminal
    for index, (call, x) in enumerate(zip(calls, [GIVEN["latents"], *latents], strict=False)):
        video = x.transpose(1, 2).unflatten(2, LATENTS[2:])
        for half, given in enumerate((negative, text)):
            wanted = FAMILY.forward_arguments(pipe.transformer, video, sigmas[index : index + 1], given)
            assert set(call) - set(wanted) == {"self", "attention_kwargs"}
            for name in ("num_frames", "height", "width", "rope_interpolation_scale", "return_dict"):
                assert call[name] == wanted[name], name
            for name in ("hidden_states", "timestep", "encoder_attention_mask"):
                assert torch.equal(call[name][half : half + 1], wanted[name]), name
            seen = given["encoder_attention_mask"]
            embeds = (call["encoder_hidden_states"][half : half + 1], wanted["encoder_hidden_states"])
            assert torch.equal(*(part[seen] for part in embeds))
    assert len(calls) == 3


def test_the_vae_compresses_as_positions_count():
    vae = stock().vae
    ratios = vae.temporal_compression_ratio, vae.spatial_compression_ratio, vae.spatial_compression_ratio
    assert FAMILY.size_multiples(None, (1, 1, 1)) == ratios


@pytest.mark.parametrize(
    ("prompts", "changes"),
    [
        (["a cat"], {}),
        (["a cat", "dogs"], {"negative_prompt": ["ugly", "blurred"], "latents": packed(draw(2, *LATENTS[1:]))}),
        (["a cat"], {"guidance_rescale": 0.7, "guidance_scale": 4.0, "frame_rate": 12, "output_type": "np"}),
        (["a cat"], {"guidance_scale": 1.0}),
        (["a cat"], {"latents": None, "num_videos_per_prompt": 2}),
    ],
)
def test_without_references_a_video_is_the_stock_pipelines_bit_for_bit(load, prompts, changes):
    given = GIVEN | {"guidance_scale": 7.5} | changes
    expected, got = (
        pipe(prompts, generator=torch.Generator().manual_seed(3), **given).frames
        for pipe in (stock(), load("isolated"))
    )
    assert torch.equal(torch.as_tensor(got), torch.as_tensor(expected))


def test_so_are_those_of_a_decoder_that_is_told_the_timestep(load):
    given = GIVEN | {"output_type": "np", "decode_timestep": 0.05, "decode_noise_scale": 0.025}
    expected, got = (
        pipe("a cat", generator=torch.Generator().manual_seed(3), **given, guidance_scale=3.0).frames
        for pipe in (stock(timestep_conditioning=True), load("isolated", stock(timestep_conditioning=True)))
    )
    assert (got == expected).all()
    with_references = load("isolated", stock(timestep_conditioning=True))(
        "a cat", IMAGES, generator=torch.Generator().manual_seed(3), **given, guidance_scale=3.0
    ).frames
    assert with_references.shape == expected.shape
    assert abs(with_references - expected).max() > 1e-4


def naive(pipe, images, scales, rescale=0.0, interval=(0.0, 1.0), steps=2, adding=()):
    """The formula by single calls; in steps `adding`, by what the conditions changed in the last one that was not."""
    references = torch.cat([_encoded(pipe, image) for image in images], 2)
    text, negative = (FAMILY.encode_text(pipe, [prompt], 16) for prompt in ("a cat", "ugly"))
    pipe.scheduler.set_timesteps(sigmas=[1 - index / steps for index in range(steps)], mu=_mu(12))
    sigmas, x = pipe.scheduler.sigmas, NOISE
    s_txt, s_img = scales

    def velocity(text, references, sigma):
        arguments = FAMILY.forward_arguments(pipe.transformer, x, sigma[None], text)
        with torch.no_grad(), pipe.branch.references(references):
            return CASE.velocity(pipe.transformer, arguments)

    for index, (sigma, after) in enumerate(zip(sigmas[:-1], sigmas[1:], strict=True)):
        neither, only, both = (
            velocity(*seen, sigma) for seen in ((negative, None), (negative, references), (text, references))
        )
        if index not in adding:
            by_image, by_text = only - neither, both - only
        guided = both
        if interval[0] <= index / steps < interval[1]:
            guided = both + (s_img - 1) * by_image + (s_txt - 1) * by_text
            guided = guided * (rescale * both.std() / guided.std() + 1 - rescale)
        x = x + (after - sigma) * guided
    return packed(x)


def _mu(tokens):
    return 0.95 + 1.1 * (tokens - 1024) / 3072


def _encoded(pipe, image):
    from refalign_adapter.media.canvas import prepare_reference

    canvas = torch.frombuffer(bytearray(prepare_reference(image, height=64, width=96).tobytes()), dtype=torch.uint8)
    pixels = canvas.view(64, 96, 3).permute(2, 0, 1)[None] / 127.5 - 1
    return FAMILY.encode_images(pipe, pixels).unsqueeze(2)


@modes
@pytest.mark.parametrize("batch", [False, True])
@pytest.mark.parametrize(
    ("scales", "options", "calls"),
    [
        ((6.0, 4.0), {}, (6, 4)),
        ((6.0, 4.0), {"guidance_rescale": 0.7}, (6, 4)),
        ((4.0, 4.0), {"guidance_rescale": 0.3}, (4, 4)),
        ((6.0, 1.0), {}, (4, 2)),
        ((6.0, 4.0), {"guidance_rescale": 0.7, "guidance_interval": (0.5, 1.0)}, (4, 3)),
    ],
)
def test_guidance_is_the_formula_in_as_many_calls(load, attention, batch, scales, options, calls):
    pipe = load(attention)
    given = {"guidance_scale": scales[0], "image_guidance_scale": scales[1], "batch_guidance": batch, **options}
    got, seen = arguments_of_calls(pipe, "a cat", IMAGES, **given)
    assert len(seen) == calls[batch]
    expected = naive(
        pipe, IMAGES, scales, options.get("guidance_rescale", 0.0), options.get("guidance_interval", (0.0, 1.0))
    )
    torch.testing.assert_close(got, expected, atol=5e-5, rtol=1e-4)


@modes
def test_without_guidance_by_text_references_guide_under_the_prompt(load, attention):
    pipe = load(attention)
    got, seen = arguments_of_calls(pipe, "a cat", IMAGES, guidance_scale=1.0, image_guidance_scale=1.0)
    assert len(seen) == 2
    torch.testing.assert_close(got, naive(pipe, IMAGES, (1.0, 1.0)), atol=5e-5, rtol=1e-4)
    assert len(arguments_of_calls(pipe, "a cat", IMAGES, guidance_scale=1.0, image_guidance_scale=3.0)[1]) == 4


@modes
def test_outside_of_the_interval_one_call_of_one_prompt_serves_both(load, attention):
    pipe = load(attention)
    for images in (IMAGES, None):
        _, seen = arguments_of_calls(pipe, "a cat", images, guidance_interval=(0.6, 1.0))
        assert [len(call["hidden_states"]) for call in seen] == [1, 1]
    expected = pipe("a cat", IMAGES, **GIVEN, guidance_scale=1.0, image_guidance_scale=1.0).frames
    got = pipe("a cat", IMAGES, **GIVEN, guidance_interval=(0.6, 1.0)).frames
    torch.testing.assert_close(got, expected, atol=1e-5, rtol=1e-5)


@modes
@pytest.mark.parametrize("scale", [1.0, 3.0])
def test_guidance_follows_what_a_callback_sets(load, attention, scale):
    pipe, latents = load(attention), []

    def change(pipe, *_):
        pipe._guidance_scale = scale
        return {}

    keep = lambda pipe, step, time, values: latents.append(values["latents"]) or {}  # noqa: E731
    given = GIVEN | {"num_inference_steps": 3, "image_guidance_scale": 4.0}
    got = pipe("a cat", IMAGES, **given, guidance_scale=6.0, callback_on_step_end=change).frames
    pipe("a cat", IMAGES, **given, guidance_scale=6.0, callback_on_step_end=keep)
    swap = lambda pipe, step, time, values: {"latents": latents[0]} if step == 0 else {}  # noqa: E731
    expected = pipe("a cat", IMAGES, **given, guidance_scale=scale, callback_on_step_end=swap).frames
    torch.testing.assert_close(got, expected, atol=2e-5, rtol=1e-5)


@modes
def test_a_generation_inside_a_callback_leaves_the_outer_one_as_it_is(load, attention):
    pipe = load(attention)
    given = GIVEN | {"guidance_scale": 4.0, "guidance_rescale": 0.5}
    expected = pipe("a cat", IMAGES, **given).frames

    def generate(pipe, *_):
        pipe("dogs", IMAGES[:1], **GIVEN | {"guidance_scale": 1.0})
        return {}

    got = pipe("a cat", IMAGES, **given, callback_on_step_end=generate).frames
    assert torch.equal(got, expected)


def test_several_prompts_and_videos_have_their_own_references(load):
    pipe = load("isolated")
    noise = packed(draw(4, *LATENTS[1:], seed=9))
    given = GIVEN | {"negative_prompt": ["ugly", "ugly"], "latents": noise, "num_videos_per_prompt": 2}
    got = pipe(["a cat", "a dog"], [IMAGES, IMAGES[:1]], **given).frames
    for index, (prompt, images) in enumerate([("a cat", IMAGES), ("a dog", IMAGES[:1])]):
        alone = pipe(prompt, images, **GIVEN | {"latents": noise[2 * index : 2 * index + 1]}).frames
        torch.testing.assert_close(got[2 * index : 2 * index + 1], alone, atol=2e-5, rtol=1e-4)


def test_cached_references_give_the_same_video(load):
    pipe = load("isolated")
    cache = pipe.encode_references(IMAGES, **{**SIZE})
    assert cache.tokens == 2 * 2 * 3
    assert torch.equal(pipe("a cat", reference_cache=cache, **GIVEN).frames, pipe("a cat", IMAGES, **GIVEN).frames)


def test_isolated_references_are_placed_for_the_default_rate_alone(load):
    with pytest.raises(ra.UserError, match="^frame_rate: references with .*'isolated' are placed for 25 .*, got 24; "):
        load("isolated")("a cat", IMAGES, **GIVEN, frame_rate=24)
    pipe = load("joint")
    got, calls = arguments_of_calls(pipe, "a cat", IMAGES, frame_rate=10)
    assert calls[0]["rope_interpolation_scale"] == (0.8, 32, 32)
    assert not torch.equal(got, pipe("a cat", IMAGES, **GIVEN).frames)


def test_a_step_cache_that_never_skips_changes_nothing(load):
    pipe = load("isolated")
    expected = pipe("a cat", IMAGES, **GIVEN).frames
    pipe.transformer.enable_cache(FirstBlockCacheConfig(threshold=0.0))
    torch.testing.assert_close(pipe("a cat", IMAGES, **GIVEN).frames, expected, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"num_frames": 10}, "num_frames must be a multiple of 8 plus 1"),
        ({"height": 48}, "height must be a multiple of 32"),
        ({"latents": NOISE}, r"latents must have shape \(1, 12, 16\)"),
        ({"prompt_embeds": torch.zeros(1, 16, 32), "prompt": None}, "Must provide `prompt_attention_mask`"),
    ],
)
def test_what_does_not_fit_is_told_before_any_model_runs(load, changes, message):
    pipe = load("isolated")
    with pytest.raises(ra.UserError, match=message):
        pipe(**{"prompt": "a cat", "reference_images": IMAGES} | GIVEN | changes)


@modes
@pytest.mark.parametrize("rescale", [0.0, 0.5])
def test_kept_differences_serve_steps_of_one_call(load, attention, rescale):
    pipe = load(attention)
    given = {"num_inference_steps": 5, "guidance_scale": 6.0, "image_guidance_scale": 4.0, "guidance_rescale": rescale}
    got, seen = arguments_of_calls(pipe, "a cat", IMAGES, guidance_refresh=3, **given)
    assert [len(call["hidden_states"]) for call in seen] == [1] * (3 + 3 + 1 + 3 + 1)
    expected = naive(pipe, IMAGES, (6.0, 4.0), rescale, steps=5, adding=(2, 4))
    torch.testing.assert_close(got, expected, atol=2e-4, rtol=1e-3)


def test_kept_differences_of_the_prompt_alone(load):
    pipe = load("isolated")
    given = {"num_inference_steps": 5, "guidance_scale": 6.0}
    _, seen = arguments_of_calls(pipe, "a cat", guidance_refresh=3, **given)
    assert [len(call["hidden_states"]) for call in seen] == [1] * (2 + 2 + 1 + 2 + 1)
