import math

import pytest
import torch
from diffusers import FlowMatchEulerDiscreteScheduler

from refalign_adapter.errors import UserError
from refalign_adapter.flow import TIMESTEPS, flow_loss, interpolate, sample_sigmas, shift_sigmas, velocity_target

DRAWS = 20_000


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


def largest_gap(draws, cumulative):
    """Kolmogorov-Smirnov statistic of `draws` against a cumulative distribution function."""
    ordered = draws.double().sort().values
    steps = torch.arange(1, len(ordered) + 1, dtype=torch.float64) / len(ordered)
    return (cumulative(ordered) - steps).abs().max().item()


def unshift(sigmas, shift):
    return sigmas / (shift - (shift - 1) * sigmas)


def test_shift_closed_form():
    sigmas = torch.tensor([0.0, 0.25, 0.5, 1.0], dtype=torch.float64)
    torch.testing.assert_close(shift_sigmas(sigmas, 3.0), torch.tensor([0.0, 0.5, 0.75, 1.0], dtype=torch.float64))
    torch.testing.assert_close(shift_sigmas(sigmas, 1.0), sigmas)
    torch.testing.assert_close(shift_sigmas(shift_sigmas(sigmas, 5.0), 1 / 5.0), sigmas)


@pytest.mark.parametrize("shift", [3.0, 5.0])
def test_shift_is_the_schedulers(shift):
    plain = FlowMatchEulerDiscreteScheduler(shift=1.0)
    shifted = FlowMatchEulerDiscreteScheduler(shift=shift)
    torch.testing.assert_close(shift_sigmas(torch.as_tensor(plain.sigmas), shift), shifted.sigmas)
    torch.testing.assert_close(TIMESTEPS * torch.as_tensor(shifted.sigmas), shifted.timesteps)


@pytest.mark.parametrize("shift", [0.0, -1.0])
def test_shift_must_be_positive(shift):
    with pytest.raises(UserError, match=rf"shift must be positive, got {shift}"):
        sample_sigmas(1, shift=shift)


@pytest.mark.parametrize("shift", [1.0, 3.0, 5.0])
def test_uniform_draws_follow_the_shifted_distribution(shift):
    draws = sample_sigmas(DRAWS, shift=shift, generator=generator())
    assert draws.shape == (DRAWS,)
    assert draws.dtype == torch.float32
    assert 0 <= draws.min() < draws.max() <= 1
    assert largest_gap(draws, lambda sigmas: unshift(sigmas, shift)) < 1.63 / math.sqrt(DRAWS)  # p = 0.01


@pytest.mark.parametrize(("mean", "std", "shift"), [(0.0, 1.0, 1.0), (-0.5, 0.7, 3.0)])
def test_logit_normal_draws_follow_their_distribution(mean, std, shift):
    draws = sample_sigmas(
        DRAWS, sampling="logit_normal", shift=shift, logit_mean=mean, logit_std=std, generator=generator()
    )

    def cumulative(sigmas):
        return torch.special.ndtr((torch.logit(unshift(sigmas, shift)) - mean) / std)

    assert largest_gap(draws, cumulative) < 1.63 / math.sqrt(DRAWS)


def test_sampling_is_decided_by_the_generator():
    torch.manual_seed(1)
    first = sample_sigmas(4, sampling="logit_normal", generator=generator(7))
    torch.manual_seed(2)
    state = torch.get_rng_state()
    assert torch.equal(first, sample_sigmas(4, sampling="logit_normal", generator=generator(7)))
    assert torch.equal(state, torch.get_rng_state())
    assert not torch.equal(first, sample_sigmas(4, sampling="logit_normal", generator=generator(8)))


def test_unknown_sampling_is_refused():
    with pytest.raises(UserError, match="'uniform' or 'logit_normal', got 'cosine'"):
        sample_sigmas(1, sampling="cosine")  # pyright: ignore[reportArgumentType]


@pytest.mark.parametrize("shape", [(3, 5), (3, 4, 2, 6, 5)])
def test_interpolation_closed_form(shape):
    latents, noise = torch.randn(2, *shape, generator=generator(), dtype=torch.float64)
    sigmas = torch.tensor([0.0, 0.25, 1.0])
    mixed = interpolate(latents, noise, sigmas)
    assert torch.equal(mixed[0], latents[0])
    torch.testing.assert_close(mixed[1], 0.75 * latents[1] + 0.25 * noise[1])
    assert torch.equal(mixed[2], noise[2])


def test_interpolation_is_the_schedulers():
    scheduler = FlowMatchEulerDiscreteScheduler(shift=3.0)
    sigmas, timesteps = torch.as_tensor(scheduler.sigmas), torch.as_tensor(scheduler.timesteps)
    latents, noise = torch.randn(2, 2, 4, 3, 2, 2, generator=generator())
    chosen = torch.tensor([10, 700])
    expected = scheduler.scale_noise(latents, timesteps[chosen], noise)  # pyright: ignore[reportArgumentType]
    torch.testing.assert_close(interpolate(latents, noise, sigmas[chosen]), expected)


def test_interpolation_in_bfloat16_uses_the_exact_sigma():
    latents, noise = torch.randn(2, 1, 4096, generator=generator()).bfloat16()
    sigma = torch.tensor([0.9985])  # bfloat16 has no value between 0.9961 and 1
    mixed = interpolate(latents, noise, sigma)
    assert mixed.dtype == torch.bfloat16
    assert torch.equal(mixed, interpolate(latents.float(), noise.float(), sigma).bfloat16())


def test_velocity_is_the_derivative_of_the_path():
    latents, noise = torch.randn(2, 2, 3, 4, generator=generator(), dtype=torch.float64)
    earlier, later = (interpolate(latents, noise, torch.full((2,), sigma)) for sigma in (0.25, 0.75))
    torch.testing.assert_close(velocity_target(latents, noise), (later - earlier) / 0.5)
    torch.testing.assert_close(later - 0.75 * velocity_target(latents, noise), latents)


def test_loss_is_one_mean_square_per_sample():
    prediction, target = torch.randn(2, 3, 4, 2, 5, 6, generator=generator(), dtype=torch.float64)
    prediction.requires_grad_()
    loss = flow_loss(prediction, target)
    naive = [
        torch.stack([(p - t) ** 2 for p, t in zip(a.flatten(), b.flatten(), strict=True)]).sum() / a.numel()
        for a, b in zip(prediction, target, strict=True)
    ]
    torch.testing.assert_close(loss, torch.stack(naive))
    loss.sum().backward()
    torch.testing.assert_close(prediction.grad, 2 * (prediction - target).detach() / prediction[0].numel())


def test_loss_accumulates_in_float32():
    prediction = torch.ones(1, 2**16, dtype=torch.bfloat16)
    loss = flow_loss(prediction, torch.zeros_like(prediction))
    assert loss.dtype == torch.float32
    assert loss.item() == 1.0
