"""Held-out losses at fixed noise and fixed timesteps: the same weights give the same numbers."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import torch
from accelerate import Accelerator

from ..batch import Batch
from ..flow import shift_sigmas
from .step import TrainingStep
from .tracking import LossMeter

GOLDEN_RATIO = (1 + math.sqrt(5)) / 2


def fixed_sigmas(first: int, count: int, shift: float) -> torch.Tensor:
    """(count,) sigmas of samples first, first + 1, …: multiples of the golden ratio modulo 1, then shifted.

    Neighbours are far apart, so that any few samples cover [0, 1] evenly.
    """
    positions = torch.arange(first, first + count, dtype=torch.float64) + 0.5
    return shift_sigmas(positions * GOLDEN_RATIO % 1.0, shift).float()


@torch.no_grad()
def validate(
    module: TrainingStep,
    load: Callable[[int], Batch],
    sizes: Sequence[int],
    empty_text: torch.Tensor,
    accelerator: Accelerator,
    *,
    seed: int,
    alignment_weight: float,
) -> dict[str, float]:
    """Mean losses over all batches, shared out among the processes.

    Args:
        module: the training step, not wrapped for several processes.
        load: gives the batch of an index.
        sizes: samples of each batch, the same on every process.
        empty_text: (S, D) embedding of the empty prompt.
        accelerator: its device; sums over its processes.
        seed: of the noise; each batch has its own.
        alignment_weight: η in the loss that is told; 0 leaves the alignment out.

    Returns:
        Means by name, see `LossMeter`. Samples weigh alike.
    """
    meter = LossMeter(module.branch.align_blocks)
    first = 0
    training = module.training
    module.eval()
    try:
        for index, count in enumerate(sizes):
            if index % accelerator.num_processes == accelerator.process_index:
                output = module(
                    load(index).to(accelerator.device),
                    empty_text,
                    generator=torch.Generator().manual_seed(seed + index),
                    alignment_weight=alignment_weight,
                    drop_conditions=False,
                    sigmas=fixed_sigmas(first, count, module.options.shift),
                )
                meter.add(output, count, alignment_weight > 0)
            first += count
    finally:
        module.train(training)
    return meter.reduce(accelerator)
