"""What travels through training: one cached sample, one batch, the result of one step.

Shape letters: B batch, C latent channels, F latent frames, H and W latent height and width, H' and W' those of a
reference's canvas, M references (padded to the batch's largest number), S text tokens, D text width, V augmented
variants, h and w a teacher's grid, T its width.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch import Tensor, device, dtype


@dataclass
class CachedSample:
    """One manifest row after the frozen encoders have done their work.

    Attributes:
        key: the row's name, unique in its data set.
        latents: (C, F, H, W) normalised video latents.
        text: (S, D) prompt embedding; rows past the prompt's last token are zero.
        references: (V, M, C, H', W') normalised reference latents, one latent frame each.
        teacher: teacher id -> (V, M, h, w, T) features of the same reference images on the teacher's own grid.
        subjects: (M,) int64; equal numbers are views of one subject.
        tokens: (V, M, rows, columns) bool, True for a reference's tokens that show anything but white padding; None:
            all are kept.
    """

    key: str
    latents: Tensor
    text: Tensor
    references: Tensor
    teacher: dict[str, Tensor]
    subjects: Tensor
    tokens: Tensor | None = None


@dataclass
class Batch:
    """Samples of one shape, stacked; references padded to the largest number among them.

    Attributes:
        keys: B row names.
        latents: (B, C, F, H, W).
        text: (B, S, D).
        references: (B, C, M, H', W'); padding is zero.
        mask: (B, M) bool, True where a reference is real; real ones come first.
        subjects: (B, M) int64; -1 where padded.
        teacher: teacher id -> (B, M, h, w, T); padding is zero.
        tokens: (B, M, rows, columns) bool, True for the references' tokens that are kept, False where padded; None:
            all are.
        names: where each row stands in its manifest, for messages; empty where nobody asks.
        unreadable: rows in whose place others are here: place -> why they could not be read.
    """

    keys: list[str]
    latents: Tensor
    text: Tensor
    references: Tensor
    mask: Tensor
    subjects: Tensor
    teacher: dict[str, Tensor]
    tokens: Tensor | None = None
    names: list[str] = field(default_factory=list)
    unreadable: dict[str, str] = field(default_factory=dict)

    def to(self, device: device | str, dtype: dtype | None = None) -> Batch:
        """Move all tensors to `device`; floating point ones also to `dtype` when it is given."""
        move = lambda tensor: tensor.to(device, dtype) if tensor.is_floating_point() else tensor.to(device)  # noqa: E731
        return dataclasses.replace(
            self,
            latents=move(self.latents),
            text=move(self.text),
            references=move(self.references),
            mask=move(self.mask),
            subjects=move(self.subjects),
            teacher={name: move(features) for name, features in self.teacher.items()},
            tokens=None if self.tokens is None else move(self.tokens),
        )


@dataclass
class StepOutput:
    """Losses of one training step; all tensors are scalars, `loss` alone carries the graph.

    Attributes:
        loss: flow + η · mean over aligned blocks of (positive + λ · negative).
        flow: flow matching loss.
        positive: block index -> positive alignment term, averaged over teachers.
        negative: block index -> negative alignment term, averaged over teachers.
        cosine: block index -> mean cosine of projected reference tokens and their teacher targets, in [-1, 1].
        references: how many references were aligned.
    """

    loss: Tensor
    flow: Tensor
    positive: dict[int, Tensor] = field(default_factory=dict)
    negative: dict[int, Tensor] = field(default_factory=dict)
    cosine: dict[int, Tensor] = field(default_factory=dict)
    references: int = 0
