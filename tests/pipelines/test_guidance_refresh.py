"""Guidance computed in some steps and kept for the others: against the loop written out, with its passes counted."""

import weakref

import pytest
import torch
from diffusers import FlowMatchEulerDiscreteScheduler, FlowMatchHeunDiscreteScheduler, UniPCMultistepScheduler
from tiny_adapter import picture, save_tiny_adapter
from tiny_generation import IMAGES, calls_of, generate, noise
from tiny_models import tiny_pipeline

import refalign_adapter as ra
from refalign_adapter.pipelines.guidance import guidance_passes
from refalign_adapter.pipelines.kept_differences import KeptDifferences

SCALES = {"three passes": (3.0, 2.0), "s_img = 1": (3.0, 1.0), "s_txt = 1": (1.0, 2.0), "equal": (2.5, 2.5)}
FULL = {2: [0, 1, 2, 4, 6], 3: [0, 1, 3, 6], 5: [0, 1, 5], 100: [0, 1]}
"""By k, the steps of seven that compute guidance."""


def latents_of(pipe, images):
    """(1, C, M, h, w) as the pipeline encodes them."""
    canvases = pipe._read_references(images, 1, 32, 48)
    with torch.no_grad():
        return pipe._encode_canvases(canvases)


def written_out(pipe, full, scales, images=IMAGES, steps=7, scheduler=None, inside=None, zeros=False):
    """The loop: in the steps of `full` the differences are computed, in all of `inside` (None: all steps) they act.

    `scales` is a pair, or a list of one for each step.
    """
    references = None if images is None else latents_of(pipe, images)
    absent = torch.zeros_like(references) if zeros and references is not None else None
    text, negative = pipe.encode_prompt("a cat", "ugly", max_sequence_length=16)
    scheduler = scheduler or FlowMatchEulerDiscreteScheduler.from_config(pipe.scheduler.config)
    scheduler.set_timesteps(steps)
    x, image_difference, text_difference, under_prompt = noise(), 0.0, 0.0, 0.0
    for index, t in enumerate(scheduler.timesteps):

        def e(embeds, shown, x=x, t=t):
            with torch.no_grad(), pipe.branch.references(shown):
                return pipe.transformer(x, t.expand(1), embeds, return_dict=False)[0]

        s_txt, s_img = scales[index] if isinstance(scales, list) else scales
        prediction = e(text, references)
        if index in full:
            only = e(negative, references)
            image_difference = only - e(negative, absent) if references is not None else 0.0
            text_difference, under_prompt = prediction - only, prediction - e(text, absent)
        if inside is None or index in inside:
            if s_txt == 1:
                prediction = prediction + (s_img - 1) * under_prompt
            else:
                prediction = prediction + (s_img - 1) * image_difference + (s_txt - 1) * text_difference
        x = scheduler.step(prediction, t, x, return_dict=False)[0]
    return x


def ours(pipe, k, scales=(3.0, 2.0), images=IMAGES, steps=7, **changes):
    """The video's latents, and the number of samples of each call of the transformer on it."""
    given = {"guidance_scale": scales[0], "image_guidance_scale": scales[1], "negative_prompt": "ugly"}
    with calls_of(pipe.transformer) as calls:
        got = generate(pipe, "a cat", images, guidance_refresh=k, num_inference_steps=steps, **given | changes)
    return got, [call[0] for call in calls if call[2] > 1]


def close(got, expected):
    torch.testing.assert_close(got, expected, atol=1e-5, rtol=1e-5)


def counted(full, steps=7, computing=(1, 1, 1)):
    """Samples of the calls when the steps of `full` make calls of `computing` samples, the others a call of one."""
    return [size for index in range(steps) for size in (computing if index in full else (1,))]


@pytest.mark.parametrize("k", FULL)
def test_it_is_the_loop_written_out(either, k):
    got, calls = ours(either, k)
    close(got, written_out(either, FULL[k], (3.0, 2.0)))
    assert calls == counted(FULL[k])
    assert (got - ours(either, 1)[0]).abs().max() > 1e-4


@pytest.mark.parametrize("batch", [False, True])
@pytest.mark.parametrize("name", SCALES)
def test_with_either_scale_off_or_both_equal(either, name, batch):
    got, calls = ours(either, 3, SCALES[name], batch_guidance=batch)
    close(got, written_out(either, FULL[3], SCALES[name]))
    together = {"three passes": (2, 1), "s_img = 1": (2,)}
    computing = together.get(name, (1, 1)) if batch else (1, 1, 1) if name == "three passes" else (1, 1)
    assert calls == counted(FULL[3], computing=computing)


@pytest.mark.parametrize("batch", [False, True])
def test_without_references(either, batch):
    got, calls = ours(either, 3, images=None, batch_guidance=batch)
    close(got, written_out(either, FULL[3], (3.0, 1.0), images=None))
    assert calls == counted(FULL[3], computing=(2,) if batch else (1, 1))


def test_one_is_guidance_in_every_step(either):
    for images in (IMAGES, None):
        for scales in SCALES.values():
            got, _ = ours(either, 1, scales, images)
            assert torch.equal(got, generate(either, "a cat", images, num_inference_steps=7, negative_prompt="ugly",
                                             guidance_scale=scales[0], image_guidance_scale=scales[1]))  # fmt: skip


def test_with_both_scales_off_nothing_is_added(either):
    got, calls = ours(either, 3, (1.0, 1.0))
    assert calls == [1] * 7
    assert torch.equal(got, ours(either, 1, (1.0, 1.0))[0])


@pytest.mark.parametrize("images", [IMAGES, None], ids=["references", "none"])
@pytest.mark.parametrize("batch", [False, True])
def test_refreshes_are_counted_from_where_the_interval_starts(either, images, batch):
    got, calls = ours(either, 3, images=images, steps=10, guidance_interval=(0.3, 0.8), batch_guidance=batch)
    full, scales = [3, 4, 6], (3.0, 2.0 if images else 1.0)
    close(got, written_out(either, full, scales, images, steps=10, inside=range(3, 8)))
    alone = (2,) if batch else (1, 1)
    computing = ((2, 1) if batch else (1, 1, 1)) if images else alone
    assert calls == counted(full, 10, computing)


@pytest.mark.parametrize(("steps", "full"), [(1, [0]), (2, [0, 1]), (3, [0, 1]), (4, [0, 1, 3])])
def test_few_steps(either, steps, full):
    got, calls = ours(either, 3, steps=steps)
    assert calls == counted(full, steps)
    close(got, written_out(either, full, (3.0, 2.0), steps=steps))
    assert torch.equal(got, ours(either, 1, steps=steps)[0]) == (steps < 3)


SCHEDULERS = {
    "UniPC, order 3": lambda: UniPCMultistepScheduler(
        prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=3.0, solver_order=3
    ),
    "Heun, two evaluations a step": FlowMatchHeunDiscreteScheduler,
}


@pytest.mark.parametrize("name", SCHEDULERS)
def test_schedulers_of_higher_order(either, monkeypatch, name):
    monkeypatch.setattr(either, "scheduler", SCHEDULERS[name]())
    steps = 4 if "Heun" in name else 7
    got, calls = ours(either, 3, steps=steps)
    close(got, written_out(either, FULL[3], (3.0, 2.0), steps=steps, scheduler=SCHEDULERS[name]()))
    assert calls == counted(FULL[3])


@pytest.mark.parametrize("attention", [{}, {"attention": "isolated", "lora_scope": "reference"}], ids=["joint", "own"])
def test_where_zeros_stand_for_references(tmp_path, attention):
    pipe = ra.load_adapter(tiny_pipeline(), save_tiny_adapter(tmp_path / "a", **attention, null_reference="zeros"))
    pipe.set_progress_bar_config(disable=True)
    for name in ("three passes", "s_txt = 1"):
        got, _ = ours(pipe, 3, SCALES[name])
        close(got, written_out(pipe, FULL[3], SCALES[name], zeros=True))
        assert (got - written_out(pipe, FULL[3], SCALES[name])).abs().max() > 1e-4  # nothing in their place is another


def setting(values):
    """A callback after whose step i the prompt's scale is the i-th of values."""

    def change(pipe, step, *_):
        pipe._guidance_scale = values[step]
        return {}

    return change


@pytest.mark.parametrize(
    ("first", "scales", "full"),
    [
        (3.0, [3.0, 5.0, 4.0, 4.0, 6.0, 6.0], [0, 1, 3, 6]),
        (3.0, [3.0, 2.0, 2.0, 2.0, 6.0, 6.0], [0, 1, 3, 5, 6]),  # equal from 2: the sum of both; 5 lacks its parts
        (3.0, [3.0, 1.0, 1.0, 1.0, 6.0, 6.0], [0, 1, 2, 3, 5, 6]),  # 2 lacks what references change under the prompt
        (2.0, [2.0, 3.0, 3.0, 3.0, 3.0, 3.0], [0, 1, 2, 3, 6]),  # 2 lacks what they change under the negative prompt
    ],
)
def test_a_scale_that_a_callback_sets_acts_at_once(either, first, scales, full):
    got, calls = ours(either, 3, (first, 2.0), callback_on_step_end=setting([*scales, 1.0]))
    pairs = [(scale, 2.0) for scale in (first, *scales)]
    close(got, written_out(either, full, pairs))
    sizes = [len(guidance_passes(*pair)) if index in full else 1 for index, pair in enumerate(pairs)]
    assert len(calls) == sum(sizes)


def test_guidance_that_a_callback_turns_off_and_on_again(either):
    off_and_on = setting([3.0, 1.0, 3.0, 3.0, 3.0, 3.0, 1.0])
    got, calls = ours(either, 100, (3.0, 2.0), None, callback_on_step_end=off_and_on)
    assert calls == counted([0, 1], computing=(1, 1))
    scales = [(scale, 1.0) for scale in (3.0, 3.0, 1.0, 3.0, 3.0, 3.0, 3.0)]
    close(got, written_out(either, [0, 1], scales, images=None))


@pytest.mark.parametrize("batch", [False, True])
@pytest.mark.parametrize("name", ["prompt_embeds", "negative_prompt_embeds"])
def test_other_embeddings_have_the_next_step_compute_anew(either, name, batch):
    seen = []

    def change(pipe, step, timestep, tensors):
        seen.append(len(calls))
        return {name: 0.5 * tensors[name]} if step == 3 else {}

    names = {"callback_on_step_end_tensor_inputs": ["latents", "prompt_embeds", "negative_prompt_embeds"]}
    with calls_of(either.transformer) as calls:
        given = {"num_inference_steps": 7, "guidance_refresh": 100, "batch_guidance": batch, "negative_prompt": "b"}
        got = generate(either, "a cat", IMAGES, callback_on_step_end=change, **names, **given)
    sizes = [after - before for before, after in zip(seen, seen[1:], strict=False)]
    unknown = 2 if batch and name == "prompt_embeds" else 3  # passes share calls where the negative text is known
    assert sizes == [2 if batch else 3, 1, 1, unknown, 1, 1]
    exact = generate(either, "a cat", IMAGES, num_inference_steps=7, negative_prompt="b")
    assert got.isfinite().all()
    assert not torch.equal(got, exact)


def test_nothing_is_left_over_for_the_next_video(either, monkeypatch):
    made, between = [], KeptDifferences.between

    def watched(*given):
        kept = between(*given)
        made.extend(weakref.ref(tensor) for tensor in kept.differences)
        assert sum(reference() is not None for reference in made) <= 4  # a step's new ones beside those they replace
        assert all(tensor.shape == noise().shape for tensor in kept.differences)
        return kept

    monkeypatch.setattr(KeptDifferences, "between", watched)
    first, calls = ours(either, 3)
    assert len(made) == 2 * len(FULL[3])
    assert all(reference() is None for reference in made)
    generate(either, "a dog", None, guidance_refresh=5, num_inference_steps=3)
    again, same = ours(either, 3)
    assert torch.equal(again, first)
    assert same == calls


def test_an_interrupted_or_failed_video_leaves_nothing_over(either):
    expected, calls = ours(either, 3)

    def interrupt(pipe, step, *_):
        pipe._interrupt = step == 2
        return {}

    assert ours(either, 3, callback_on_step_end=interrupt)[1] == counted([0, 1], 3)
    with pytest.raises(ZeroDivisionError):
        ours(either, 3, callback_on_step_end=lambda *_: 1 / 0)
    again, same = ours(either, 3)
    assert torch.equal(again, expected)
    assert same == calls


def test_a_video_inside_of_a_callback_of_another(either):
    expected, inner = ours(either, 3)[0], []

    def change(pipe, step, *_):
        if step in (1, 3):
            inner.append(ours(pipe, 2, (5.0, 4.0), IMAGES[:1])[0])
        return {}

    assert torch.equal(ours(either, 3, callback_on_step_end=change)[0], expected)
    assert torch.equal(inner[0], inner[1])
    assert torch.equal(inner[0], ours(either, 2, (5.0, 4.0), IMAGES[:1])[0])


@pytest.mark.parametrize("batch", [False, True])
def test_prompts_and_videos_of_a_batch_get_what_they_get_alone(either, batch):
    prompts, images = ["a", "b"], [[picture(0)], [picture(1), picture(2)]]
    scales = {"guidance_scale": 3.0, "image_guidance_scale": 2.0, "num_inference_steps": 5, "guidance_refresh": 3}
    latents = noise(5, batch=4)
    given = {"negative_prompt": ["c", "d"], "num_videos_per_prompt": 2, "batch_guidance": batch} | scales
    together = generate(either, prompts, images, latents=latents, **given)
    for row in range(4):
        alone = {"negative_prompt": "cd"[row // 2], "latents": latents[row : row + 1]} | scales
        expected = generate(either, prompts[row // 2], images[row // 2], **alone)
        torch.testing.assert_close(together[row : row + 1], expected, atol=1e-5, rtol=1e-4)


def test_cached_references(fresh_isolated):
    cache = fresh_isolated.encode_references(IMAGES, height=32, width=48, num_frames=5)
    assert torch.equal(ours(fresh_isolated, 3, images=None, reference_cache=cache)[0], ours(fresh_isolated, 3)[0])


def test_without_references_a_video_in_bfloat16_stays_one(isolated_adapters):
    base = tiny_pipeline()
    base.transformer.to(torch.bfloat16)
    pipe = ra.load_adapter(base, isolated_adapters["reference"])
    pipe.set_progress_bar_config(disable=True)
    for images in (None, IMAGES):
        exact, kept = (ours(pipe, k, images=images)[0] for k in (1, 3))
        assert kept.dtype == exact.dtype
        torch.testing.assert_close(kept, exact, atol=0.3, rtol=0.1)
        assert not torch.equal(kept, exact)


@pytest.mark.parametrize("value", [0, -1, 1.5, 2.0, True, "2", None])
def test_what_is_no_number_of_steps_is_refused_before_any_model_runs(either, value):
    with calls_of(either.transformer) as calls, pytest.raises(ra.UserError) as caught:
        generate(either, "a cat", IMAGES, guidance_refresh=value)
    assert calls == []
    assert str(caught.value) == (
        f"guidance_refresh must be a whole number of at least 1, which refreshes in every step, got {value!r}"
    )


def random(*shape, seed=0, dtype=torch.float64):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


def test_kept_differences_are_weighed_by_the_scales_of_the_step():
    a, b, c, d = (random(2, 3, seed=seed) for seed in range(4))
    kept = KeptDifferences.between([a, b, c], guidance_passes(3.0, 2.0))
    for text, image in ((3.0, 2.0), (7.5, 5.0), (4.0, 4.0), (4.0, 1.0), (2.0, 0.0)):
        passes = guidance_passes(text, image)
        assert kept.serve(passes)
        expected = d + (image - 1) * (b - a) + (text - 1) * (c - b)
        torch.testing.assert_close(kept.add_to(d, passes), expected, atol=1e-12, rtol=0)
    assert not kept.serve(guidance_passes(1.0, 2.0))
    assert not KeptDifferences.between([a, c], guidance_passes(2.0, 2.0)).serve(guidance_passes(3.0, 2.0))


def test_kept_differences_are_in_float32_at_least():
    values = [random(50, seed=seed, dtype=torch.bfloat16) for seed in range(3)]
    passes = guidance_passes(7.5, 5.0)
    kept = KeptDifferences.between(values, passes)
    assert [part.dtype for part in kept.differences] == [torch.float32] * 2
    wide = [value.double() for value in values]
    expected = wide[2] + 4.0 * (wide[1] - wide[0]) + 6.5 * (wide[2] - wide[1])
    torch.testing.assert_close(kept.add_to(values[2], passes).double(), expected, atol=1e-5, rtol=0)
    plain = guidance_passes(5.0, 1.0, references=False)
    assert KeptDifferences.between(values[:2], plain).add_to(values[1], plain).dtype == torch.bfloat16
