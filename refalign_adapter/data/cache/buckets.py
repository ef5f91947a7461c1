"""Batches of samples that have one shape, the same on every run, that can be taken up in the middle of an epoch."""

from __future__ import annotations

from collections import Counter
from collections.abc import Hashable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np
from torch.utils.data import Sampler

from ...errors import UserError


@dataclass(frozen=True)
class _Cell:
    """Samples of one shape and source, and how many of them an epoch takes."""

    indices: np.ndarray
    count: int

    def draw(self, generator: np.random.Generator) -> np.ndarray:
        """Every sample once before any twice, in a random order."""
        rounds = -(-self.count // len(self.indices))
        return np.concatenate([generator.permutation(self.indices) for _ in range(rounds)])[: self.count]


def _buckets(shapes: Sequence[Hashable], sources: Sequence[int], ratios: Sequence[float] | None) -> list[list[_Cell]]:
    """The cells of each shape."""
    buckets: dict[Hashable, dict[int, list[int]]] = {}
    for index, (shape, source) in enumerate(zip(shapes, sources, strict=True)):
        buckets.setdefault(shape, {}).setdefault(source, []).append(index)
    rows = Counter(sources)
    share = dict.fromkeys(rows, 1.0)
    if ratios is not None:
        whole = sum(ratios[source] for source in rows)
        share = {source: ratios[source] / whole * len(shapes) / rows[source] for source in rows}
    return [
        [
            _Cell(np.array(indices), max(1, round(len(indices) * share[source])))
            for source, indices in sorted(cells.items())
        ]
        for cells in buckets.values()
    ]


class BucketBatchSampler(Sampler[list[int]]):
    """Batches of indices of equal shape, shuffled anew each epoch by (seed, epoch).

    All processes take their batches from one list, so in every step they work on the same shape. Iterating gives what
    is left of the current epoch and then moves on to the next. Each process takes its own share: the DataLoader that
    uses the sampler must not be sharded again by accelerate.

    A shape with fewer samples than `batch_size` * `world_size` fills its one batch by repeating samples, so rare
    shapes are trained on. Of other shapes, what does not fill a batch is left out in that epoch (another choice in
    each).

    With `ratios`, sources are mixed: an epoch still has as many samples as there are, but each source's share of them
    is its ratio's, in every shape alike. A source that is to give more than it has repeats its samples, all as often
    before any once more; of one that is to give less, an epoch has some, another choice in each. What has a sample at
    all in a shape gives at least one.

    Args:
        shapes: a key per sample; only samples with equal keys share a batch.
        batch_size: samples of a process at a time.
        seed: of the order.
        rank, world_size: which process of how many.
        sources: which source each sample is from, counted from 0; needed with `ratios`.
        ratios: a positive number per source, in any unit; None takes every sample once.
        drop_last: False also gives the last, smaller batch of each shape, filled up by repetition to a multiple of
            `world_size`; no batch is filled further.

    Raises:
        UserError: `drop_last` and fewer samples in all than `batch_size` * `world_size`, or none.
    """

    def __init__(
        self,
        shapes: Sequence[Hashable],
        batch_size: int,
        *,
        seed: int,
        rank: int = 0,
        world_size: int = 1,
        drop_last: bool = True,
        sources: Sequence[int] | None = None,
        ratios: Sequence[float] | None = None,
    ):
        if batch_size < 1:
            raise UserError(f"train_batch_size must be at least 1, got {batch_size}")
        if not shapes:
            raise UserError("train_data: there are no samples")
        self.step_size = batch_size * world_size
        if drop_last and len(shapes) < self.step_size:
            processes = f" on each of {world_size} processes" if world_size > 1 else ""
            raise UserError(
                f"train_batch_size: a step takes {self.step_size} samples ({batch_size}{processes}), but there are "
                f"only {len(shapes)}; lower train_batch_size or add rows"
            )
        self.seed, self.rank, self.world_size, self.drop_last = seed, rank, world_size, drop_last
        self.epoch = self.position = 0
        origins = [0] * len(shapes) if sources is None or ratios is None else sources
        self.buckets = _buckets(shapes, origins, ratios)

    def __len__(self) -> int:
        """Batches of one process in a whole epoch."""
        return sum(self._steps(sum(cell.count for cell in bucket)) for bucket in self.buckets)

    def __iter__(self) -> Iterator[list[int]]:
        steps = self._epoch_steps()
        while self.position < len(steps):
            step = steps[self.position]
            self.position += 1
            yield step[self.rank :: self.world_size].tolist()
        self.epoch, self.position = self.epoch + 1, 0

    def state_dict(self) -> dict[str, int]:
        """Epoch, and batches of it that were given; a DataLoader that reads ahead has asked for more than was used."""
        return {"epoch": self.epoch, "position": self.position}

    def load_state_dict(self, state: dict[str, int]) -> None:
        """Go on after `state`.

        Raises:
            UserError: a position that this epoch does not have.
        """
        if not 0 <= state["position"] <= len(self):
            raise UserError(
                f"resume_from_checkpoint: position {state['position']} of {len(self)} batches an epoch; "
                "the data, train_batch_size or the number of processes has changed"
            )
        self.epoch, self.position = state["epoch"], state["position"]

    def _steps(self, samples: int) -> int:
        """Steps that a bucket makes of its samples."""
        whole, rest = divmod(samples, self.step_size)
        return whole + (rest > 0 if not self.drop_last else whole == 0)

    def _epoch_steps(self) -> list[np.ndarray]:
        """Indices of every step of the epoch, for all processes together."""
        generator = np.random.default_rng([self.seed, self.epoch])
        steps: list[np.ndarray] = []
        for bucket in self.buckets:
            order = np.concatenate([cell.draw(generator) for cell in bucket])
            if len(bucket) > 1:
                order = generator.permutation(order)
            for number in range(self._steps(len(order))):
                step = order[number * self.step_size : (number + 1) * self.step_size]
                # Only a bucket's last step can be short: np.resize repeats from its beginning.
                size = self.step_size if self.drop_last else -(-len(step) // self.world_size) * self.world_size
                steps.append(np.resize(step, size))
        return [steps[index] for index in generator.permutation(len(steps))]
