"""Does an adapter use its references? Held-out flow loss with the right, another sample's, swapped and no references.

They differ in nothing else: the same clip, caption, noise and sigma. Alignment plays no part.

Shape letters: B batch, C latent channels, F latent frames, M references, H and W latent height and width.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ..batch import CachedSample
from ..branch.reference_branch import ReferenceBranch
from ..data.cache.collate import collate
from ..errors import UserError
from ..flow import flow_loss, velocity_target
from .held_out import RowNoise, evaluating, predicted_velocity, rows_of_one_shape

SIGMAS = (0.25, 0.5, 0.75, 0.9)
CONDITIONS = ("true", "shuffled", "swapped", "none")
SIGNIFICANCE = 0.01


@dataclass(frozen=True)
class Sensitivity:
    """Held-out flow loss under four conditions, paired row by row.

    Attributes:
        true: mean loss with the row's own references.
        shuffled: mean loss with another row's references, as many of them.
        swapped: mean loss with the row's own references in another order, each one place on; as `true` where a row has
            one. Close to `true`, subjects are told apart by what they are and not by their place.
        none: mean loss without references, or with what the adapter's `null_reference` has in their place.
        n: rows.
        p_value: of a paired one-sided t-test that `true` is less than `shuffled`.
        rows: (n, 4) losses of each row, in the order above.
    """

    true: float
    shuffled: float
    swapped: float
    none: float
    n: int
    p_value: float
    rows: Tensor

    @property
    def p_value_none(self) -> float:
        """Likewise that `true` is less than `none`."""
        return paired_p_value(self.rows[:, 0], self.rows[:, 3])

    @property
    def uses_references(self) -> bool:
        """Whether the right references lower the loss, beyond doubt, against none and against another row's: those may
        do harm to a model that only takes them for a sign that subjects are to be seen."""
        lowest = self.true < min(self.shuffled, self.none)
        return lowest and max(self.p_value, self.p_value_none) < SIGNIFICANCE

    def to_dict(self) -> dict[str, Any]:
        """The summary as JSON types, without the rows."""
        return {name: getattr(self, name) for name in (*CONDITIONS, "n", "p_value", "p_value_none")}


@torch.no_grad()
def reference_sensitivity(
    branch: ReferenceBranch,
    samples: Sequence[CachedSample],
    *,
    sigmas: Sequence[float] = SIGMAS,
    seed: int = 0,
    batch_size: int = 8,
) -> Sensitivity:
    """Measure how much the right references lower the flow loss.

    Rows are paired with rows of the same shape and number of references; a row without such a partner, or without
    references, is left out. Noise depends on `seed` and the row alone, so that adapters can be compared.

    Args:
        branch: the adapter on its transformer.
        samples: held-out rows, the first variant of their references is used.
        sigmas: shares of noise in (0, 1]; a row's loss is the mean over them.
        seed: of pairing and noise.
        batch_size: rows at a time.

    Raises:
        UserError: fewer than two rows can be paired.
    """
    with evaluating(branch.transformer):
        rows = [
            loss
            for group in _groups(samples, seed)
            for start in range(0, len(group), batch_size)
            for loss in _batch_losses(branch, samples, group[start : start + batch_size], sigmas, seed)
        ]
    if len(rows) < 2:
        raise UserError(f"samples: at least 2 rows of one shape and number of references are needed, got {len(rows)}")
    losses = torch.stack(rows).double()
    true, shuffled, swapped, none = losses.mean(0).tolist()
    p_value = paired_p_value(losses[:, 0], losses[:, 1])
    return Sensitivity(true, shuffled, swapped, none, len(rows), p_value, losses)


def paired_p_value(smaller: Tensor, larger: Tensor) -> float:
    """One-sided p-value of the paired t-test that the mean of `smaller` (n,) is below that of `larger` (n,)."""
    from scipy.stats import ttest_rel

    if torch.equal(smaller, larger):  # the t-test divides 0 by 0
        return 1.0
    return float(ttest_rel(smaller.numpy(), larger.numpy(), alternative="less").pvalue)


def _groups(samples: Sequence[CachedSample], seed: int) -> Iterator[list[tuple[int, int]]]:
    """Lists of (row, row whose references it borrows), rows of one shape and number of references in each."""
    generator = torch.Generator().manual_seed(seed)
    for indices in rows_of_one_shape(samples):
        order = [indices[place] for place in torch.randperm(len(indices), generator=generator)]
        if len(order) > 1:
            yield list(zip(order, [*order[1:], order[0]], strict=True))


def _batch_losses(
    branch: ReferenceBranch,
    samples: Sequence[CachedSample],
    pairs: list[tuple[int, int]],
    sigmas: Sequence[float],
    seed: int,
) -> Tensor:
    """(B, 4) losses, in the order of `CONDITIONS`."""
    device = next(branch.transformer.parameters()).device
    batch = collate([samples[row] for row, _ in pairs]).to(device)
    other = collate([samples[row] for _, row in pairs]).to(device)
    noises = RowNoise([row for row, _ in pairs], seed)
    swapped = dataclasses.replace(
        batch,
        references=batch.references.roll(1, 2),
        tokens=None if batch.tokens is None else batch.tokens.roll(1, 1),
    )
    conditions = (batch, other, swapped, None)
    losses = torch.zeros(len(pairs), len(conditions))
    for sigma in sigmas:
        noise = noises.like(batch.latents)
        target = velocity_target(batch.latents.float(), noise)
        for place, source in enumerate(conditions):
            prediction = predicted_velocity(branch, batch, source, noise, sigma)
            losses[:, place] += flow_loss(prediction, target).cpu() / len(sigmas)
    return losses
