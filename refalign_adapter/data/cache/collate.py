"""Samples stacked into a batch.

Shape letters: B batch, V augmented variants, M references.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import pad

from ...batch import Batch, CachedSample
from ...errors import UserError
from .entries import REMEDY


def collate(samples: Sequence[CachedSample], *, variants: Sequence[int] | None = None) -> Batch:
    """Stack samples of one shape; references are padded at the end to the largest number among them.

    Args:
        samples: at least one.
        variants: a number per sample that chooses among its V augmented variants (taken modulo V); None: the first.

    Raises:
        UserError: tensors of the samples do not go together, which no cache run makes.
    """
    _require_alike(samples)
    most = max(len(sample.subjects) for sample in samples)
    counts = torch.tensor([len(sample.subjects) for sample in samples])
    choices = [0] * len(samples) if variants is None else list(variants)
    shown = _Shown(samples, choices, most)
    # Without any reference in the batch, the empty ones of all rows are as large as the video.
    references = shown.stack(lambda sample: sample.references, of_all=most == 0)
    tokens = any(sample.tokens is not None for sample in samples)
    return Batch(
        keys=[sample.key for sample in samples],
        latents=torch.stack([sample.latents for sample in samples]),
        text={name: torch.stack([sample.text[name] for sample in samples]) for name in samples[0].text},
        references=references.transpose(1, 2).contiguous(),
        mask=torch.arange(most) < counts[:, None],
        subjects=torch.stack([padded(sample.subjects, most, -1) for sample in samples]),
        targets=_stacked_targets(samples, shown),
        tokens=shown.stack(lambda sample: sample.tokens) if tokens else None,
    )


@dataclass(frozen=True)
class _Shown:
    """What samples show of their references.

    Attributes:
        samples: of one batch.
        variants: which version of each sample's, modulo V.
        most: M of the batch.
    """

    samples: Sequence[CachedSample]
    variants: Sequence[int]
    most: int

    def stack(self, of: Callable[[CachedSample], Any], of_all: bool = False) -> Tensor:
        """(B, M, …) of tensors (V, M, …), which rows without references have only where it is said `of_all`."""
        given = [of(sample) if of_all or len(sample.subjects) else None for sample in self.samples]
        like = next(tensor for tensor in given if tensor is not None)
        each = [like.new_zeros(1, 0, *like.shape[2:]) if tensor is None else tensor for tensor in given]
        chosen = [tensor[number % len(tensor)] for tensor, number in zip(each, self.variants, strict=True)]
        return torch.stack([padded(tensor, self.most) for tensor in chosen])


def _stacked_targets(samples: Sequence[CachedSample], shown: _Shown) -> dict[str, dict[str, Tensor]]:
    """Objective -> teacher id -> targets; a batch without references has none of theirs."""
    fullest = max((sample.targets for sample in samples), key=len)
    return {
        objective: {
            teacher: shown.stack(partial(_target, objective, teacher))
            if objective in samples[0].of_references
            else torch.stack([_target(objective, teacher, sample) for sample in samples])
            for teacher in teachers
        }
        for objective, teachers in fullest.items()
    }


def _target(objective: str, teacher: str, sample: CachedSample) -> Tensor:
    return sample.targets[objective][teacher]


def _require_alike(samples: Sequence[CachedSample]) -> None:
    """References' canvases and targets' grids follow from a row's size, so rows that share a batch have the same."""
    first, some = samples[0], [sample for sample in samples if len(sample.subjects)]
    pairs = [(_of_row(sample), _of_row(first), sample, first) for sample in samples[1:]]
    pairs += [(_of_reference(sample), _of_reference(some[0]), sample, some[0]) for sample in some[1:]]
    for ours, others, sample, other in pairs:
        if ours != others:
            raise UserError(
                f"cache: rows {sample.key[:12]} and {other.key[:12]} have references or features of different sizes; "
                f"delete the cache and {REMEDY}"
            )


def _of_row(sample: CachedSample) -> list[Any]:
    """What of a row every other one has likewise."""
    shapes = [
        (objective, teacher, target.shape)
        for objective, targets in sample.targets.items()
        if objective not in sample.of_references
        for teacher, target in targets.items()
    ]
    return [sample.latents.shape, {name: text.shape for name, text in sample.text.items()}, *shapes]


def _of_reference(sample: CachedSample) -> list[Any]:
    """What of a row every other one that has references has likewise."""
    shapes = [
        (objective, teacher, target.shape[2:])
        for objective, targets in sample.targets.items()
        if objective in sample.of_references
        for teacher, target in targets.items()
    ]
    tokens = None if sample.tokens is None else sample.tokens.shape[2:]
    return [sample.references.shape[2:], tokens, *shapes]


def padded(tensor: Tensor, length: int, value: int = 0) -> Tensor:
    """(length, ...) with `value` after the tensor's own entries on its first axis; longer ones are cut."""
    missing = length - len(tensor)
    if missing <= 0:
        return tensor[:length]
    return pad(tensor, [0, 0] * (tensor.ndim - 1) + [0, missing], value=value)
