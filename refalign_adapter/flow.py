"""Rectified flow: timestep sampling with Wan's shift, interpolation, velocity target, loss.

Shape letters: B batch. Sigma is the share of noise in [0, 1]; the model's timestep is 1000 · sigma.
Sources: rectified flow (arXiv 2209.03003); logit-normal sampling and shift (SD3, arXiv 2403.03206, section 5.3.2);
diffusers' FlowMatchEulerDiscreteScheduler for the shift.
"""

from collections.abc import Callable
from typing import Literal

import torch
from torch import Tensor

from .errors import UserError

TIMESTEPS = 1000.0

TimestepSampling = Literal["uniform", "logit_normal"]
Shift = Callable[[int], float]
"""The timestep shift of a video, by the number of its tokens."""


def unshifted(tokens: int) -> float:
    """The shift that changes nothing."""
    return 1.0


def shift_sigmas(sigmas: Tensor, shift: float) -> Tensor:
    """Wan's timestep shift: shift · s / (1 + (shift − 1) · s). `shift` > 0; 1 changes nothing, more favours noise.

    Raises:
        UserError: `shift` is not positive.
    """
    if shift <= 0:
        raise UserError(f"shift must be positive, got {shift}; Wan uses 3.0 at 480p and 5.0 at 720p")
    return shift * sigmas / (1 + (shift - 1) * sigmas)


def sample_sigmas(
    batch: int,
    *,
    sampling: TimestepSampling = "uniform",
    shift: float = 1.0,
    logit_mean: float = 0.0,
    logit_std: float = 1.0,
    generator: torch.Generator | None = None,
    device: torch.device | str = "cpu",
) -> Tensor:
    """Draw (B,) float32 sigmas in [0, 1], then shift them.

    Draws happen on the generator's device (CPU without one), so that a seed means the same on every accelerator.

    Raises:
        UserError: unknown `sampling`, or a shift that is not positive.
    """
    source = generator.device if generator is not None else "cpu"
    if sampling == "uniform":
        sigmas = torch.rand(batch, generator=generator, device=source)
    elif sampling == "logit_normal":
        sigmas = torch.sigmoid(logit_mean + logit_std * torch.randn(batch, generator=generator, device=source))
    else:
        raise UserError(f"timestep sampling must be 'uniform' or 'logit_normal', got {sampling!r}")
    return shift_sigmas(sigmas, shift).to(device)


def interpolate(latents: Tensor, noise: Tensor, sigmas: Tensor) -> Tensor:
    """(1 − sigma) · latents + sigma · noise, for latents (B, ...) and sigmas (B,), in the latents' type.

    Mixed in float32 at least: a bfloat16 sigma would be off from the timestep the model is told.
    """
    dtype = torch.promote_types(latents.dtype, torch.float32)
    sigmas = sigmas.view(-1, *[1] * (latents.ndim - 1)).to(dtype)
    return ((1 - sigmas) * latents.to(dtype) + sigmas * noise.to(dtype)).to(latents.dtype)


def velocity_target(latents: Tensor, noise: Tensor) -> Tensor:
    """What the model is to predict: noise − latents."""
    return noise - latents


def flow_loss(prediction: Tensor, target: Tensor) -> Tensor:
    """(B,) mean squared error of each sample, accumulated in float32 (float64 stays float64)."""
    dtype = torch.promote_types(prediction.dtype, torch.float32)
    return (prediction.to(dtype) - target.to(dtype)).square().flatten(1).mean(1)
