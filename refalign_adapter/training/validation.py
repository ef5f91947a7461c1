"""Held-out losses at fixed noise and fixed timesteps: the same weights and rows give the same numbers.

Noise and timestep are each row's own. So they depend on nothing else: not on which rows share a batch, nor on the
seed of the training.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable, Container, Mapping, Sequence

import torch
from accelerate import Accelerator

from ..batch import Batch
from ..flow import shift_sigmas
from .interrupt import together
from .step import TrainingStep
from .tracking import LossMeter

GOLDEN_RATIO = (1 + math.sqrt(5)) / 2


def fixed_sigmas(rows: Sequence[int], shift: float) -> torch.Tensor:
    """(rows,) sigmas of held-out rows, by their numbers: multiples of the golden ratio modulo 1, then shifted.

    Neighbours are far apart, so that any few rows cover [0, 1] evenly.
    """
    positions = torch.tensor(rows, dtype=torch.float64) + 0.5
    return shift_sigmas(positions * GOLDEN_RATIO % 1.0, shift).float()


def fixed_noise(key: str, shape: Sequence[int]) -> torch.Tensor:
    """A row's noise of this shape, by its key."""
    seed = int.from_bytes(hashlib.sha256(key.encode()).digest()[:7], "big")
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


@torch.no_grad()
def validate(
    module: TrainingStep,
    load: Callable[[int], Batch | None],
    groups: Sequence[Sequence[int]],
    empty_text: Mapping[str, torch.Tensor],
    accelerator: Accelerator,
    *,
    weights: Mapping[str, float],
    left_out: Container[int] = (),
) -> dict[str, float]:
    """Mean losses over all batches, shared out among the processes.

    Args:
        module: the training step, not wrapped for several processes.
        load: gives the batch of an index; None where none of its rows can be read.
        groups: numbers of the held-out rows in each batch, the same on every process.
        empty_text: see `TrainingStep.forward`.
        accelerator: its device; sums over its processes.
        weights: objective -> its weight in the loss that is told; one of 0 is left out.
        left_out: numbers of the rows that are not in their batch, once `load` has given it.

    Returns:
        Means by name, see `LossMeter`. Samples weigh alike. Nothing when no row could be read.

    Raises:
        UserError: what `load` raises, on any process.
    """
    meter = LossMeter(module.logs)
    training = module.training
    module.eval()
    try:
        with together(accelerator):  # all of them reach the sums below, or none
            for index, rows in enumerate(groups):
                if index % accelerator.num_processes == accelerator.process_index:
                    batch = load(index)
                    if batch is None:
                        continue
                    shown = [row for row in rows if row not in left_out]
                    output = module(
                        batch.to(accelerator.device),
                        empty_text,
                        generator=torch.Generator(),  # nothing is drawn from it
                        weights=weights,
                        drop_conditions=False,
                        sigmas=fixed_sigmas(shown, module.shift(batch.latents)),
                        noise=torch.stack([fixed_noise(key, batch.latents.shape[1:]) for key in batch.keys]),
                    )
                    meter.add(output, len(shown))
    finally:
        module.train(training)
    return meter.reduce(accelerator)
