"""What travels through training: one cached sample, one batch, the result of one step.

Shape letters: B batch, C latent channels, F latent frames, H and W latent height and width, H' and W' those of a
reference's canvas, M references (padded to the batch's largest number), S text tokens, D text width, V augmented
variants, h and w a teacher's grid, T its width.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import partial
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch import Tensor, device, dtype

EMBEDDING = "encoder_hidden_states"
"""What diffusers' transformers call the prompt's embeddings. What caches of one tensor of text held was these."""
REFERENCE = "reference"
"""Name of reference alignment among the objectives. What caches and checkpoints of one objective held was its."""


@dataclass
class CachedSample:
    """One manifest row after the frozen encoders have done their work.

    Attributes:
        key: the row's name, unique in its data set.
        latents: (C, F, H, W) normalised video latents.
        text: the transformer's argument -> what the text encoder made of the prompt, such as (S, D) embeddings.
        references: (V, M, C, H', W') normalised reference latents, one latent frame each; M may be 0.
        targets: objective -> teacher id -> what it is to be like. Of `of_references`, (V, M, …): reference alignment's
            are (V, M, h, w, T) features of the reference images on the teacher's own grid; of others one for the row.
        subjects: (M,) int64; equal numbers are views of one subject.
        tokens: (V, M, rows, columns) bool, True for a reference's tokens that show anything but white padding; None:
            all are kept.
        of_references: objectives that have a target for every reference; a row without references has none.
    """

    key: str
    latents: Tensor
    text: dict[str, Tensor]
    references: Tensor
    targets: dict[str, dict[str, Tensor]]
    subjects: Tensor
    tokens: Tensor | None = None
    of_references: frozenset[str] = frozenset({REFERENCE})


@dataclass
class Batch:
    """Samples of one shape, stacked; references padded to the largest number among them.

    Attributes:
        keys: B row names.
        latents: (B, C, F, H, W).
        text: the transformer's argument -> (B, …), such as (B, S, D) embeddings.
        references: (B, C, M, H', W'); padding is zero; M is 0 where no row has any.
        mask: (B, M) bool, True where a reference is real; real ones come first.
        subjects: (B, M) int64; -1 where padded.
        targets: objective -> teacher id -> (B, …), or (B, M, …) where every reference has one, as for reference
            alignment (B, M, h, w, T); padding is zero. With M = 0 there are none of these.
        tokens: (B, M, rows, columns) bool, True for the references' tokens that are kept, False where padded; None:
            all are.
        names: where each row stands in its manifest, for messages; empty where nobody asks.
        unreadable: rows in whose place others are here: place -> why they could not be read.
    """

    keys: list[str]
    latents: Tensor
    text: dict[str, Tensor]
    references: Tensor
    mask: Tensor
    subjects: Tensor
    targets: dict[str, dict[str, Tensor]]
    tokens: Tensor | None = None
    names: list[str] = field(default_factory=list)
    unreadable: dict[str, str] = field(default_factory=dict)

    def to(self, device: device | str, dtype: dtype | None = None) -> Batch:
        """Move all tensors to `device`; floating point ones also to `dtype` when it is given."""
        move = partial(moved, device=device, dtype=dtype)
        return dataclasses.replace(
            self,
            latents=move(self.latents),
            text=moved_text(self.text, device, dtype),
            references=move(self.references),
            mask=move(self.mask),
            subjects=move(self.subjects),
            targets={
                objective: {teacher: move(target) for teacher, target in targets.items()}
                for objective, targets in self.targets.items()
            },
            tokens=None if self.tokens is None else move(self.tokens),
        )


def moved(tensor: Tensor, device: device | str | None = None, dtype: dtype | None = None) -> Tensor:
    """On another device; a floating point one also in another type."""
    return tensor.to(device=device, dtype=dtype if tensor.is_floating_point() else None)


def moved_text(
    text: Mapping[str, Tensor], device: device | str | None = None, dtype: dtype | None = None
) -> dict[str, Tensor]:
    """Likewise, of all tensors of a text."""
    return {name: moved(tensor, device, dtype) for name, tensor in text.items()}


@dataclass
class StepOutput:
    """Losses of one training step; all tensors are scalars, `loss` alone carries the graph.

    Attributes:
        loss: flow + the objectives' losses, each times its weight.
        flow: flow matching loss.
        logs: name -> what an objective tells besides.
        counts: name -> over how many things that is a mean; of names that are not here, over samples.
    """

    loss: Tensor
    flow: Tensor
    logs: dict[str, Tensor] = field(default_factory=dict)
    counts: dict[str, int] = field(default_factory=dict)
