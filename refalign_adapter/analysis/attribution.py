"""Which reference does the model use for which subject? The flow loss inside a subject when a reference is replaced.

Replaced by another look of its kind, a subject's own reference should be missed inside the subject (use), and nobody
else's should (confusion). Conditions differ in nothing else: the same clip, caption, noise and sigma.

Shape letters: N clips, M references and subjects of a clip, B batch, C latent channels, F latent frames, H and W
latent height and width, H' and W' those of a reference's canvas.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
import torch
from torch import Tensor

from ..batch import Batch, CachedSample
from ..branch.reference_branch import ReferenceBranch
from ..data.cache.collate import collate
from ..errors import ConfigError, UserError
from ..flow import velocity_target
from .bootstrap import bootstrap_interval
from .estimate import Estimate, mean, void
from .held_out import RowNoise, evaluating, predicted_velocity, rows_of_one_shape
from .results import Result
from .shapes import require_finite, require_shapes

SIGMAS = (0.7, 0.9)


@dataclass(frozen=True, eq=False)
class Attribution(Result):
    """Rises of the flow loss, with intervals of a bootstrap over clips.

    Attributes:
        matrix: M rows of M; row i, column j: mean rise inside subject i when reference j is replaced.
        use: mean of the diagonal; chance 0.
        confusion: mean off the diagonal over mean on it. Void with M = 1, and where `use` is not above 0 beyond doubt:
            what is not used is not confused.
        rises: (N, M, M) of each clip, in the order given, for paired comparisons of adapters.
    """

    matrix: tuple[tuple[Estimate, ...], ...]
    use: Estimate
    confusion: Estimate
    rises: np.ndarray = field(repr=False)


def attribution(losses: np.ndarray, replaced: np.ndarray, *, seed: int = 0) -> Attribution:
    """Attribution from flow losses.

    Args:
        losses: (N, M) inside each subject's mask, with the right references.
        replaced: (N, M, M) inside subject i's mask with reference j replaced.
        seed: of the bootstrap.

    Raises:
        UserError: shapes that do not fit, or losses that are not finite.
    """
    losses, replaced = np.asarray(losses, dtype=float), np.asarray(replaced, dtype=float)
    require_shapes("losses N M, replaced N M M", losses, replaced)
    require_finite("losses", losses)
    require_finite("replaced", replaced)
    rises = replaced - losses[:, :, None]
    subjects = range(losses.shape[1])
    matrix = tuple(tuple(mean(rises[:, i, j], seed=seed) for j in subjects) for i in subjects)
    own = rises.diagonal(axis1=1, axis2=2).mean(1)
    others = rises[:, ~np.eye(len(subjects), dtype=bool)]
    use = dataclasses.replace(mean(own, seed=seed), chance=0.0)
    confusion = _confusion(own, others.mean(1), use, seed) if len(subjects) > 1 else void()
    return Attribution(matrix, use, confusion, rises)


@torch.no_grad()
def reference_attribution(
    branch: ReferenceBranch,
    samples: Sequence[CachedSample],
    masks: Sequence[Tensor | np.ndarray],
    replacements: Sequence[Tensor],
    *,
    replacement_tokens: Sequence[Tensor] | None = None,
    sigmas: Sequence[float] = SIGMAS,
    seed: int = 0,
    batch_size: int = 8,
) -> dict[int, Attribution]:
    """Measure attribution on held-out rows.

    Left out are rows without references, with two references of one subject, or with a subject whose mask is empty.
    Noise depends on `seed` and the row alone, so that adapters can be compared.

    An untrained adapter is not at 0: the base's attention reads references too, if with little use for them.

    Args:
        branch: the adapter on its transformer.
        samples: held-out rows, the first variant of their references is used.
        masks: of each row, (M, F, H, W) bool on the latents' grid, see `latent_masks`.
        replacements: of each row, (M, C, H', W') latents of other references of the same kinds.
        replacement_tokens: of each row, (M, rows, columns) bool as in `CachedSample`; needed where samples have
            tokens.
        sigmas: shares of noise in (0, 1]; a row's loss is the mean over them.
        seed: of noise and bootstrap.
        batch_size: rows at a time.

    Returns:
        Number of references M -> attribution of the rows with so many, in the order of `samples`.

    Raises:
        UserError: arguments that do not go together, all at once, or no row left.
    """
    _require_together(samples, masks, replacements, replacement_tokens)
    tokens = replacement_tokens or [None] * len(samples)
    cases = [
        _Case(
            row, sample, _with_references(sample, replacements[row], tokens[row]), torch.as_tensor(masks[row]).bool()
        )
        for row, sample in enumerate(samples)
    ]
    cases = [case for case in cases if _says_something(case)]
    losses: dict[int, Tensor] = {}
    with evaluating(branch.transformer):
        for group in rows_of_one_shape([case.sample for case in cases]):
            for start in range(0, len(group), batch_size):
                part = [cases[place] for place in group[start : start + batch_size]]
                losses.update(zip((case.row for case in part), _losses(branch, part, sigmas, seed), strict=True))
    if not losses:
        raise UserError("samples: no row has references, each of a subject of its own, with masks that are not empty")
    return {count: _of_rows(rows, seed) for count, rows in _by_count(losses).items()}


@dataclass(frozen=True)
class _Case:
    """A row, the same one with other references, and masks (M, F, H, W)."""

    row: int
    sample: CachedSample
    other: CachedSample
    mask: Tensor


def _says_something(case: _Case) -> bool:
    alone = len(case.sample.subjects.unique()) == len(case.sample.subjects)
    return alone and bool(case.mask.flatten(1).any(1).all())


def _losses(branch: ReferenceBranch, cases: Sequence[_Case], sigmas: Sequence[float], seed: int) -> Tensor:
    """(B, 1 + M, M) losses inside each subject: with the right references, then with each replaced in turn."""
    device = next(branch.transformer.parameters()).device
    batch = collate([case.sample for case in cases]).to(device)
    other = collate([case.other for case in cases]).to(device)
    masks = torch.stack([case.mask for case in cases]).to(device)
    conditions = [batch, *(_replaced(batch, other, place) for place in range(masks.shape[1]))]
    noises = RowNoise([case.row for case in cases], seed)
    losses = torch.zeros(len(cases), len(conditions), masks.shape[1], dtype=torch.float64)
    for sigma in sigmas:
        noise = noises.like(batch.latents)
        target = velocity_target(batch.latents.float(), noise)
        for place, source in enumerate(conditions):
            prediction = predicted_velocity(branch, batch, source, noise, sigma)
            losses[:, place] += _loss_inside(prediction, target, masks).double().cpu() / len(sigmas)
    return losses


def _replaced(batch: Batch, other: Batch, place: int) -> Batch:
    """The batch with the reference at one place taken from another."""
    references = batch.references.clone()
    references[:, :, place] = other.references[:, :, place]
    if batch.tokens is None or other.tokens is None:
        return dataclasses.replace(batch, references=references)
    tokens = batch.tokens.clone()
    tokens[:, place] = other.tokens[:, place]
    return dataclasses.replace(batch, references=references, tokens=tokens)


def _loss_inside(prediction: Tensor, target: Tensor, masks: Tensor) -> Tensor:
    """(B, M) mean squared error of (B, C, F, H, W) inside masks (B, M, F, H, W)."""
    errors = (prediction.float() - target).square().mean(1, keepdim=True)
    return (errors * masks).flatten(2).sum(2) / masks.flatten(2).sum(2)


def _with_references(sample: CachedSample, references: Tensor, tokens: Tensor | None) -> CachedSample:
    return dataclasses.replace(sample, references=references[None], tokens=None if tokens is None else tokens[None])


def _by_count(losses: dict[int, Tensor]) -> dict[int, np.ndarray]:
    """Number of references M -> (N, 1 + M, M), rows in order."""
    groups: dict[int, list[Tensor]] = {}
    for row in sorted(losses):
        groups.setdefault(losses[row].shape[1], []).append(losses[row])
    return {count: torch.stack(groups[count]).numpy() for count in sorted(groups)}


def _of_rows(rows: np.ndarray, seed: int) -> Attribution:
    return attribution(rows[:, 0], rows[:, 1:].transpose(0, 2, 1), seed=seed)


def _ratio(totals: np.ndarray) -> np.ndarray:
    """First over second of totals (..., 2); beyond all bounds where the second is not positive."""
    others, own = totals[..., 0], totals[..., 1]
    return np.divide(others, own, out=np.full(own.shape, np.inf), where=own > 0)


def _confusion(own: np.ndarray, others: np.ndarray, use: Estimate, seed: int) -> Estimate:
    """Of mean rises (N,) on and off the diagonal."""
    if not use.low > 0:  # NaN too: of one clip
        return void()
    rows = np.stack([others, own], axis=1)
    low, high = bootstrap_interval(rows, np.arange(len(rows)), _ratio, seed=seed)
    return Estimate(float(_ratio(rows.sum(0))), low, high, len(rows))


def _require_together(
    samples: Sequence[CachedSample],
    masks: Sequence[Tensor | np.ndarray],
    replacements: Sequence[Tensor],
    tokens: Sequence[Tensor] | None,
) -> None:
    """ConfigError with all that does not fit."""
    given = {"masks": masks, "replacements": replacements, "replacement_tokens": tokens}
    problems = [
        f"{name} must be one for each of {len(samples)} samples, got {len(values)}"
        for name, values in given.items()
        if values is not None and len(values) != len(samples)
    ]
    if problems:
        raise ConfigError(problems)
    for row, sample in enumerate(samples):
        wanted = {
            "masks": (len(sample.subjects), *sample.latents.shape[1:]),
            "replacements": sample.references.shape[1:],
        }
        if sample.tokens is not None:
            wanted["replacement_tokens"] = sample.tokens.shape[1:]
        for name, shape in wanted.items():
            values = given[name]
            got = None if values is None else tuple(values[row].shape)
            if got != tuple(shape):
                problems.append(f"{name}[{row}] must be {tuple(shape)}, got {got}")
    if problems:
        raise ConfigError(problems)
