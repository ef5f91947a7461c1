"""Steps whose loss or gradient is no number: which rows they saw, and what that calls for when it goes on."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import gather_object

from ..batch import CachedSample
from ..data.cache.dataset import CachedDataset
from ..errors import UserError
from .interrupt import largest

SHOWN = 8
"""Rows that a line names."""
Seen = Sequence[tuple[list[str], torch.Tensor]]
"""A process's batches of one step: their rows' keys, and the loss."""


@dataclass(frozen=True)
class BadStep:
    """One step that was skipped.

    Attributes:
        step: its number.
        rows: what the rows of its batches are called, on all processes; where a loss is no number, of those alone.
        in_cache: those among them whose cached values are no numbers themselves.
    """

    step: int
    rows: tuple[str, ...]
    in_cache: tuple[str, ...]


@dataclass
class BadSteps:
    """Skipped steps in a row.

    Args:
        limit: how many end the run.
    """

    limit: int
    steps: list[BadStep] = field(default_factory=list)

    def clear(self) -> None:
        """A step was fine."""
        self.steps.clear()

    def add(self, bad: BadStep, newest: Callable[[], str | None]) -> str:
        """Note one; returns the line that tells of it.

        Args:
            bad: the step.
            newest: gives the name of the newest checkpoint.

        Raises:
            UserError: it is one too many, with the advice that fits.
        """
        self.steps.append(bad)
        if len(self.steps) >= self.limit:
            raise UserError(self._ending(newest()))
        cause = f"; {listed(bad.in_cache)} in the cache itself: run refalign cache --verify" if bad.in_cache else ""
        return f"step {bad.step} skipped: its loss or gradient is no number; rows {listed(bad.rows)}{cause}"

    def _ending(self, newest: str | None) -> str:
        first, last = self.steps[0].step, self.steps[-1].step
        which = f"step {last}" if first == last else f"steps {first} to {last}"
        head = f"training: loss or gradient of {which} is no number"
        in_cache = list(dict.fromkeys(name for bad in self.steps for name in bad.in_cache))
        go_on = (
            f"set resume_from_checkpoint={'latest' if newest else 'null'} ({newest or 'there is no checkpoint yet'})"
        )
        if in_cache:
            return f"{head}: row {listed(in_cache)} is none in the cache; run refalign cache --verify, then {go_on}"
        rows = list(dict.fromkeys(name for bad in self.steps for name in bad.rows))
        return f"{head}, with rows {listed(rows)}, which are fine in the cache; lower learning_rate and {go_on}"


def listed(names: Iterable[str]) -> str:
    """Some names, and how many more there are."""
    names = list(names)
    more = f" and {len(names) - SHOWN} more" if len(names) > SHOWN else ""
    return ", ".join(names[:SHOWN]) + more


def all_finite(accelerator: Accelerator, seen: Seen, norm: torch.Tensor) -> bool:
    """Whether losses and gradient are numbers on every process; the same answer on all of them."""
    values = torch.stack([norm.detach().float().cpu(), *(loss.float().cpu() for _, loss in seen)])
    return not largest(accelerator, int(not bool(torch.isfinite(values).all())))


def look_into(accelerator: Accelerator, dataset: CachedDataset | None, step: int, seen: Seen) -> BadStep:
    """What a step that is to be skipped saw, gathered from all processes.

    Args:
        accelerator: its processes.
        dataset: the rows' cache; None where they are made up.
        step: the step's number.
        seen: this process's batches.
    """
    blamed = [keys for keys, loss in seen if not math.isfinite(float(loss))]
    both = [(blamed, [keys for keys, _ in seen])]
    gathered: list[Any] = gather_object(both) if accelerator.num_processes > 1 else both
    groups = [keys for some, _ in gathered for keys in some] or [keys for _, every in gathered for keys in every]
    keys = list(dict.fromkeys(key for group in groups for key in group))
    if dataset is None:
        return BadStep(step, tuple(keys), ())
    return BadStep(step, tuple(names_of(dataset, keys)), tuple(names_of(dataset, not_finite(dataset, keys))))


def names_of(dataset: CachedDataset, keys: Sequence[str]) -> list[str]:
    """What people call rows: the clip, and the key that the cache knows it by."""
    files = {entry.key: entry.file_name for entry in dataset.entries}
    return [f"{files.get(key, '?')} ({key[:12]})" for key in keys]


def not_finite(dataset: CachedDataset, keys: Sequence[str]) -> list[str]:
    """The rows among `keys` whose cached tensors hold anything but numbers. One that cannot be read is among them."""
    positions = {key: index for index, key in enumerate(dataset.keys)}
    return [key for key in keys if key in positions and not _is_finite(dataset, positions[key])]


def _is_finite(dataset: CachedDataset, index: int) -> bool:
    try:
        sample: CachedSample = dataset[index]
    except UserError:
        return False
    tensors = [
        sample.latents,
        *sample.text.values(),
        sample.references,
        *(target for targets in sample.targets.values() for target in targets.values()),
    ]
    return all(bool(torch.isfinite(tensor.float()).all()) for tensor in tensors)
