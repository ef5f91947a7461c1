"""The cached samples as training batches and validation batches."""

from __future__ import annotations

import zlib
from collections.abc import Hashable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial

from accelerate import Accelerator
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from ..batch import Batch, CachedSample
from ..data.buckets import BucketBatchSampler
from ..data.dataset import CachedDataset, collate, open_cache
from ..data.index import REMEDY
from ..data.manifest import sources_of
from ..data.options import options_of
from ..errors import UserError
from .config import Recipe


@dataclass
class TrainingData:
    """Training rows in a shuffled order that epoch and seed decide, held-out rows in a fixed one.

    Attributes:
        training: training rows.
        validation: held-out rows; None without validation.
        sampler: index lists of one process's training batches.
        groups: index lists of the validation batches, the same on every process.
        empty_text: (S, D) embedding of the empty prompt, on the process's device.
        workers: processes that read training samples.
    """

    training: CachedDataset
    validation: CachedDataset | None
    sampler: BucketBatchSampler
    groups: list[list[int]]
    empty_text: Tensor
    workers: int

    @property
    def teachers(self) -> dict[str, int]:
        """Teacher id -> width, as cached."""
        return self.training.meta.teachers

    def training_batches(self, epoch: int, position: int) -> Iterator[Batch]:
        """One pass over the training rows after the other without end, from batch `position` of pass `epoch` on."""
        passes = _Passes(self.sampler, epoch, position)
        loader = DataLoader(
            _EpochRows(self.training),
            batch_sampler=passes,  # type: ignore[arg-type]  # any iterable of lists
            num_workers=self.workers,
            collate_fn=_collate_rows,
        )
        yield from loader

    def validation_batch(self, index: int) -> Batch:
        """One validation batch, with the first variant of every reference."""
        assert self.validation is not None
        return collate([self.validation[row] for row in self.groups[index]])


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


class _EpochRows(Dataset[tuple[int, CachedSample]]):
    """(epoch, row) to (epoch, sample)."""

    def __init__(self, dataset: CachedDataset):
        self.dataset = dataset

    def __getitem__(self, index: tuple[int, int]) -> tuple[int, CachedSample]:
        epoch, row = index
        return epoch, self.dataset[row]


def _collate_rows(rows: Sequence[tuple[int, CachedSample]]) -> Batch:
    """Stack samples; in every epoch a row shows the next of its references' augmented variants."""
    variants = [epoch + zlib.crc32(sample.key.encode()) for epoch, sample in rows]
    return collate([sample for _, sample in rows], variants=variants)


def open_data(recipe: Recipe, accelerator: Accelerator) -> TrainingData:
    """Open the recipe's cache.

    Raises:
        UserError: there is no cache, it was made with other settings, or it has too few rows.
    """
    options = options_of(recipe)
    training = open_cache(options)
    validation = open_cache(options, split="validation") if recipe.data.validation_data else None
    held_out = recipe.data.validation_rows
    if validation is None and held_out:
        keys = training.keys
        if held_out >= len(keys):
            raise UserError(f"data.validation_rows must leave rows to train on, got {held_out} of {len(keys)}")
        training = open_cache(options, keys[:-held_out])
        validation = open_cache(options, keys[-held_out:])
    buckets = partial(_buckets, by_references=recipe.data.bucket_by_references)
    sampler = BucketBatchSampler(
        buckets(training),
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
        training.meta.empty_text.to(accelerator.device),
        recipe.dataloader_num_workers,
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
