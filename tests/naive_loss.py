"""The alignment loss as its formula reads, and what its tests draw, hide and measure.

Shape letters: M references, N tokens per reference, C channels.
"""

import itertools

import torch
import torch.nn.functional as F
from torch.utils._python_dispatch import TorchDispatchMode

from refalign_adapter.alignment.reference.loss import reference_alignment_loss


def draw(*shape, seed=0, dtype=torch.float64):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


def naive_sample(student, teacher, positive_margin, negative_margin, mask, subjects, tokens):
    """Positive and negative of one sample (M, N, C), written as the formula reads."""
    real = [m for m in range(len(mask)) if mask[m] and tokens[m].any()]
    student, teacher = (
        [F.normalize(features[m][tokens[m]], dim=-1) for m in range(len(mask))] for features in (student, teacher)
    )
    zero = sum(features.sum() for features in student) * 0
    positive = [F.relu(1 - (student[m] * teacher[m]).sum(-1) - positive_margin).mean() for m in real]
    negative = [
        F.relu(negative_margin - (1 - student[a] @ teacher[b].T)).mean()
        for a, b in itertools.permutations(real, 2)
        if subjects[a] != subjects[b]
    ]
    mean = lambda terms: torch.stack(terms).mean() if terms else zero  # noqa: E731
    return mean(positive), mean(negative)


def naive(
    student,
    teacher,
    positive_margin=0.0,
    negative_margin=1.0,
    negative_weight=1.0,
    mask=None,
    subjects=None,
    tokens=None,
):
    """Total, positive and negative over all leading samples."""
    leading, references, count = student.shape[:-3], student.shape[-3], student.shape[-2]
    mask = torch.ones(references, dtype=torch.bool) if mask is None else mask
    subjects = torch.arange(references) if subjects is None else subjects
    tokens = torch.ones(references, count, dtype=torch.bool) if tokens is None else tokens
    tensors = (
        student.flatten(0, -4) if leading else student[None],
        teacher.expand(student.shape).reshape(-1, *student.shape[-3:]),
        mask.expand(*leading, references).reshape(-1, references),
        subjects.expand(*leading, references).reshape(-1, references),
        tokens.expand(*leading, references, count).reshape(-1, references, count),
    )
    terms = [
        torch.stack(naive_sample(one, other, positive_margin, negative_margin, real.tolist(), ids.tolist(), counts))
        for one, other, real, ids, counts in zip(*tensors, strict=True)
    ]
    positive, negative = torch.stack(terms).mean(0)
    return positive + negative_weight * negative, positive, negative


def assert_equals_naive(student, teacher, tolerance=1e-12, **options):
    """Values and gradient of the student, in float64."""
    ours, theirs = student.clone().requires_grad_(), student.clone().requires_grad_()
    loss = reference_alignment_loss(ours, teacher, **options)
    expected = naive(theirs, teacher, **options)
    for value, wanted in zip((loss.total, loss.positive, loss.negative), expected, strict=True):
        torch.testing.assert_close(value, wanted, rtol=tolerance, atol=tolerance, check_dtype=False)
    (3.0 * loss.total).backward()
    (3.0 * expected[0]).backward()
    torch.testing.assert_close(ours.grad, theirs.grad, rtol=tolerance, atol=tolerance)


MASK = torch.tensor([[True, True, True], [True, False, True], [True, False, False], [False, False, False]])
SUBJECTS = torch.tensor([[0, 1, 0], [5, 5, 7], [2, 3, 3], [1, 1, 1]])
TOKENS = torch.rand(4, 3, 5, generator=torch.Generator().manual_seed(2)) < 0.5
TOKENS[0] = torch.tensor([[True] * 5, [False, True, False, True, True], [False, False, True, False, False]])
TOKENS[1, 2], TOKENS[2] = False, True
"""All tokens count, some, one, none; of all references in one sample."""


class LargestTensor(TorchDispatchMode):
    """Records the largest number of elements that any operation puts out."""

    def __init__(self):
        super().__init__()
        self.elements = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        for value in out if isinstance(out, (tuple, list)) else [out]:
            if isinstance(value, torch.Tensor):
                self.elements = max(self.elements, value.numel())
        return out
