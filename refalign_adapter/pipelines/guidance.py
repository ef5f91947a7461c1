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
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from ..errors import ConfigError


@dataclass(frozen=True)
class GuidancePass:
    """One call of the transformer in a step.

    Attributes:
        text: whether it sees the prompt; else the negative prompt.
        references: whether it sees the references.
        weight: of its prediction; the weights of a step add up to 1.
    """

    text: bool
    references: bool
    weight: float

    @property
    def name(self) -> str:
        """Unique among the passes of a step."""
        return f"{'text' if self.text else 'negative'}_{'references' if self.references else 'alone'}"


def check_scales(guidance_scale: float, image_guidance_scale: float) -> None:
    """Refuse scales that mean nothing.

    Raises:
        ConfigError: every problem.
    """
    problems = []
    if not (math.isfinite(guidance_scale) and guidance_scale >= 1):
        problems.append(f"guidance_scale must be at least 1, which turns it off, got {guidance_scale}")
    if not (math.isfinite(image_guidance_scale) and image_guidance_scale >= 0):
        problems.append(
            f"image_guidance_scale must be at least 0; 1 turns it off and less weakens the references, "
            f"got {image_guidance_scale}"
        )
    if problems:
        raise ConfigError(problems)


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


def combine(predictions: Sequence[Tensor], passes: Sequence[GuidancePass]) -> Tensor:
    """The guided prediction: the weighted sum, in float32 at least, as weights of several times 1 cancel.

    Args:
        predictions: one per pass, of one shape.
        passes: as from `guidance_passes`.
    """
    if len(passes) == 1:
        return predictions[0]
    dtype = torch.promote_types(predictions[0].dtype, torch.float32)
    # As differences of neighbours, like the formula above: equal predictions then give exactly themselves.
    guided, passed = predictions[0].to(dtype), passes[0].weight
    for before, after, item in zip(predictions[:-1], predictions[1:], passes[1:], strict=True):
        guided = guided + (1 - passed) * (after.to(dtype) - before.to(dtype))
        passed += item.weight
    return guided
