"""The objectives that a recipe asks for, and the names that checkpoints have for what they train.

In `projectors.safetensors`, reference alignment's tensors have no prefix, as they had none when it was the only
objective; any other's begin with its name and a dot. The optimizer's state has the same names after `projectors.`.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from ..alignment.objective import Objective
from ..alignment.projector import Projectors
from ..alignment.reference.objective import ReferenceAlignment, ReferenceOptions
from ..batch import REFERENCE
from ..branch.reference_branch import ReferenceBranch
from ..recipes.schema import Recipe

HEADS = "projectors."
"""What parameters of objectives begin with among all that is trained."""
Widths = Mapping[str, Mapping[str, int]]
"""Objective -> teacher id -> width of its features."""


def build_objectives(recipe: Recipe, branch: ReferenceBranch, widths: Widths) -> list[Objective]:
    """What the recipe adds to the flow loss, with new heads.

    Args:
        recipe: what to train.
        branch: on the transformer.
        widths: of what is cached.
    """
    if not branch.align_blocks or recipe.alignment.weight == 0:
        return []
    section = recipe.alignment
    teachers = {name: widths[REFERENCE][name] for name in recipe.adapter.teachers}
    hidden, generator = branch.family.hidden_size(branch.transformer), torch.Generator().manual_seed(recipe.seed)
    options = ReferenceOptions(
        section.positive_margin, section.negative_margin, section.negative_weight, section.timestep_gate
    )
    projectors = Projectors(branch.align_blocks, hidden, teachers, generator)
    return [ReferenceAlignment(projectors, options, recipe.alignment_schedule())]


def weights_at(objectives: Sequence[Objective], step: int) -> dict[str, float]:
    """Objective -> its weight in a training step."""
    return {objective.name: objective.weight_at(step) for objective in objectives}


def full_weights(objectives: Sequence[Objective]) -> dict[str, float]:
    """Objective -> its weight in held-out losses, which are to compare whatever the step."""
    return {objective.name: objective.schedule.weight for objective in objectives}


def named_heads(objectives: Sequence[Objective]) -> Iterator[tuple[str, nn.Parameter]]:
    """What objectives train, by its names in a checkpoint."""
    for objective in objectives:
        for name, parameter in objective.heads.named_parameters():
            yield _prefix(objective.name) + name, parameter


def heads_state(objectives: Sequence[Objective]) -> dict[str, Tensor]:
    """Tensors of the objectives' heads by their names in a checkpoint."""
    return {
        _prefix(objective.name) + name: tensor
        for objective in objectives
        for name, tensor in objective.heads.state_dict().items()
    }


def load_heads(objectives: Sequence[Objective], state: Mapping[str, Tensor]) -> None:
    """Take over what `heads_state` gave, whose names and shapes have been compared."""
    for objective in objectives:
        prefix = _prefix(objective.name)
        own = {name.removeprefix(prefix): state[name] for name in state if objective_of(name) == objective.name}
        objective.heads.load_state_dict(own)


def objective_of(name: str) -> str:
    """Which objective a tensor in `projectors.safetensors` belongs to."""
    first = name.partition(".")[0]
    return REFERENCE if first == "heads" else first


def schedules_of(objectives: Sequence[Objective]) -> dict[str, Any]:
    """`state.json`'s word on the objectives' weights: "schedule" is reference alignment's, "schedules" the others'."""
    states = {objective.name: objective.schedule.state_dict() for objective in objectives}
    own = states.pop(REFERENCE, {})
    return {"schedule": own, **({"schedules": states} if states else {})}


def _prefix(objective: str) -> str:
    return "" if objective == REFERENCE else f"{objective}."
