"""Reference alignment loss: reference tokens are pulled to their own teacher features and pushed off other subjects'.

Shape letters: M references, N tokens per reference, n those of them that count, C teacher channels; `...` leading
dimensions (blocks, batch).
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

from ...errors import UserError

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
    tokens: Tensor | None = None,
) -> ReferenceAlignmentLoss:
    """Contrastive alignment of projected reference tokens to frozen teacher features.

    positive: mean over m, n of max(0, 1 − cos(student[m, n], teacher[m, n]) − positive_margin).
    negative: mean over ordered pairs m ≠ m' of different subjects and over n, n' of
    max(0, negative_margin − (1 − cos(student[m, n], teacher[m', n']))); 0 without such a pair.
    Means over n and n' are taken within each reference or pair, so that with `tokens` every reference weighs the same.
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
        tokens: (..., M, N) bool, True for a token that counts, broadcast like the teacher; others get no gradient, and
            a reference without any is as one that the mask leaves out; None: all count.

    Mask, subjects and tokens are read on the host: keep them on the CPU to spare a GPU the wait.

    Returns:
        ReferenceAlignmentLoss of float32 scalars (float64 for a float64 student); `total` can be differentiated once.

    Raises:
        UserError: a margin or weight out of range, or shapes and types that do not fit; in the backward pass, when
            that is to be differentiated in turn.
    """
    terms = _Terms(positive_margin, negative_margin, negative_weight)
    _check_types(student, teacher, mask, subjects, tokens)
    teacher = _broadcast("teacher", teacher.detach(), student.shape, 3)
    samples = _samples(student, mask, subjects, tokens)
    if torch.is_grad_enabled() and student.requires_grad:
        return ReferenceAlignmentLoss(*_TiledLoss.apply(student, teacher, samples, terms))
    with torch.no_grad():
        return ReferenceAlignmentLoss(*_evaluate(student, teacher, samples, terms, None))


@dataclass(frozen=True)
class _Reference:
    """A real reference of a sample.

    Attributes:
        subject: equal numbers are views of one subject.
        tokens: (n,) int64, which of its tokens count; None: all N.
    """

    subject: int
    tokens: Tensor | None = None

    def of(self, features: Tensor) -> Tensor:
        """The rows of (N, C) features that count."""
        return features if self.tokens is None else features.index_select(0, self.tokens)

    def write(self, values: Tensor, features: Tensor) -> None:
        """Put `values` (n, C) into the rows of (N, C) features that count."""
        if self.tokens is None:
            features.copy_(values)
        else:
            features.index_copy_(0, self.tokens, values.to(features.dtype))


_Sample = dict[int, _Reference]
"""A sample's real references by their index."""


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


def _check_types(
    student: Tensor, teacher: Tensor, mask: Tensor | None, subjects: Tensor | None, tokens: Tensor | None
) -> None:
    for name, features in (("student", student), ("teacher", teacher)):
        if not features.is_floating_point():
            raise UserError(f"{name} must be of a floating point type, got {features.dtype}")
    for name, shown in (("mask", mask), ("tokens", tokens)):
        if shown is not None and shown.dtype != torch.bool:
            raise UserError(f"{name} must be of type torch.bool, got {shown.dtype}")
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


def _samples(student: Tensor, mask: Tensor | None, subjects: Tensor | None, tokens: Tensor | None) -> list[_Sample]:
    """One entry per leading sample of the student (..., M, N, C), row-major."""
    shape, count = student.shape[:-2], student.shape[-3]
    mask = torch.ones(count, dtype=torch.bool) if mask is None else mask
    subjects = torch.arange(count) if subjects is None else subjects
    mask, subjects = _broadcast("mask", mask, shape, 1), _broadcast("subjects", subjects, shape, 1)
    counting: list[Tensor | None] = [None] * math.prod(shape)
    if tokens is not None:
        tokens = _broadcast("tokens", tokens, student.shape[:-1], 2).cpu()
        mask, counting = mask.cpu() & tokens.any(-1), _counting(tokens, student.device)
    real = mask.reshape(-1).tolist()
    references = list(map(_Reference, subjects.reshape(-1).tolist(), counting))
    starts = [sample * count for sample in range(math.prod(shape[:-1]))]
    return [{m: references[start + m] for m in range(count) if real[start + m]} for start in starts]


def _counting(tokens: Tensor, device: torch.device) -> list[Tensor | None]:
    """Indices on `device` of the tokens (..., M, N) that count, reference by reference; None where all N do."""
    rows = tokens.flatten(0, -2)
    numbers = rows.sum(-1).tolist()
    indices = rows.nonzero()[:, 1].to(device).split(numbers)
    return [None if number == rows.shape[1] else own for number, own in zip(numbers, indices, strict=True)]


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
        # Stored without the mean over samples and N tokens, under which float16 would lose it.
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
    targets = {m: _Target(reference.of(teacher[m]).to(dtype), tokens) for m, reference in sample.items()}
    subjects = {m: reference.subject for m, reference in sample.items()}
    pairs = max(1, sum(a != b for a in subjects.values() for b in subjects.values()))
    sums = student.new_zeros(3, dtype=dtype)
    for m, reference in sample.items():
        unit, norm = _normalize(reference.of(student[m]).to(dtype))
        own = unit.shape[0]
        others = [targets[other] for other in sample if subjects[other] != subjects[m]]
        cosine = (unit * targets[m].unit).sum(-1)
        hinge = (1 - terms.positive_margin - cosine).relu_()
        slope = None if gradient is None else torch.zeros_like(unit)
        repelled = _repel(unit, others, terms.negative_margin, slope if terms.negative_weight else None)
        sums += torch.stack([hinge.mean() / len(sample), repelled / (pairs * own * tokens), cosine.mean()])
        if gradient is not None and slope is not None:
            slope *= terms.negative_weight / (pairs * own)
            slope -= targets[m].unit * (hinge.sign_() / (len(sample) * own / tokens)).unsqueeze(-1)
            reference.write(_through_normalize(slope, unit, norm), gradient[m])
    return sums


def _repel(unit: Tensor, others: list[_Target], margin: float, slope: Tensor | None) -> Tensor:
    """Sum of the negative hinge between unit tokens (n, C) and all `others`, each by its weight.

    Adds its gradient to `slope`.
    """
    total = unit.new_zeros(())
    tile = TILE_ELEMENTS.get(unit.device.type, TILE_ELEMENTS["other"])
    largest = max((other.unit.shape[0] for other in others), default=1)
    rows = math.ceil(unit.shape[0] / math.ceil(unit.shape[0] * largest / tile))
    for start in range(0, unit.shape[0], rows):
        for other in others:
            hinge = other.cosines(unit[start : start + rows]).sub_(1 - margin).relu_()
            total.add_(hinge.sum(), alpha=other.weight)
            if slope is not None:
                slope[start : start + rows].add_(other.sums(hinge.sign_()), alpha=other.weight)
    return total


class _Target:
    """Teacher features (n, C) of one reference at unit length, and the two matrix products of a tile.

    `weight`, N / n, makes a sum over its tokens count as much as that of a reference with all N.

    On the CPU in float32 the products go through oneDNN's layout, which torch.compile cannot trace: where oneDNN knows
    the processor better than MKL does (AMD with AVX-512), they take half the time.
    """

    def __init__(self, features: Tensor, tokens: int):
        self.unit = _normalize(features)[0]
        self.weight = tokens / features.shape[0]
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
