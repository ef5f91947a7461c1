"""The cached samples as training batches and validation batches."""

from __future__ import annotations

import zlib
from collections.abc import Hashable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from functools import partial

from accelerate import Accelerator
from torch import Tensor
from torch.utils.data import Dataset

from ..alignment.objective import Objective
from ..batch import Batch, CachedSample, moved_text
from ..data.cache.buckets import BucketBatchSampler
from ..data.cache.collate import collate
from ..data.cache.dataset import CachedDataset, UnreadableRowError, open_cache
from ..data.cache.entries import REMEDY
from ..data.cache.freshness import check_fresh
from ..data.cache.prefetch import loaded
from ..data.sources.manifest import sources_of
from ..errors import UserError
from ..hashes import hash_of
from ..recipes.cache_options import options_of
from ..recipes.schema import Recipe
from ..signals import tell


@dataclass
class TrainingData:
    """Training rows in a shuffled order that epoch and seed decide, held-out rows in a fixed one.

    Attributes:
        training: training rows.
        validation: held-out rows; None without validation.
        sampler: index lists of one process's training batches.
        groups: index lists of the validation batches, the same on every process.
        empty_text: see `CacheMeta`, on the process's device.
        workers: processes that read training samples.
        shapes: what rows must have in common to share a batch, one of each training row.
        max_unreadable: share of the training rows that may turn unreadable, in [0, 1].
        unreadable: rows that did: place -> why; others of their shape were taken instead.
        left_out: held-out rows that could not be read when they were last asked for: number -> why.
    """

    training: CachedDataset
    validation: CachedDataset | None
    sampler: BucketBatchSampler
    groups: list[list[int]]
    empty_text: dict[str, Tensor]
    workers: int
    shapes: list[Hashable] = field(default_factory=list)
    max_unreadable: float = 0.0
    unreadable: dict[str, str] = field(default_factory=dict)
    left_out: dict[int, str] = field(default_factory=dict)

    @property
    def digest(self) -> str:
        """Of the training rows and their order."""
        return hash_of(self.training.keys)

    @property
    def rows(self) -> dict[str, list[str]]:
        """Keys of the rows in their order: "training", "held_out"."""
        held_out = self.validation.keys if self.validation is not None else []
        return {"training": self.training.keys, "held_out": held_out}

    @property
    def widths(self) -> dict[str, dict[str, int]]:
        """Objective -> teacher id -> width of the targets, as cached."""
        return self.training.meta.widths

    def training_batches(self, epoch: int, position: int) -> Iterator[Batch]:
        """One pass over the training rows after the other without end, from batch `position` of pass `epoch` on.

        Raises:
            UnreadableRowError: more rows than `max_unreadable` allows cannot be read.
            CacheGoneError: none can any more.
        """
        rows = _EpochRows(self.training, self.shapes, self.max_unreadable)
        for batch in loaded(rows, _Passes(self.sampler, epoch, position), self.workers):
            self._note(batch.unreadable)
            yield batch

    def _note(self, unreadable: dict[str, str]) -> None:
        for place, reason in unreadable.items():
            if place not in self.unreadable:
                self.unreadable[place] = reason
                tell(f"skipped, another row is taken: {reason}")
        _require_few(self.unreadable, len(self.training), self.max_unreadable)

    def validation_batch(self, index: int) -> Batch | None:
        """One validation batch, with the first variant of every reference; None when none of its rows can be read.

        Those that cannot are in `left_out` then.

        Raises:
            CacheGoneError: no row can be read any more.
        """
        assert self.validation is not None
        samples = []
        for row in self.groups[index]:
            try:
                samples.append(self.validation[row])
                self.left_out.pop(row, None)
            except UnreadableRowError as error:
                self.left_out[row] = str(error)
        return collate(samples) if samples else None


def _require_few(unreadable: dict[str, str], rows: int, share: float) -> None:
    if len(unreadable) > share * rows:
        raise UnreadableRowError(
            f"data.max_unreadable: {len(unreadable)} of {rows} rows cannot be read, more than the share {share:g}; "
            f"the first: {next(iter(unreadable.values()))}"
        )


@dataclass
class _Passes:
    """Batches as (epoch, row) pairs, so that workers go on from one pass to the next."""

    sampler: BucketBatchSampler
    epoch: int
    position: int

    def __iter__(self) -> Iterator[list[tuple[int, int]]]:
        self.sampler.load_state_dict({"epoch": self.epoch, "position": self.position})
        while True:
            epoch = self.sampler.epoch
            for rows in self.sampler:
                yield [(epoch, row) for row in rows]


@dataclass
class _EpochRow:
    """A sample as a batch takes it.

    Attributes:
        epoch: the pass it is for.
        sample: the row, or another of its shape where it cannot be read.
        name: where the sample's row stands in its manifest.
        unreadable: rows that were passed over: place -> why.
    """

    epoch: int
    sample: CachedSample
    name: str
    unreadable: dict[str, str]


class _EpochRows(Dataset[Batch]):
    """(epoch, row) pairs to a batch; the next row of the same shape stands in for one that cannot be read."""

    def __init__(self, dataset: CachedDataset, shapes: Sequence[Hashable], max_unreadable: float):
        self.dataset, self.shapes, self.max_unreadable = dataset, shapes, max_unreadable

    def __getitem__(self, index: Sequence[tuple[int, int]]) -> Batch:
        return _collate_rows([self._sample(epoch, row) for epoch, row in index])

    def _sample(self, epoch: int, row: int) -> _EpochRow:
        unreadable: dict[str, str] = {}
        for other in self._alike(row):
            place = self.dataset.entries[other].place(self.dataset.split)
            try:
                return _EpochRow(epoch, self.dataset[other], place, unreadable)
            except UnreadableRowError as error:
                unreadable[place] = str(error)
                _require_few(unreadable, len(self.dataset), self.max_unreadable)
        raise UnreadableRowError(next(iter(unreadable.values())))  # no row of this shape can be read

    def _alike(self, row: int) -> Iterator[int]:
        """The row, then those after it that have its shape, round to it again."""
        count = len(self.dataset)
        around = ((row + step) % count for step in range(count))
        return (other for other in around if other == row or self.shapes[other] == self.shapes[row])


def _collate_rows(rows: Sequence[_EpochRow]) -> Batch:
    """Stack samples; in every epoch a row shows the next of its references' augmented variants."""
    variants = [row.epoch + zlib.crc32(row.sample.key.encode()) for row in rows]
    batch = collate([row.sample for row in rows], variants=variants)
    unreadable = {place: reason for row in rows for place, reason in row.unreadable.items()}
    return replace(batch, names=[row.name for row in rows], unreadable=unreadable)


def open_data(recipe: Recipe, accelerator: Accelerator, objectives: Sequence[Objective] = ()) -> TrainingData:
    """Open the recipe's cache.

    Args:
        recipe: whose.
        accelerator: its processes.
        objectives: beside the recipe's own, whose targets are read too.

    Raises:
        UserError: there is no cache, it was made with other settings or its files have changed since, or it has too
            few rows.
    """
    options = options_of(recipe)
    cached = partial(
        open_cache, options, targets={item.name: list(item.targets) for item in objectives if item.targets}
    )
    training = cached()
    validation = cached(split="validation") if recipe.data.validation_data else None
    held_out = recipe.data.validation_rows
    if validation is None and held_out:
        keys = training.keys
        if held_out >= len(keys):
            raise UserError(f"data.validation_rows must leave rows to train on, got {held_out} of {len(keys)}")
        training = cached(keys[:-held_out])
        validation = cached(keys[-held_out:])
    if accelerator.is_main_process:
        check_fresh(options)
    buckets = partial(_buckets, by_references=recipe.data.bucket_by_references)
    shapes = buckets(training)
    sampler = BucketBatchSampler(
        shapes,
        recipe.train_batch_size,
        seed=recipe.seed,
        rank=accelerator.process_index,
        world_size=accelerator.num_processes,
        sources=training.sources,
        ratios=_ratios(recipe, training),
    )
    groups = batches_of_equals(buckets(validation), recipe.train_batch_size) if validation is not None else []
    return TrainingData(
        training,
        validation,
        sampler,
        groups[: recipe.validation_batches],
        moved_text(training.meta.empty_text, accelerator.device),
        recipe.dataloader_num_workers,
        shapes,
        recipe.data.max_unreadable,
    )


def _buckets(dataset: CachedDataset, *, by_references: bool) -> list[Hashable]:
    """What rows must have in common to share a batch."""
    shapes: list[Hashable] = list(dataset.shapes)
    return list(zip(shapes, dataset.reference_counts, strict=True)) if by_references else shapes


def _ratios(recipe: Recipe, training: CachedDataset) -> list[float] | None:
    """The sources' ratios; None where the recipe gives none.

    Raises:
        UserError: the cache has rows of more sources than the recipe names.
    """
    sources = sources_of(recipe.data.train_data) if recipe.data.train_data else []
    ratios = [source.ratio for source in sources if source.ratio is not None]
    if not ratios:
        return None
    if max(training.sources) >= len(ratios):
        raise UserError(
            f"data.train_data: {len(ratios)} sources, but the cache has rows of {max(training.sources) + 1}; {REMEDY}"
        )
    return ratios


def batches_of_equals(shapes: Sequence[Hashable], batch_size: int) -> list[list[int]]:
    """Indices in order, in batches of equal shape; the last of a shape may be smaller."""
    buckets: dict[Hashable, list[int]] = {}
    for index, shape in enumerate(shapes):
        buckets.setdefault(shape, []).append(index)
    return [
        indices[start : start + batch_size]
        for indices in buckets.values()
        for start in range(0, len(indices), batch_size)
    ]
