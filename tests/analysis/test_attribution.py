"""Attribution in closed form, and by a model against the definition written out, row by row."""

import json
import math

import numpy as np
import pytest
import torch
from tiny_models import tiny_transformer

from refalign_adapter import ConfigError, RefAlignConfig, UserError, attach
from refalign_adapter.analysis.attribution import attribution, reference_attribution
from refalign_adapter.batch import EMBEDDING, CachedSample

GRID = (2, 4, 4)


def rises_of(own: float, others: float, clips: int = 40, count: int = 2, noise: float = 0.01):
    """Losses (N, M) and replaced (N, M, M) whose mean rises are `own` on the diagonal and `others` off it."""
    generator = np.random.default_rng(0)
    losses = generator.random((clips, count))
    rises = np.where(np.eye(count, dtype=bool), own, others) + generator.normal(0, noise, (clips, count, count))
    return losses, losses[:, :, None] + rises, rises


def test_attribution_in_closed_form():
    losses, replaced, rises = rises_of(0.1, 0.02)
    result = attribution(losses, replaced)
    np.testing.assert_allclose([[cell.value for cell in row] for row in result.matrix], rises.mean(0))
    own, others = rises[:, [0, 1], [0, 1]].mean(), rises[:, [0, 1], [1, 0]].mean()
    assert (result.use.value, result.confusion.value) == pytest.approx((own, others / own))
    assert result.use.low < own < result.use.high
    # Of a ratio: the delta method on means of clips.
    a, b = rises[:, [0, 1], [1, 0]].mean(1), rises[:, [0, 1], [0, 1]].mean(1)
    reach = 2.02 * np.std(a - others / own * b, ddof=1) / own / math.sqrt(40)
    assert (result.confusion.low, result.confusion.high) == pytest.approx(
        (others / own - reach, others / own + reach), abs=0.15 * reach
    )
    np.testing.assert_allclose(result.rises, rises)
    assert "rises" not in json.loads(json.dumps(result.to_dict(), allow_nan=False))


def test_adapters_that_confuse_fully_and_not_at_all():
    whole, none = (attribution(*rises_of(0.1, others)[:2]).confusion for others in (0.1, 0.0))
    assert whole.low < 1 < whole.high
    assert none.low < 0 < none.high


def test_what_is_not_used_is_not_confused():
    unused = attribution(*rises_of(0.0, 0.0)[:2])
    assert unused.use.low < 0 < unused.use.high
    assert unused.confusion.void
    assert attribution(*rises_of(0.1, 0.0, count=1)[:2]).confusion.void
    assert attribution(*rises_of(0.1, 0.02, clips=1)[:2]).confusion.void
    assert attribution(np.zeros((0, 2)), np.zeros((0, 2, 2))).use.void
    with pytest.raises(UserError, match="losses must be finite"):
        attribution(np.full((2, 2), np.nan), np.zeros((2, 2, 2)))


def make_rows(counts: list[int], shape: tuple[int, ...] = GRID, seed: int = 0):
    """Samples, masks and replacements."""
    generator = torch.Generator().manual_seed(seed)
    draw = lambda *size: torch.randn(*size, generator=generator)  # noqa: E731
    samples = [
        CachedSample(
            str(row), draw(16, *shape), {EMBEDDING: draw(5, 32)}, draw(2, count, 16, 4, 4), {}, torch.arange(count)
        )
        for row, count in enumerate(counts)
    ]
    masks = [draw(count, *shape) > 0 for count in counts]
    return samples, masks, [draw(count, 16, 4, 4) for count in counts]


@pytest.fixture(scope="module")
def branch():
    branch = attach(
        tiny_transformer(num_layers=2), RefAlignConfig(attention="joint", r=4, lora_alpha=4, align_layers=1), seed=0
    )
    for name, parameter in branch.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.1, generator=torch.Generator().manual_seed(1))
    return branch


def naive_losses(branch, sample, references, masks, row: int, sigmas, seed: int) -> list[float]:
    """Loss inside each mask."""
    generator = torch.Generator().manual_seed(seed * 1_000_003 + row)
    losses = [0.0] * len(masks)
    for sigma in sigmas:
        noise = torch.randn(sample.latents.shape, generator=generator)
        noisy = (1 - sigma) * sample.latents + sigma * noise
        with torch.no_grad(), branch.references(references.transpose(0, 1)[None]):
            prediction = branch.transformer(
                noisy[None], torch.tensor([1000.0 * sigma]), sample.text[EMBEDDING][None], return_dict=False
            )[0][0]
        errors = (prediction - (noise - sample.latents)).square()
        losses = [loss + errors[:, mask].mean().item() / len(sigmas) for loss, mask in zip(losses, masks, strict=True)]
    return losses


def test_equals_the_definition_row_by_row(branch):
    samples, masks, replacements = make_rows([2, 1, 2, 2, 1])
    results = reference_attribution(branch, samples, masks, replacements, sigmas=(0.3, 0.8), seed=3, batch_size=2)
    assert list(results) == [1, 2]
    for count, result in results.items():
        rows = [row for row, sample in enumerate(samples) if len(sample.subjects) == count]
        assert len(result.rises) == len(rows)
        for row, rises in zip(rows, result.rises, strict=True):
            own = samples[row].references[0]
            true = naive_losses(branch, samples[row], own, masks[row], row, (0.3, 0.8), 3)
            for place in range(count):
                changed = own.clone()
                changed[place] = replacements[row][place]
                other = naive_losses(branch, samples[row], changed, masks[row], row, (0.3, 0.8), 3)
                np.testing.assert_allclose(rises[:, place], np.subtract(other, true), atol=1e-5)
            assert np.abs(rises).min() > 1e-5


def test_a_reference_replaced_by_itself_changes_nothing(branch):
    samples, masks, replacements = make_rows([2, 2, 2])
    same = [sample.references[0] for sample in samples]
    assert not reference_attribution(branch, samples, masks, same)[2].rises.any()
    replacements[1][0] = same[1][0]
    rises = reference_attribution(branch, samples, masks, replacements)[2].rises
    assert not rises[1, :, 0].any()
    assert rises[1, :, 1].all()


@pytest.mark.parametrize("attention", ["joint", "isolated"])
def test_a_model_that_reads_no_references_is_at_zero(attention):
    transformer = tiny_transformer(num_layers=2)
    for block in transformer.blocks:
        torch.nn.init.zeros_(block.attn1.to_out[0].weight)
    untrained = attach(transformer, RefAlignConfig(attention=attention, r=4, lora_alpha=4, align_layers=1), seed=0)
    result = reference_attribution(untrained, *make_rows([2, 2, 2]))[2]
    assert not result.rises.any()
    assert (result.use.value, result.use.low, result.use.high) == (0, 0, 0)
    assert result.confusion.void


def test_rows_that_say_nothing_are_left_out(branch):
    samples, masks, replacements = make_rows([2, 0, 2, 2, 2])
    masks[2][1] = False  # not seen
    samples[3].subjects = torch.tensor([4, 4])  # two views of one subject
    result = reference_attribution(branch, samples, masks, replacements)
    kept = [samples[0], samples[4]], [masks[0], masks[4]], [replacements[0], replacements[4]]
    assert len(result[2].rises) == 2
    np.testing.assert_allclose(reference_attribution(branch, *kept)[2].rises[0], result[2].rises[0], atol=1e-5)
    with pytest.raises(UserError, match="no row has references"):
        reference_attribution(branch, samples[1:4], masks[1:4], replacements[1:4])


def test_neither_batches_nor_shapes_matter(branch):
    rows, others = make_rows([1, 1, 1]), make_rows([1, 1], (1, 4, 4), seed=1)
    together = [[*one, *other] for one, other in zip(rows, others, strict=True)]
    branch.transformer.train()
    whole = reference_attribution(branch, *together)[1]
    assert branch.transformer.training
    alone = reference_attribution(branch, *together, batch_size=1)[1]
    np.testing.assert_allclose(whole.rises, alone.rises, atol=1e-5)
    assert len(whole.rises) == 5


def test_tokens_of_the_reference_that_is_replaced_go_with_it():
    config = RefAlignConfig(attention="isolated", lora_scope="reference", r=4, align_layers=1, drop_background=True)
    branch = attach(tiny_transformer(num_layers=2), config, seed=0)
    samples, masks, replacements = make_rows([2, 2])
    same = [sample.references[0] for sample in samples]
    for sample in samples:
        sample.tokens = torch.ones(2, 2, 2, 2, dtype=torch.bool)
    tokens = [torch.ones(2, 2, 2, dtype=torch.bool) for _ in samples]
    assert not reference_attribution(branch, samples, masks, same, replacement_tokens=tokens)[2].rises.any()
    for kept in tokens:
        kept[1, 0] = False
    rises = reference_attribution(branch, samples, masks, same, replacement_tokens=tokens)[2].rises
    assert not rises[:, :, 0].any()
    assert rises[:, :, 1].all()


def test_arguments_that_do_not_go_together_are_refused_at_once(branch):
    samples, masks, replacements = make_rows([2, 1])
    masks[0] = masks[0][:, :1]
    replacements[1] = replacements[0]
    with pytest.raises(ConfigError) as caught:
        reference_attribution(branch, samples, masks, replacements)
    assert caught.value.problems == [
        "masks[0] must be (2, 2, 4, 4), got (2, 1, 4, 4)",
        "replacements[1] must be (1, 16, 4, 4), got (2, 16, 4, 4)",
    ]
    with pytest.raises(ConfigError, match="masks must be one for each of 2 samples, got 1"):
        reference_attribution(branch, samples, masks[:1], replacements)
    samples[0].tokens = torch.ones(2, 2, 2, 2, dtype=torch.bool)
    with pytest.raises(ConfigError, match=r"replacement_tokens\[0\] must be \(2, 2, 2\), got None"):
        reference_attribution(branch, samples, *make_rows([2, 1])[1:])
