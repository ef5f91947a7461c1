"""Reference sensitivity against the definition written out, row by row."""

import math

import pytest
import torch
from scipy.stats import t as student_t
from tiny_models import tiny_transformer

from refalign_adapter import RefAlignConfig, UserError, attach
from refalign_adapter.analysis.sensitivity import paired_p_value, reference_sensitivity
from refalign_adapter.batch import EMBEDDING, CachedSample


def make_samples(counts: list[int], shape: tuple[int, ...] = (16, 2, 4, 4), seed: int = 0) -> list[CachedSample]:
    generator = torch.Generator().manual_seed(seed)
    draw = lambda *size: torch.randn(*size, generator=generator)  # noqa: E731
    return [
        CachedSample(
            str(index), draw(*shape), {EMBEDDING: draw(5, 32)}, draw(2, count, 16, 4, 4), {}, torch.arange(count)
        )
        for index, count in enumerate(counts)
    ]


@pytest.fixture(scope="module")
def branch():
    transformer = tiny_transformer(num_layers=2)
    branch = attach(transformer, RefAlignConfig(attention="joint", r=4, lora_alpha=4, align_layers=1), seed=0)
    for name, parameter in branch.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.1, generator=torch.Generator().manual_seed(1))
    return branch


def naive_loss(branch, sample: CachedSample, references, row: int, sigmas, seed: int) -> float:
    generator = torch.Generator().manual_seed(seed * 1_000_003 + row)
    total = 0.0
    for sigma in sigmas:
        noise = torch.randn(sample.latents.shape, generator=generator)
        noisy = (1 - sigma) * sample.latents + sigma * noise
        stacked = None if references is None else references.transpose(0, 1)[None]
        with torch.no_grad(), branch.references(stacked):
            prediction = branch.transformer(
                noisy[None], torch.tensor([1000.0 * sigma]), sample.text[EMBEDDING][None], return_dict=False
            )[0]
        total += (prediction[0] - (noise - sample.latents)).square().mean().item()
    return total / len(sigmas)


def test_true_and_none_equal_the_definition_row_by_row(branch):
    samples = make_samples([2, 1, 2, 1, 1])
    result = reference_sensitivity(branch, samples, sigmas=(0.3, 0.8), seed=3, batch_size=2)
    true = [naive_loss(branch, item, item.references[0], row, (0.3, 0.8), 3) for row, item in enumerate(samples)]
    none = [naive_loss(branch, item, None, row, (0.3, 0.8), 3) for row, item in enumerate(samples)]
    assert result.n == 5
    assert sorted(result.rows[:, 0].tolist()) == pytest.approx(sorted(true), abs=1e-5)
    assert sorted(result.rows[:, 3].tolist()) == pytest.approx(sorted(none), abs=1e-5)
    assert (result.true, result.none) == pytest.approx((sum(true) / 5, sum(none) / 5), abs=1e-5)


def test_rows_without_references_say_nothing(branch):
    with_some = make_samples([2, 2])
    alone = reference_sensitivity(branch, with_some, sigmas=(0.3,))
    beside = reference_sensitivity(branch, [*with_some, *make_samples([0, 0])], sigmas=(0.3,))
    assert beside.n == 2
    assert beside.true == pytest.approx(alone.true, abs=1e-5)


def test_none_is_zeros_where_the_adapter_has_them_in_their_place():
    config = RefAlignConfig(attention="joint", r=4, lora_alpha=4, align_layers=1, null_reference="zeros")
    branch = attach(tiny_transformer(num_layers=2), config, seed=0)
    samples = make_samples([2, 2])
    result = reference_sensitivity(branch, samples, sigmas=(0.5,), seed=0)
    zeros = [
        naive_loss(branch, item, torch.zeros_like(item.references[0]), row, (0.5,), 0)
        for row, item in enumerate(samples)
    ]
    absent = [naive_loss(branch, item, None, row, (0.5,), 0) for row, item in enumerate(samples)]
    assert sorted(result.rows[:, 3].tolist()) == pytest.approx(sorted(zeros), abs=1e-5)
    assert min(abs(one - other) for one, other in zip(zeros, absent, strict=True)) > 1e-4


def test_shuffled_takes_another_row_with_as_many_references(branch):
    samples = make_samples([2, 1, 2, 1])  # two groups of two rows: each borrows from the other one
    result = reference_sensitivity(branch, samples, sigmas=(0.5,), seed=0)
    partner = {0: 2, 2: 0, 1: 3, 3: 1}
    losses = [
        naive_loss(branch, samples[row], samples[other].references[0], row, (0.5,), 0)
        for row, other in partner.items()
    ]
    assert sorted(result.rows[:, 1].tolist()) == pytest.approx(sorted(losses), abs=1e-5)
    assert result.p_value == pytest.approx(paired_p_value(result.rows[:, 0], result.rows[:, 1]))


def test_swapped_moves_each_reference_one_place_on(branch):
    samples = make_samples([3, 1, 3, 1])
    result = reference_sensitivity(branch, samples, sigmas=(0.5,), seed=0)
    losses = [
        naive_loss(branch, sample, sample.references[0][[-1, *range(len(sample.subjects) - 1)]], row, (0.5,), 0)
        for row, sample in enumerate(samples)
    ]
    assert sorted(result.rows[:, 2].tolist()) == pytest.approx(sorted(losses), abs=1e-5)


def test_tokens_left_out_of_the_references_are_left_out_here_too():
    transformer = tiny_transformer(num_layers=2)
    config = RefAlignConfig(attention="isolated", lora_scope="reference", r=4, align_layers=1, drop_background=True)
    branch = attach(transformer, config, seed=0)
    samples = make_samples([2, 2])
    whole = reference_sensitivity(branch, samples, sigmas=(0.5,))
    for sample in samples:
        sample.tokens = torch.ones(2, 2, 2, 2, dtype=torch.bool)
    assert torch.equal(reference_sensitivity(branch, samples, sigmas=(0.5,)).rows, whole.rows)
    for sample in samples:
        sample.tokens[:, :, 0] = False
    fewer = reference_sensitivity(branch, samples, sigmas=(0.5,))
    assert torch.equal(fewer.rows[:, 3], whole.rows[:, 3])
    assert not torch.equal(fewer.rows[:, 0], whole.rows[:, 0])


def test_does_not_depend_on_the_batch_size(branch):
    samples = make_samples([1] * 7)
    whole = reference_sensitivity(branch, samples, sigmas=(0.5,), batch_size=7)
    parts = reference_sensitivity(branch, samples, sigmas=(0.5,), batch_size=3)
    torch.testing.assert_close(whole.rows, parts.rows, atol=1e-5, rtol=0)


def test_rows_without_a_partner_are_left_out(branch):
    samples = [*make_samples([1, 1, 3]), *make_samples([1], shape=(16, 1, 4, 4))]
    assert reference_sensitivity(branch, samples, sigmas=(0.5,)).n == 2
    with pytest.raises(UserError, match="at least 2 rows"):
        reference_sensitivity(branch, samples[2:], sigmas=(0.5,))


def test_leaves_the_transformer_in_its_mode(branch):
    for training in (True, False):
        branch.transformer.train(training)
        reference_sensitivity(branch, make_samples([1, 1]), sigmas=(0.5,))
        assert branch.transformer.training is training


def test_p_value_is_the_paired_t_test():
    generator = torch.Generator().manual_seed(0)
    true = torch.rand(20, generator=generator, dtype=torch.float64)
    shuffled = true + 0.1 * torch.randn(20, generator=generator, dtype=torch.float64) + 0.05
    gain = shuffled - true
    statistic = gain.mean() / (gain.std() / math.sqrt(20))
    assert paired_p_value(true, shuffled) == pytest.approx(student_t.sf(statistic.item(), 19))
    assert paired_p_value(shuffled, true) == pytest.approx(1 - paired_p_value(true, shuffled))


def test_equal_losses_are_no_evidence():
    assert paired_p_value(torch.ones(8), torch.ones(8)) == 1.0
