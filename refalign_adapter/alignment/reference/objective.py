"""Reference alignment as an objective: references' tokens after every aligned block, pulled towards what teachers see.

Shape letters: B batch, M references, N tokens per reference, h and w a teacher's grid, C its width.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from ...batch import REFERENCE, Batch
from ...grids import resample_grid
from ..objective import Context, Features, Objective, ObjectiveOutput, Taps
from ..projector import Projectors
from ..schedule import AlignmentSchedule, timestep_gate
from .allocations import AllocatedLoss
from .loss import reference_alignment_loss


@dataclass(frozen=True)
class ReferenceOptions:
    """What the alignment of references weighs.

    Attributes:
        positive_margin, negative_margin, negative_weight: see `reference_alignment_loss`.
        timestep_gate: power p of the factor sigma^p on a sample's term; None: no factor. The released code has 3, the
            paper's text does not mention it.
    """

    positive_margin: float = 0.0
    negative_margin: float = 1.0
    negative_weight: float = 1.0
    timestep_gate: float | None = None


class ReferenceAlignment(Objective):
    """Mean alignment loss over aligned blocks and teachers (RefAlign, arXiv 2603.25743).

    Its logs: `positive` and `negative`, means over blocks and teachers in which samples without references count 0,
    and per block `cosine/block_{index}`, a mean over references.

    Args:
        projectors: a head per aligned block and teacher.
        options: see `ReferenceOptions`.
        schedule: of η.
    """

    section = "alignment"

    def __init__(
        self,
        projectors: Projectors,
        options: ReferenceOptions | None = None,
        schedule: AlignmentSchedule | None = None,
    ):
        super().__init__(schedule or AlignmentSchedule())
        self.name = REFERENCE
        self.projectors, self.options = projectors, options or ReferenceOptions()
        self.taps = Taps(reference=projectors.blocks)
        self.targets = dict(projectors.teachers)
        self.logs = ("positive", "negative", *(f"cosine/block_{block}" for block in projectors.blocks))

    @property
    def weight_name(self) -> str:
        return "alignment_weight"

    @property
    def heads(self) -> nn.Module:
        return self.projectors

    def without_data(self) -> ReferenceAlignment:
        return _WithoutData(self.projectors, self.options, self.schedule)

    def loss(self, features: Features, batch: Batch, context: Context) -> ObjectiveOutput:
        if not features.reference:
            return ObjectiveOutput(self.nothing(), {"positive": torch.zeros(()), "negative": torch.zeros(())})
        targets = {
            name: resample_grid(target, context.reference_grid).flatten(2, 3).to(batch.references.device)
            for name, target in batch.targets[self.name].items()
        }
        gate = timestep_gate(context.sigmas, self.options.timestep_gate)
        # The loss reads these on the host, every time.
        shown = {"mask": context.aligned.cpu(), "subjects": batch.subjects.cpu()}
        if batch.tokens is not None:
            shown["tokens"] = batch.tokens.flatten(2).cpu()
        totals, means = [], {}
        for block, students in self.projectors(features.reference).items():
            parts = [self._block_loss(student, targets[name], shown, gate) for name, student in students.items()]
            totals += [part[0] for part in parts]
            means[block] = torch.stack([torch.stack(part[1:]) for part in parts]).mean(0)
        logs = self._logs(means)
        counts = dict.fromkeys(self.logs[2:], int(shown["mask"].sum()))
        return ObjectiveOutput(torch.stack(totals).mean(), logs, counts)

    def _logs(self, means: dict[int, Tensor]) -> dict[str, Tensor]:
        """Logs of (positive, negative, cosine) by block."""
        positive, negative, cosine = (torch.stack(list(part)) for part in zip(*means.values(), strict=True))
        return {
            "positive": positive.mean(),
            "negative": negative.mean(),
            **dict(zip(self.logs[2:], cosine, strict=True)),
        }

    def _block_loss(
        self, student: Tensor, target: Tensor, shown: dict[str, Tensor], gate: Tensor
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """(total, positive, negative, cosine) of one block and teacher; a sample's total is multiplied by its gate.

        `shown` holds the loss's mask, subjects and, where some are left out, tokens.
        """
        options = self.options
        margins = (options.positive_margin, options.negative_margin, options.negative_weight)
        if options.timestep_gate is None:
            loss = reference_alignment_loss(student, target, *margins, **shown)
            return loss.total, loss.positive, loss.negative, loss.cosine
        losses = [
            reference_alignment_loss(
                student[i], target[i], *margins, **{name: values[i] for name, values in shown.items()}
            )
            for i in range(len(student))
        ]
        total = torch.stack([loss.total for loss in losses]) @ gate.to(losses[0].total)
        names = ("positive", "negative", "cosine")
        positive, negative, cosine = (torch.stack([getattr(loss, name) for loss in losses]).mean() for name in names)
        return total / len(losses), positive, negative, cosine


class _WithoutData(ReferenceAlignment):
    """Reference alignment with a loss that computes nothing."""

    def _block_loss(
        self, student: Tensor, target: Tensor, shown: dict[str, Tensor], gate: Tensor
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        total: Any = AllocatedLoss.apply(student, target)
        return total, total.detach(), total.detach(), total.detach()
