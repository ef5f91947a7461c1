"""Guidance in the steps between those that compute it: what conditions change in a prediction is kept for them.

The weighted sum of `guidance` is the fully conditioned prediction and, for each pair of neighbouring passes, a
multiple of their difference:

    ε̂ = ε(text,ref) + (s_img − 1) · (ε(∅,ref) − ε(∅,∅)) + (s_txt − 1) · (ε(text,ref) − ε(∅,ref))

From one step to the next the differences change little beside the prediction itself. A step that adds kept ones needs
a single pass. Differences are kept, not what the scales made of them, so that a scale which a callback changes acts in
that very step. They take one tensor of the prediction's shape with two passes, two with three, in float32 at least.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

import torch
from torch import Tensor

from .guidance import GuidancePass


@dataclass(frozen=True)
class KeptDifferences:
    """What one step's passes tell the next ones.

    Attributes:
        conditions: (text, references) of the passes, from the least conditioned to the most.
        differences: of each but the first to the one before it, one fewer than conditions, of the predictions' shape.
    """

    conditions: tuple[tuple[bool, bool], ...]
    differences: tuple[Tensor, ...]

    @classmethod
    def between(cls, predictions: Sequence[Tensor], passes: Sequence[GuidancePass]) -> KeptDifferences:
        """Those of a step; arguments as for `guidance.combine`."""
        dtype = torch.promote_types(predictions[0].dtype, torch.float32)
        differences = tuple(after.to(dtype) - before.to(dtype) for before, after in pairwise(predictions))
        return cls(tuple(_condition(item) for item in passes), differences)

    def serve(self, passes: Sequence[GuidancePass]) -> bool:
        """Whether they hold what guidance by these passes needs: a sum of neighbours is a difference too."""
        return {_condition(item) for item in passes} <= set(self.conditions)

    def add_to(self, prediction: Tensor, passes: Sequence[GuidancePass]) -> Tensor:
        """The guided prediction, in the type that `guidance.combine` gives it.

        Args:
            prediction: of the fully conditioned pass, in this step.
            passes: those that a full step would run, weighted as this step's scales ask for.
        """
        weights = {_condition(item): item.weight for item in passes}
        guided, passed = prediction.to(self.differences[0].dtype), 0.0
        for condition, difference in zip(self.conditions, self.differences, strict=False):
            passed += weights.get(condition, 0.0)
            guided = guided - passed * difference
        return guided if passes[-1].references else guided.to(prediction.dtype)


def _condition(item: GuidancePass) -> tuple[bool, bool]:
    return item.text, item.references
