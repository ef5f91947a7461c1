"""The contract of an objective: what a training step adds to the flow loss, and all that a run has to know of it.

The step, the loss means, the checkpoint, the loop and the estimate go by what is said here and by no objective's name.
A second one is a subclass; what it needs from the cache is a `Target`, see `data.cache.targets`.

Shape letters: B batch, M references, N tokens per reference, F, R and K a video's frames, rows and columns of tokens.
"""

from __future__ import annotations

import re
from abc import ABC, abstractmethod
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import ClassVar

import torch
from torch import Tensor, nn

from ..batch import Batch
from .schedule import AlignmentSchedule

NAME = re.compile(r"[a-z][a-z0-9_]{0,39}")
"""An objective's name: part of files' names and of tensors' keys."""


@dataclass(frozen=True)
class Taps:
    """Which tokens an objective looks at: indices of the blocks after which they are taken.

    Attributes:
        reference: of references' tokens; among the blocks that the adapter aligns, whose LoRA reaches these.
        video: of video tokens.
    """

    reference: tuple[int, ...] = ()
    video: tuple[int, ...] = ()


@dataclass(frozen=True)
class Features:
    """Tokens of one step, with their graph; those of every tap of the objectives that have a weight.

    Attributes:
        reference: block -> (B, M, N, dim), zero where padded; empty where no reference rides along.
        video: block -> (B, F, R, K, dim).
    """

    reference: dict[int, Tensor] = field(default_factory=dict)
    video: dict[int, Tensor] = field(default_factory=dict)


@dataclass(frozen=True)
class Context:
    """What a step drew and showed.

    Attributes:
        sigmas: (B,) in [0, 1], timesteps / 1000.
        aligned: (B, M) bool, True where a reference is the batch's own and was shown.
        reference_grid: rows and columns of a reference's tokens; their product is N.
        generator: on the CPU; what an objective draws, it draws from this one, so that a resumed run draws it again.
    """

    sigmas: Tensor
    aligned: Tensor
    reference_grid: tuple[int, int]
    generator: torch.Generator


@dataclass(frozen=True)
class ObjectiveOutput:
    """An objective's loss of one batch.

    Attributes:
        total: scalar with a graph that reaches every one of the objective's parameters.
        logs: name -> scalar without a graph; names among the objective's `logs`.
        counts: name -> over how many things that mean was taken; of names that are not here, over the batch's samples.
    """

    total: Tensor
    logs: dict[str, Tensor] = field(default_factory=dict)
    counts: dict[str, int] = field(default_factory=dict)


class Objective(nn.Module, ABC):
    """One term of the loss, with the heads that it trains.

    Args:
        schedule: of its weight.

    Attributes:
        name: see `NAME`; its targets are `batch.targets[name]`.
        taps: see `Taps`.
        targets: teacher id -> width of the features that the cache has to hold for it; empty: it needs none.
        logs: names of all it can log; a name is in `metrics.jsonl` as `train/{name}` and `validation/{name}`.
        section: the recipe's section with its schedule: a resumed run whose section has changed follows the recipe,
            else the checkpoint; "": always the checkpoint.
        schedule: of its weight.
    """

    section: ClassVar[str] = ""
    name: str
    taps: Taps = Taps()
    targets: dict[str, int]
    logs: tuple[str, ...] = ()

    def __init__(self, schedule: AlignmentSchedule):
        super().__init__()
        self.targets = {}
        self.schedule = schedule

    @property
    def weight_name(self) -> str:
        """What its weight is logged as."""
        return f"{self.name}_weight"

    def weight_at(self, step: int) -> float:
        """Its factor in the loss of training step `step`, counted from 0; at 0 it is not asked for a loss."""
        return self.schedule.weight_at(step)

    @property
    def heads(self) -> nn.Module:
        """What it trains, under the names that a checkpoint has for it."""
        return self

    @abstractmethod
    def loss(self, features: Features, batch: Batch, context: Context) -> ObjectiveOutput:
        """Its loss of a batch, a mean over all samples: those that it has nothing to say about count 0.

        Args:
            features: of its taps, and maybe of others'; where its own are missing, `nothing` is the answer.
            batch: on the step's device.
            context: see `Context`.
        """

    def nothing(self) -> Tensor:
        """Scalar 0 that gives all its heads a gradient of 0, as every process must have one for every parameter."""
        return zero_of(self.heads.parameters())

    def without_data(self) -> Objective:
        """Itself for a step on torch's "meta" device; what cannot run there is stood for by what it allocates."""
        return self


def zero_of(parameters: Iterable[nn.Parameter]) -> Tensor:
    """Scalar 0 with a gradient of 0 for each of the parameters."""
    sums = [parameter.sum() for parameter in parameters]
    return 0.0 * sum(sums[1:], sums[0]) if sums else torch.zeros(())


def problems_of(objectives: Sequence[Objective], blocks: int, aligned: Sequence[int]) -> Iterator[str]:
    """What keeps objectives from training together.

    Args:
        objectives: of one step.
        blocks: number of the transformer's.
        aligned: blocks whose reference tokens can be tapped.
    """
    for objective in objectives:
        name, taps = objective.name, objective.taps
        if not NAME.fullmatch(name) or name == "heads":
            yield f"objective {name!r}: a name has lowercase letters, digits and _ alone, and is not 'heads'"
        if beyond := set(taps.reference) - set(aligned):
            yield f"objective {name}: reference tokens of block {min(beyond)} are not captured, of {list(aligned)} are"
        if beyond := {block for block in taps.video if not 0 <= block < blocks}:
            yield f"objective {name}: video tokens of block {min(beyond)} are asked for, there are {blocks} blocks"
    for what, names in (
        ("objectives", [objective.name for objective in objectives]),
        ("logs of objectives", ["loss", "flow", *(log for objective in objectives for log in objective.logs)]),
    ):
        yield from (f"{what}: {name!r} is there {count} times" for name, count in Counter(names).items() if count > 1)
