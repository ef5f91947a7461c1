"""The passes of a step and their combination, against the paper's formula written out."""

import pytest
import torch

import refalign_adapter as ra
from refalign_adapter.pipelines.guidance import check_scales, combine, guidance_passes, plan_guidance

SCALES = [(7.5, 5.0), (7.5, 1.0), (1.0, 5.0), (1.0, 1.0), (5.0, 5.0), (2.0, 0.0), (1.0, 0.0), (3.0, 0.25)]


def predictions(seed=0):
    generator = torch.Generator().manual_seed(seed)
    return {
        (text, references): torch.randn(2, 3, 4, generator=generator, dtype=torch.float64)
        for text in (0, 1)
        for references in (0, 1)
    }


def guided(scales, references=True):
    passes = guidance_passes(*scales, references=references)
    known = predictions()
    return combine([known[int(item.text), int(item.references)] for item in passes], passes), known


@pytest.mark.parametrize("scales", [scales for scales in SCALES if scales[0] != 1])
def test_it_is_the_papers_formula(scales):
    text, image = scales
    got, e = guided(scales)
    expected = e[0, 0] + image * (e[0, 1] - e[0, 0]) + text * (e[1, 1] - e[0, 1])
    torch.testing.assert_close(got, expected, atol=1e-12, rtol=0)


@pytest.mark.parametrize("image", [0.0, 1.0, 5.0])
def test_with_text_guidance_off_references_guide_under_the_prompt(image):
    got, e = guided((1.0, image))
    torch.testing.assert_close(got, e[1, 0] + image * (e[1, 1] - e[1, 0]), atol=1e-12, rtol=0)


@pytest.mark.parametrize("text", [1.0, 7.5])
def test_without_references_it_is_classifier_free_guidance(text):
    got, e = guided((text, 5.0), references=False)
    torch.testing.assert_close(got, e[0, 0] + text * (e[1, 0] - e[0, 0]), atol=1e-12, rtol=0)


@pytest.mark.parametrize(
    ("scales", "references", "count"),
    [
        ((7.5, 5.0), True, 3),
        ((7.5, 1.0), True, 2),
        ((1.0, 5.0), True, 2),
        ((5.0, 5.0), True, 2),
        ((1.0, 1.0), True, 1),
        ((1.0, 0.0), True, 1),
        ((7.5, 5.0), False, 2),
        ((1.0, 5.0), False, 1),
    ],
)
def test_the_number_of_passes(scales, references, count):
    assert len(guidance_passes(*scales, references=references)) == count


@pytest.mark.parametrize("references", [True, False])
@pytest.mark.parametrize("scales", SCALES)
def test_weights_add_up_to_one_and_names_differ(scales, references):
    passes = guidance_passes(*scales, references=references)
    assert sum(item.weight for item in passes) == pytest.approx(1)
    assert len({item.name for item in passes}) == len(passes)


def test_equal_predictions_give_exactly_themselves():
    prediction = torch.randn(50, generator=torch.Generator().manual_seed(0))
    passes = guidance_passes(7.3, 4.7)
    assert torch.equal(combine([prediction] * 3, passes), prediction)


def test_half_precision_is_combined_in_float32():
    known = [prediction.bfloat16() for prediction in predictions().values()][:3]
    passes = guidance_passes(7.5, 5.0)
    expected = sum(item.weight * prediction.double() for item, prediction in zip(passes, known, strict=True))
    got = combine(known, passes)
    assert got.dtype == torch.float32
    torch.testing.assert_close(got.double(), expected, atol=1e-5, rtol=0)


@pytest.mark.parametrize("scales", [(0.0, 5.0), (float("nan"), 5.0), (7.5, -1.0), (7.5, float("inf"))])
def test_scales_that_mean_nothing_are_refused(scales):
    with pytest.raises(ra.UserError, match="guidance_scale must be at least"):
        check_scales(*scales)


@pytest.mark.parametrize("interval", [(0.5, 0.5), (0.6, 0.4), (-0.1, 1.0), (0.0, 1.1), (float("nan"), 1.0), (0.0,)])
def test_intervals_that_mean_nothing_are_refused(interval):
    with pytest.raises(ra.UserError, match="guidance_interval must be two shares of the steps, start below stop"):
        check_scales(7.5, 5.0, interval)


def test_all_problems_are_told_at_once():
    with pytest.raises(ra.ConfigError) as caught:
        check_scales(0.5, "strong", (1.0, 0.0), 0)
    assert [problem.split(" must")[0] for problem in caught.value.problems] == [
        "guidance_scale",
        "image_guidance_scale",
        "guidance_interval",
        "guidance_refresh",
    ]


def calls(plan, index=0, steps=1):
    """Per call of the transformer, the names of its passes."""
    return [[item.name for item in call] for call in plan.calls(index, steps)]


@pytest.mark.parametrize(
    ("scales", "references", "batched"),
    [
        ((7.5, 5.0), True, [["negative_alone"], ["negative_references", "text_references"]]),
        ((7.5, 1.0), True, [["negative_references", "text_references"]]),
        ((1.0, 5.0), True, [["text_alone"], ["text_references"]]),
        ((5.0, 5.0), True, [["negative_alone"], ["text_references"]]),
        ((1.0, 1.0), True, [["text_references"]]),
        ((7.5, 5.0), False, [["negative_alone", "text_alone"]]),
    ],
)
def test_only_passes_alike_in_references_share_a_call(scales, references, batched):
    plan = plan_guidance(*scales, references=references, batch=True)
    assert calls(plan) == batched
    passes = guidance_passes(*scales, references=references)
    assert [item for call in plan.guided for item in call] == list(passes)
    apart = plan_guidance(*scales, references=references)
    assert apart.guided == tuple((item,) for item in passes)


@pytest.mark.parametrize(
    ("interval", "steps", "inside"),
    [
        ((0.0, 1.0), 4, [0, 1, 2, 3]),
        ((0.25, 0.75), 4, [1, 2]),
        ((0.3, 0.7), 10, [3, 4, 5, 6]),
        ((0.1, 0.3), 50, list(range(5, 15))),
        ((0.0, 0.01), 4, [0]),
        ((0.9, 1.0), 4, []),
    ],
)
@pytest.mark.parametrize("references", [True, False])
def test_outside_the_interval_the_fully_conditioned_pass_runs_alone(interval, steps, inside, references):
    plan = plan_guidance(7.5, 5.0, references=references, interval=interval)
    alone = ["text_references" if references else "text_alone"]
    got = [index for index in range(steps) if calls(plan, index, steps) != [alone]]
    assert got == inside
    assert all(call[0].weight == 1 for call in plan.unguided)


@pytest.mark.parametrize(
    ("refresh", "interval", "adding"),
    [
        (1, (0.0, 1.0), []),
        (2, (0.0, 1.0), [3, 5, 7, 9]),
        (3, (0.0, 1.0), [2, 4, 5, 7, 8]),
        (4, (0.0, 1.0), [2, 3, 5, 6, 7, 9]),
        (100, (0.0, 1.0), [2, 3, 4, 5, 6, 7, 8, 9]),
        (3, (0.3, 0.8), [5, 7]),
        (3, (0.9, 1.0), []),
    ],
)
def test_guidance_is_computed_in_the_first_two_steps_of_the_interval_and_every_kth(refresh, interval, adding):
    plan = plan_guidance(7.5, 5.0, references=True, interval=interval, refresh=refresh)
    assert [index for index in range(10) if plan.adds_kept(index, 10)] == adding


def test_without_references_it_is_diffusers_own_arithmetic():
    negative, text = (prediction.bfloat16() for prediction in list(predictions().values())[:2])
    got = combine([negative, text], guidance_passes(5.3, 1.0, references=False))
    assert got.dtype == torch.bfloat16
    assert torch.equal(got, negative + 5.3 * (text - negative))
