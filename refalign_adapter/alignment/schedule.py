"""How much the alignment loss weighs: over training steps (η), and by the timestep of a sample.

Shape letters: B batch.
"""

from __future__ import annotations

import dataclasses
import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ..config import unknown_key
from ..errors import ConfigError, UserError, shorten

DECAYS = ("constant", "cosine")


@dataclass
class AlignmentSchedule:
    """Weight η of the alignment loss: a linear warm-up, then constant or cosine decay, then 0 from a cut-off on.

    Args:
        weight: η after the warm-up, at least 0; RefAlign (arXiv 2603.25743) trains with 1.
        warmup_steps: η rises linearly from 0 at step 0 to `weight` at this step; 0: no warm-up.
        decay: "constant", or "cosine": half a cosine from `weight` down to `final_weight`.
        decay_steps: length of the cosine, counted from the end of the warm-up; η stays at `final_weight` afterwards.
        final_weight: where the cosine ends, at least 0.
        cutoff_step: from this step on η is 0; None: never.

    Raises:
        ConfigError: lists every problem at once.
    """

    weight: float = 1.0
    warmup_steps: int = 0
    decay: str = "constant"
    decay_steps: int = 0
    final_weight: float = 0.0
    cutoff_step: int | None = None

    def __post_init__(self) -> None:
        values = {name: getattr(self, name) for name in ("weight", "warmup_steps", "decay_steps", "final_weight")}
        if self.cutoff_step is not None:
            values["cutoff_step"] = self.cutoff_step
        problems = [
            f"{name} must be finite and at least 0, got {shorten(value)}"
            for name, value in values.items()
            if isinstance(value, bool) or not isinstance(value, int | float) or not 0 <= value < math.inf
        ]
        if self.decay not in DECAYS:
            problems.append(f"decay must be one of {list(DECAYS)}, got {self.decay!r}")
        if self.decay == "cosine" and self.decay_steps == 0:
            problems.append("decay_steps must be at least 1 with decay='cosine', got 0")
        if problems:
            raise ConfigError(problems)

    def weight_at(self, step: int) -> float:
        """η for the training step `step`, counted from 0.

        Raises:
            UserError: a negative step.
        """
        if step < 0:
            raise UserError(f"step must be at least 0, got {step}")
        if self.cutoff_step is not None and step >= self.cutoff_step:
            return 0.0
        if step < self.warmup_steps:
            return self.weight * step / self.warmup_steps
        if self.decay == "constant":
            return self.weight
        progress = min(1.0, (step - self.warmup_steps) / self.decay_steps)
        return self.final_weight + (self.weight - self.final_weight) * (1 + math.cos(math.pi * progress)) / 2

    def state_dict(self) -> dict[str, Any]:
        """The schedule's fields, for a checkpoint: JSON types only. Where it stands follows from the step alone."""
        return dataclasses.asdict(self)

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue the schedule that a checkpoint was trained with.

        Raises:
            ConfigError: unknown fields or values out of range; the schedule is then left as it was.
        """
        known = [field.name for field in dataclasses.fields(self)]
        if unknown := [unknown_key(name, known) for name in state if name not in known]:
            raise ConfigError(unknown)
        for name, value in dataclasses.asdict(AlignmentSchedule(**state)).items():
            setattr(self, name, value)


def timestep_gate(sigmas: Tensor, power: float | None) -> Tensor:
    """(B,) weights (t / 1000)^power of the alignment loss, for sigmas (B,) = t / 1000 in [0, 1]; None: all 1.

    The released RefAlign code uses power 3; the paper does not mention the gate.

    Raises:
        UserError: a negative power.
    """
    if power is None:
        return torch.ones_like(sigmas)
    if not 0 <= power < math.inf:
        raise UserError(f"timestep gate power must be at least 0, got {power}; leave it out for no gate")
    return sigmas**power
