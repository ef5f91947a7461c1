"""Guidance by text and by references: which passes a step needs and how their predictions are combined.

With both conditions (RefAlign, arXiv 2603.25743, inference), ∅ being the negative prompt or no references:

    ε̂ = ε(∅,∅) + s_img · (ε(∅,ref) − ε(∅,∅)) + s_txt · (ε(text,ref) − ε(∅,ref))

This is a weighted sum of predictions; a pass whose weight is 0 is not run. That makes

    three passes   in general
    two            s_img = 1: ε(∅,ref) + s_txt · (ε(text,ref) − ε(∅,ref)), which is the formula itself
    two            s_img = s_txt: ε(∅,∅) + s · (ε(text,ref) − ε(∅,∅)), again the formula itself
    two            s_txt = 1: ε(text,∅) + s_img · (ε(text,ref) − ε(text,∅)). Ours: by the formula, turning text
                   guidance off would still take three passes, and references would guide under the negative prompt
    one            both 1: ε(text,ref)

Without references it is classifier-free guidance by s_txt, in two passes or, at 1, in one; s_img plays no part.

Guidance can be left to an interval of the steps (Kynkäänniemi et al., arXiv 2404.07724); the others run ε(text,ref)
alone. Of the guided steps some can add what an earlier one computed, see `kept_differences`.

With an adapter that acts on references alone, ε(∅,∅) and ε(text,∅) are the base model's own; with one whose
`null_reference` is "zeros", latents of zero stand for the references in both, as in the paper's released code.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import groupby

import torch
from torch import Tensor

from ..errors import ConfigError, shorten

ALL_STEPS = (0.0, 1.0)
INTERVAL = "guidance_interval must be two shares of the steps, start below stop, both in [0, 1]"


@dataclass(frozen=True)
class GuidancePass:
    """One prediction of a step.

    Attributes:
        text: whether it sees the prompt; else the negative prompt.
        references: whether it sees the references.
        weight: of the prediction; the weights of a step add up to 1.
    """

    text: bool
    references: bool
    weight: float

    @property
    def name(self) -> str:
        """Unique among the passes of a step."""
        return f"{'text' if self.text else 'negative'}_{'references' if self.references else 'alone'}"


Call = tuple[GuidancePass, ...]
"""Passes that one call of the transformer runs as a larger batch; all of them see the references, or none does."""


@dataclass(frozen=True)
class GuidancePlan:
    """Which calls of the transformer each step makes.

    Attributes:
        guided: the calls of a step inside the interval.
        unguided: of a step outside of it: the fully conditioned pass.
        interval: [start, stop), shares of the steps.
        refresh: inside the interval, all passes run in the first two steps and then in every `refresh`-th, counted
            from the first; the others run the fully conditioned pass alone and add kept differences.
    """

    guided: tuple[Call, ...]
    unguided: tuple[Call, ...]
    interval: tuple[float, float] = ALL_STEPS
    refresh: int = 1

    def calls(self, index: int, steps: int) -> tuple[Call, ...]:
        """The calls of step `index` of `steps`, counted from 0, where nothing is kept."""
        return self.guided if self._guides(index, steps) else self.unguided

    def adds_kept(self, index: int, steps: int) -> bool:
        """Whether that step is one that adds kept differences."""
        number = sum(self._guides(before, steps) for before in range(index))
        return self._guides(index, steps) and number >= 2 and number % self.refresh != 0

    def _guides(self, index: int, steps: int) -> bool:
        start, stop = self.interval
        return start <= index / steps < stop


def check_scales(
    guidance_scale: float,
    image_guidance_scale: float,
    guidance_interval: Sequence[float] = ALL_STEPS,
    guidance_refresh: int = 1,
) -> None:
    """Refuse scales, intervals and refreshes that mean nothing.

    Raises:
        ConfigError: every problem.
    """
    problems = [
        *_scale_problems("guidance_scale", guidance_scale, 1, ", which turns it off"),
        *_scale_problems(
            "image_guidance_scale", image_guidance_scale, 0, "; 1 turns it off and less weakens the references"
        ),
        *_interval_problems(guidance_interval),
    ]
    if type(guidance_refresh) is not int or guidance_refresh < 1:
        problems.append(
            f"guidance_refresh must be a whole number of at least 1, which refreshes in every step, "
            f"got {shorten(guidance_refresh)}"
        )
    if problems:
        raise ConfigError(problems)


def _scale_problems(name: str, value: object, least: int, meaning: str) -> list[str]:
    if not isinstance(value, int | float):
        return [f"{name} must be a number, got {shorten(value)}"]
    if math.isfinite(value) and value >= least:
        return []
    return [f"{name} must be at least {least}{meaning}, got {value}"]


def _interval_problems(interval: object) -> list[str]:
    if not isinstance(interval, list | tuple) or len(interval) != 2:
        return [f"{INTERVAL}, got {shorten(interval)}"]
    if not all(isinstance(value, int | float) for value in interval):
        return [f"{INTERVAL}, got {shorten(interval)}"]
    return [] if 0 <= interval[0] < interval[1] <= 1 else [f"{INTERVAL}, got {tuple(interval)}"]


def guidance_passes(
    guidance_scale: float, image_guidance_scale: float, references: bool = True
) -> tuple[GuidancePass, ...]:
    """The passes of a step, from the least conditioned to the most.

    Args:
        guidance_scale: s_txt.
        image_guidance_scale: s_img.
        references: whether there are any.
    """
    if not references:
        weights = {(False, False): 1 - guidance_scale, (True, False): guidance_scale}
    elif guidance_scale == 1:
        weights = {(True, False): 1 - image_guidance_scale, (True, True): image_guidance_scale}
    else:
        weights = {
            (False, False): 1 - image_guidance_scale,
            (False, True): image_guidance_scale - guidance_scale,
            (True, True): guidance_scale,
        }
    return tuple(GuidancePass(*conditions, weight) for conditions, weight in weights.items() if weight != 0)


def plan_guidance(
    guidance_scale: float,
    image_guidance_scale: float,
    *,
    references: bool,
    interval: Sequence[float] = ALL_STEPS,
    batch: bool = False,
    refresh: int = 1,
) -> GuidancePlan:
    """Choose the calls of all steps.

    Args:
        guidance_scale, image_guidance_scale: as in `guidance_passes`, inside the interval; 1 outside of it.
        references: whether there are any.
        interval: [start, stop), shares of the steps.
        batch: whether passes that see the references share a call, and likewise those that do not.
        refresh: see `GuidancePlan`.
    """
    passes = guidance_passes(guidance_scale, image_guidance_scale, references)
    if batch:
        guided = tuple(tuple(group) for _, group in groupby(passes, lambda item: item.references))
    else:
        guided = tuple((item,) for item in passes)
    return GuidancePlan(guided, (guidance_passes(1, 1, references),), (interval[0], interval[1]), refresh)


def combine(predictions: Sequence[Tensor], passes: Sequence[GuidancePass]) -> Tensor:
    """The guided prediction: the weighted sum, in float32 at least, as weights of several times 1 cancel.

    Without references it is diffusers' classifier-free guidance, in the predictions' own type, so that a transformer
    which is the base's makes the very video that the base's pipeline makes.

    Args:
        predictions: one per pass, of one shape.
        passes: as from `guidance_passes`.
    """
    if len(passes) == 1:
        return predictions[0]
    if not passes[-1].references:
        return predictions[0] + passes[1].weight * (predictions[1] - predictions[0])
    dtype = torch.promote_types(predictions[0].dtype, torch.float32)
    # As differences of neighbours, like the formula above: equal predictions then give exactly themselves.
    guided, passed = predictions[0].to(dtype), passes[0].weight
    for before, after, item in zip(predictions[:-1], predictions[1:], passes[1:], strict=True):
        guided = guided + (1 - passed) * (after.to(dtype) - before.to(dtype))
        passed += item.weight
    return guided
