"""Reference alignment loss: reference tokens are pulled to their own teacher features and pushed off other subjects'.

Shape letters: M references, N tokens per reference, C teacher channels; `...` leading dimensions (blocks, batch).
Source: RefAlign (arXiv 2603.25743) and its released code.

With all cosines at once the negative term needs an (M·N)² matrix, several times over once autograd has kept its share.
Here each pair of references is a tile that lives as long as its two matrix products; value and gradient come out of
the same pass, and the backward pass only scales the gradient kept, which is as large as the student.
"""

from __future__ import annotations

import itertools
import math
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ..errors import UserError

SMALLEST_NORM = 1e-12
"""Vectors are divided by at least this, as in torch.nn.functional.normalize; shorter ones get no gradient."""

TILE_ELEMENTS = {"cpu": 2**21, "other": 2**24}
"""Cosines held at a time: on the CPU about what stays in cache, elsewhere enough to hide kernel launches."""


@dataclass(frozen=True)
class ReferenceAlignmentLoss:
    """Scalars of one alignment loss. `total` carries the gradient; the others are detached, for logging.

    Attributes:
        total: positive + negative_weight · negative.
        positive: mean hinge of the distance 1 − cos to a token's own teacher feature, in [0, 2].
        negative: mean hinge of `negative_margin` − (1 − cos) over tokens of different subjects, in [0, 2].
        cosine: mean cosine of tokens and their own teacher features over all real references; 0 without any.
    """

    total: Tensor
    positive: Tensor
    negative: Tensor
    cosine: Tensor


def reference_alignment_loss(
    student: Tensor,
    teacher: Tensor,
    positive_margin: float = 0.0,
    negative_margin: float = 1.0,
    negative_weight: float = 1.0,
    mask: Tensor | None = None,
    subjects: Tensor | None = None,
) -> ReferenceAlignmentLoss:
    """Contrastive alignment of projected reference tokens to frozen teacher features.

    positive: mean over m, n of max(0, 1 − cos(student[m, n], teacher[m, n]) − positive_margin).
    negative: mean over ordered pairs m ≠ m' of different subjects and over n, n' of
    max(0, negative_margin − (1 − cos(student[m, n], teacher[m', n']))); 0 without such a pair.
    Both are averaged over all leading samples; one without references counts 0, so that one process and many agree.

    Args:
        student: (..., M, N, C) projected reference tokens of any floating point type; float16 and bfloat16 are
            computed in float32.
        teacher: (..., M, N, C) targets; gets no gradient. Leading dimensions that are missing or 1 are broadcast.
        positive_margin: distance that costs nothing, in [0, 2].
        negative_margin: distance from which on other subjects cost nothing, in [0, 2].
        negative_weight: weight of the negative term in the total, at least 0.
        mask: (..., M) bool, True for a real reference, broadcast like the teacher; None: all are real.
        subjects: (..., M) integers, broadcast like the teacher; equal numbers are views of one subject, which keep
            their positive term and are no negatives of each other; None: all differ.

    Mask and subjects are read on the host: keep them on the CPU to spare a GPU the wait.

    Returns:
        ReferenceAlignmentLoss of float32 scalars (float64 for a float64 student); `total` can be differentiated once.

    Raises:
        UserError: a margin or weight out of range, or shapes and types that do not fit; in the backward pass, when
            that is to be differentiated in turn.
    """
    terms = _Terms(positive_margin, negative_margin, negative_weight)
    _check_types(student, teacher, mask, subjects)
    teacher = _broadcast("teacher", teacher.detach(), student.shape, 3)
    samples = _samples(student.shape[:-2], mask, subjects)
    if torch.is_grad_enabled() and student.requires_grad:
        return ReferenceAlignmentLoss(*_TiledLoss.apply(student, teacher, samples, terms))
    with torch.no_grad():
        return ReferenceAlignmentLoss(*_evaluate(student, teacher, samples, terms, None))


_Sample = dict[int, int]
"""Index of a real reference -> its subject."""


@dataclass(frozen=True)
class _Terms:
    positive_margin: float
    negative_margin: float
    negative_weight: float

    def __post_init__(self) -> None:
        for name in ("positive_margin", "negative_margin"):
            if not 0 <= getattr(self, name) <= 2:
                raise UserError(f"{name} must be in [0, 2], got {getattr(self, name)}")
        if not 0 <= self.negative_weight < math.inf:
            raise UserError(f"negative_weight must be at least 0 and finite, got {self.negative_weight}")


def _check_types(student: Tensor, teacher: Tensor, mask: Tensor | None, subjects: Tensor | None) -> None:
    for name, features in (("student", student), ("teacher", teacher)):
        if not features.is_floating_point():
            raise UserError(f"{name} must be of a floating point type, got {features.dtype}")
    if mask is not None and mask.dtype != torch.bool:
        raise UserError(f"mask must be of type torch.bool, got {mask.dtype}")
    if subjects is not None and (subjects.is_floating_point() or subjects.is_complex()):
        raise UserError(f"subjects must be integers, got {subjects.dtype}")
    if student.ndim < 3:
        raise UserError(f"student must have shape (..., references, tokens, channels), got {tuple(student.shape)}")


def _broadcast(name: str, values: Tensor, shape: torch.Size, own: int) -> Tensor:
    """`values` as `shape`, of which the last `own` dimensions must be there."""
    leading = zip(reversed(values.shape[:-own]), reversed(shape[:-own]), strict=False)
    fits = values.ndim <= len(shape) and values.shape[-own:] == shape[-own:]
    if not fits or any(size not in (1, wanted) for size, wanted in leading):
        raise UserError(
            f"{name} must have shape {tuple(shape)} to fit the student, leading dimensions may be missing or 1, "
            f"got {tuple(values.shape)}"
        )
    return values.expand(shape)


def _samples(shape: torch.Size, mask: Tensor | None, subjects: Tensor | None) -> list[_Sample]:
    """One entry per leading sample, row-major, for references of `shape` (..., M)."""
    mask = torch.ones(shape[-1], dtype=torch.bool) if mask is None else mask
    subjects = torch.arange(shape[-1]) if subjects is None else subjects
    mask, subjects = _broadcast("mask", mask, shape, 1), _broadcast("subjects", subjects, shape, 1)
    flat = math.prod(shape[:-1]), shape[-1]
    rows = zip(mask.reshape(flat).tolist(), subjects.reshape(flat).tolist(), strict=True)
    return [{m: row[m] for m, real in enumerate(reals) if real} for reals, row in rows]


class _TiledLoss(torch.autograd.Function):
    """Value and gradient in the forward pass; the backward pass scales the gradient."""

    @staticmethod
    def forward(
        ctx: Any, student: Tensor, teacher: Tensor, samples: list[_Sample], terms: _Terms
    ) -> tuple[Tensor, ...]:
        gradient = torch.zeros_like(student, memory_format=torch.contiguous_format)
        total, *logged = _evaluate(student, teacher, samples, terms, gradient)
        ctx.save_for_backward(gradient)
        ctx.mark_non_differentiable(*logged)
        return total, *logged

    @staticmethod
    def backward(ctx: Any, total: Tensor, *_: Tensor) -> tuple[Tensor | None, ...]:
        if torch.is_grad_enabled():
            raise UserError("reference_alignment_loss can be differentiated once only, got create_graph=True")
        (gradient,) = ctx.saved_tensors
        # Stored without the mean over samples and tokens, under which float16 would lose it.
        means = max(1, math.prod(gradient.shape[:-3])) * gradient.shape[-2]
        return gradient * (total / means), None, None, None


def _evaluate(
    student: Tensor, teacher: Tensor, samples: list[_Sample], terms: _Terms, gradient: Tensor | None
) -> tuple[Tensor, ...]:
    """Total, positive, negative and cosine over all samples; writes into `gradient` unless it is None."""
    sums = student.new_zeros(3, dtype=torch.promote_types(student.dtype, torch.float32))
    with torch.autocast(student.device.type, enabled=False):
        for index, sample in zip(itertools.product(*map(range, student.shape[:-3])), samples, strict=True):
            stored = None if gradient is None else gradient[index]
            sums += _evaluate_sample(student[index], teacher[index], sample, terms, stored)
    positive, negative, _ = (sums / max(1, len(samples))).unbind()
    cosine = sums[2] / max(1, sum(map(len, samples)))
    return positive + terms.negative_weight * negative, positive, negative, cosine


def _evaluate_sample(
    student: Tensor, teacher: Tensor, sample: _Sample, terms: _Terms, gradient: Tensor | None
) -> Tensor:
    """(3,) positive term, negative term and sum of cosines of one sample, whose features are (M, N, C)."""
    dtype, tokens = torch.promote_types(student.dtype, torch.float32), student.shape[1]
    targets = {m: _Target(teacher[m].to(dtype)) for m in sample}
    pairs = max(1, sum(a != b for a in sample.values() for b in sample.values()))
    sums = student.new_zeros(3, dtype=dtype)
    for m, subject in sample.items():
        unit, norm = _normalize(student[m].to(dtype))
        others = [targets[other] for other in sample if sample[other] != subject]
        cosine = (unit * targets[m].unit).sum(-1)
        hinge = (1 - terms.positive_margin - cosine).relu_()
        slope = None if gradient is None else torch.zeros_like(unit)
        repelled = _repel(unit, others, terms.negative_margin, slope if terms.negative_weight else None)
        sums += torch.stack([hinge.mean() / len(sample), repelled / (pairs * tokens**2), cosine.mean()])
        if gradient is not None and slope is not None:
            slope *= terms.negative_weight / (pairs * tokens)
            slope -= targets[m].unit * (hinge.sign_() / len(sample)).unsqueeze(-1)
            gradient[m] = _through_normalize(slope, unit, norm)
    return sums


def _repel(unit: Tensor, others: list[_Target], margin: float, slope: Tensor | None) -> Tensor:
    """Sum of the negative hinge between unit tokens (N, C) and all `others`; adds its gradient to `slope`."""
    total = unit.new_zeros(())
    tile = TILE_ELEMENTS.get(unit.device.type, TILE_ELEMENTS["other"])
    rows = math.ceil(unit.shape[0] / math.ceil(unit.shape[0] ** 2 / tile))
    for start in range(0, unit.shape[0], rows):
        for other in others:
            hinge = other.cosines(unit[start : start + rows]).sub_(1 - margin).relu_()
            total += hinge.sum()
            if slope is not None:
                slope[start : start + rows] += other.sums(hinge.sign_())
    return total


class _Target:
    """Teacher features (N, C) of one reference at unit length, and the two matrix products of a tile.

    On the CPU in float32 these go through oneDNN's layout, which torch.compile cannot trace: where oneDNN knows the
    processor better than MKL does (AMD with AVX-512), they take half the time.
    """

    def __init__(self, features: Tensor):
        self.unit = _normalize(features)[0]
        self.onednn = (
            features.device.type == "cpu"
            and features.dtype == torch.float32
            and torch.backends.mkldnn.is_available()
            and torch.backends.mkldnn.enabled
            and not torch.compiler.is_compiling()
        )

    @cached_property
    def _rows(self) -> Tensor:
        return self.unit.to_mkldnn() if self.onednn else self.unit

    @cached_property
    def _columns(self) -> Tensor:
        return self.unit.T.to_mkldnn() if self.onednn else self.unit.T

    def cosines(self, tokens: Tensor) -> Tensor:
        """(R, N) cosines with unit tokens (R, C)."""
        return self._linear(tokens, self._rows)

    def sums(self, active: Tensor) -> Tensor:
        """(R, C) sums of the features that `active` (R, N) of ones and zeros selects."""
        return self._linear(active, self._columns)

    def _linear(self, inputs: Tensor, weight: Tensor) -> Tensor:
        return F.linear(inputs.to_mkldnn(), weight).to_dense() if self.onednn else F.linear(inputs, weight)


def _normalize(features: Tensor) -> tuple[Tensor, Tensor]:
    """Features at unit length, and the length (..., 1) they were divided by."""
    norm = torch.linalg.vector_norm(features, dim=-1, keepdim=True).clamp_min_(SMALLEST_NORM)
    return features / norm, norm


def _through_normalize(slope: Tensor, unit: Tensor, norm: Tensor) -> Tensor:
    """Turn the gradient for unit vectors into that for the vectors they came from."""
    tangent = slope.sub_(unit * (unit * slope).sum(-1, keepdim=True)).div_(norm)
    return tangent.masked_fill_(norm <= SMALLEST_NORM, 0)
