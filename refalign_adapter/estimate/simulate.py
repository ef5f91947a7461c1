"""The real training step on torch's "meta" device: what it would hold in memory, without holding it.

Where the step differs from a run on a GPU: references are all there and all their tokens are kept (no mask can be read
on meta, and it is the most that can happen); conditions are not dropped; of the objectives, what works on data is
stood for by what it allocates and keeps, see `Objective.without_data`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch.utils.checkpoint import checkpoint

from ..branch.attach import attach
from ..branch.reference_branch import ReferenceBranch
from ..data.cache.options import CacheOptions
from ..recipes.schema import Recipe
from ..training.objectives import build_objectives
from ..training.offload import offloaded_checkpoint
from ..training.setup import step_options
from ..training.step import TrainingStep
from .kernels import GpuKernels
from .live_bytes import LiveBytes
from .models import Models
from .shapes import SampleShapes, largest_size


@dataclass(frozen=True)
class StepMemory:
    """Bytes of one training step, forward and backward, on top of weights and kept gradients.

    Attributes:
        peak: the most that lives at a time on the GPU.
        host: activations that wait in host memory.
    """

    peak: int
    host: int


def build_step(recipe: Recipe, models: Models, dtype: torch.dtype) -> TrainingStep:
    """Transformer, LoRA and the objectives' heads on meta, as a run makes them.

    Args:
        recipe: what to train.
        models: its configs.
        dtype: of the base's weights.

    Raises:
        UserError: an adapter that does not fit the base.
    """
    transformer = models.transformer(dtype)
    with torch.device("meta"):
        branch = attach(transformer, recipe.adapter_config(), family=models.family)
    objectives = build_objectives(recipe, branch, models.encoders.widths)
    on_meta = [objective.to("meta").without_data() for objective in objectives]
    step = TrainingStep(branch, on_meta, step_options(recipe, models.shift))
    step.train()
    return step


def simulate_step(
    step: TrainingStep,
    recipe: Recipe,
    shapes: SampleShapes,
    references: int,
    autocast: torch.dtype | None = None,
    device: str = "meta",
) -> StepMemory:
    """Run one batch forward and backward.

    Args:
        step: see `build_step`.
        recipe: batch size, gradient accumulation and checkpointing.
        shapes: of its samples.
        references: of every sample.
        autocast: its type; None: it is off.
        device: of the step. On another than meta it runs for real, without what a GPU does otherwise.
    """
    kernels, live = GpuKernels(autocast), LiveBytes(device)
    _use_checkpointing(step.transformer, recipe, kernels)
    parameters = [parameter for parameter in step.parameters() if parameter.requires_grad]
    for parameter in parameters:  # those of the batch before, which this one's are added to
        parameter.grad = torch.empty_like(parameter) if recipe.gradient_accumulation_steps > 1 else None
    with live, _without_masks(step.branch):
        batch = shapes.batch(recipe.train_batch_size, references, device)
        empty_text = {name: tensor[0] for name, tensor in shapes.captions(1, device).items()}
        with kernels.once():
            weights = {objective.name: 1.0 for objective in step.objectives}
            output = step(batch, empty_text, generator=torch.Generator(), weights=weights, drop_conditions=False)
        output.loss.backward()
    return StepMemory(live.peak, live.host)


@torch.no_grad()
def simulate_encoding(models: Models, options: CacheOptions) -> int:
    """Bytes that live at most, on top of the weights, while the VAE encodes a clip of the options' largest size."""
    size = largest_size(options)
    kernels, live = GpuKernels(), LiveBytes()
    with live:
        video = torch.empty(1, 3, size.num_frames, size.height, size.width, device="meta")
        with kernels.once():
            models.family.encode_video(models.encoders.pipe, video)
    return live.peak


def _use_checkpointing(transformer: Any, recipe: Recipe, kernels: GpuKernels) -> None:
    if not recipe.gradient_checkpointing:
        return
    plain = partial(checkpoint, use_reentrant=False)
    run = offloaded_checkpoint if recipe.offload_activations else plain
    transformer.enable_gradient_checkpointing(partial(_checkpoint, kernels, run))


def _checkpoint(kernels: GpuKernels, run: Callable[..., Any], block: Callable[..., Any], *inputs: Any) -> Any:
    """A checkpointed block that finds the GPU's kernels in backward, too."""

    def inside(*block_inputs: Any) -> Any:
        with kernels.once():
            return block(*block_inputs)

    return run(inside, *inputs)


@contextmanager
def _without_masks(branch: ReferenceBranch) -> Iterator[None]:
    """References come without their masks, which cannot be read on meta."""
    given: Any = branch.references
    vars(branch)["references"] = lambda latents, mask=None, tokens=None: given(latents)
    try:
        yield
    finally:
        del vars(branch)["references"]
