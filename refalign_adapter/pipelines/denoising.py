"""The loop from noise to a video's latents: in each step the calls of the guidance plan, then the scheduler's step.

Shape letters: B prompts times videos per prompt, C latent channels, F latent frames, H and W latent height and width.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from typing import Any

from diffusers.callbacks import MultiPipelineCallbacks, PipelineCallback
from torch import Tensor

from .conditions import Conditions, EncodedReferences
from .guidance import Call, GuidancePlan, combine
from .step_caches import pass_context

Callback = Callable[[Any, int, Any, dict[str, Any]], dict[str, Any]] | PipelineCallback | MultiPipelineCallbacks


def denoise(
    pipe: Any,
    latents: Tensor,
    conditions: Conditions,
    plan: GuidancePlan,
    steps: int,
    callback: Callback | None = None,
    names: Sequence[str] = ("latents",),
) -> Tensor:
    """Run a pipeline's steps.

    Args:
        pipe: a `ReferencePipeline`; its `_velocity` runs the transformer.
        latents: (B, C, F, H, W) noise.
        conditions: what the passes see.
        plan: which passes there are.
        steps: how many.
        callback: a user's own, as in diffusers, called after every step.
        names: of the tensors it is given.

    Returns:
        (B, C, F, H, W) latents.
    """
    scheduler = pipe.scheduler
    with _restored(scheduler), pipe.progress_bar(total=steps) as progress:
        scheduler.set_timesteps(steps, device=latents.device)
        scheduler.set_begin_index(0)
        timesteps, order = scheduler.timesteps, scheduler.order
        pipe._num_timesteps = total = len(timesteps)
        for index, timestep in enumerate(timesteps):
            if pipe.interrupt:
                continue
            pipe._current_timestep = timestep
            where = index, float(scheduler.sigmas[index]), total
            passes, predictions = [], []
            for call in plan.calls(index, total):
                passes += call
                predictions += _predict(pipe, latents, timestep, conditions, call, where)
            guided = combine(predictions, passes)
            latents = scheduler.step(guided, timestep, latents, return_dict=False)[0]
            latents = _call_back(pipe, callback, names, conditions, index, timestep, latents)
            if index == total - 1 or (index + 1 > total - steps * order and (index + 1) % order == 0):
                progress.update()
    return latents


def _predict(
    pipe: Any, latents: Tensor, timestep: Tensor, conditions: Conditions, call: Call, where: tuple[int, float, int]
) -> Sequence[Tensor]:
    """One call of the transformer: a prediction (B, C, F, H, W) for each of its passes."""
    passes, given = len(call), conditions.riding(call)
    batch = latents if passes == 1 else latents.repeat(passes, 1, 1, 1, 1)
    name = "+".join(item.name for item in call)
    with pass_context(pipe.transformer, name, *where), _riding(pipe, given):
        velocity = pipe._velocity(batch, timestep, conditions.texts(call), conditions.attention_kwargs)
    return velocity.chunk(passes)


def _riding(pipe: Any, references: EncodedReferences | None) -> AbstractContextManager[None]:
    if references is None:
        return pipe._loaded_branch().references(None)
    return pipe._reference_branch().references(references.given, references.mask)


def _call_back(
    pipe: Any,
    callback: Callback | None,
    names: Sequence[str],
    conditions: Conditions,
    index: int,
    timestep: Tensor,
    latents: Tensor,
) -> Tensor:
    """The user's callback; what it returns replaces latents and embeddings."""
    if callback is None:
        return latents
    values = {
        "latents": latents,
        "prompt_embeds": conditions.prompt_embeds,
        "negative_prompt_embeds": conditions.negative_prompt_embeds,
    }
    values |= callback(pipe, index, timestep, {name: values[name] for name in names})
    conditions.prompt_embeds = values["prompt_embeds"]
    conditions.negative_prompt_embeds = values["negative_prompt_embeds"]
    return values["latents"]


@contextmanager
def _restored(scheduler: Any) -> Iterator[None]:
    """Leave the scheduler as it was: pipelines share it, and one may run inside another's callback."""
    before = dict(vars(scheduler))
    try:
        yield
    finally:
        vars(scheduler).clear()
        vars(scheduler).update(before)
