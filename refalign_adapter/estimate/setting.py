"""What an estimate is of: a recipe, its models' configs, its rows where they are here, and the processes."""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from ..data.cache.options import CacheOptions
from ..data.sources.manifest import read_source, sources_of
from ..data.sources.rows import Row
from ..errors import ConfigError, UserError
from ..recipes.cache_options import options_of
from ..recipes.schema import Recipe
from .models import Models, read_models
from .shapes import SampleShapes, sample_shapes

Tell = Callable[[str], None]
"""Called with what is being done."""


@dataclass(frozen=True)
class Asked:
    """What is known besides the recipe.

    Args:
        processes: of the training run, one per GPU; None: as many as this machine has GPUs.
        gpu_memory: GB (1e9 bytes) of one GPU; None: of the GPU here, if there is one.
        rows: of the data; None: they are counted where the sources are here.
        step_time: seconds of an optimizer step; None: not known.
        measure: optimizer steps to run on this machine; None: none.

    Raises:
        ConfigError: lists every problem at once.
    """

    processes: int | None = None
    gpu_memory: float | None = None
    rows: int | None = None
    step_time: float | None = None
    measure: int | None = None

    def __post_init__(self) -> None:
        problems = [
            f"--{name.replace('_', '-')} must be positive, got {value:g}"
            for name, value in vars(self).items()
            if value is not None and not 0 < value < float("inf")
        ]
        if None not in (self.measure, self.step_time):
            problems.append("--step-time and --measure both say how long a step takes; give one of them")
        if problems:
            raise ConfigError(problems)


@dataclass(frozen=True)
class FoundRows:
    """The rows of all sources.

    Attributes:
        rows: split ("train", "validation") -> rows.
        counts: "split: path" -> rows of one source.
        problems: records that are no rows as they stand.
    """

    rows: dict[str, list[Row]]
    counts: dict[str, int]
    problems: int

    @property
    def all(self) -> list[Row]:
        """Rows of every split."""
        return [row for rows in self.rows.values() for row in rows]


@dataclass(frozen=True)
class Setting:
    """What an estimate is of.

    Attributes:
        recipe: with its `mixed_precision` settled.
        options: of its cache.
        models: its configs.
        shapes: of its largest samples.
        found: its rows; None: not known.
        references: of a sample at most.
        processes: of the run.
    """

    recipe: Recipe
    options: CacheOptions
    models: Models
    shapes: SampleShapes
    found: FoundRows | None
    references: int
    processes: int

    def changed(self, changes: dict[str, Any]) -> Setting:
        """The same with other values of the recipe's fields, by their dotted names; models and rows stay."""
        values = self.recipe.model_dump()
        for name, value in changes.items():
            *sections, field = name.split(".")
            part = values
            for section in sections:
                part = part[section]
            part[field] = value
        recipe = Recipe.model_validate(values)
        options = options_of(recipe)
        return replace(self, recipe=recipe, options=options, shapes=sample_shapes(self.models, options))


def read_setting(recipe: Recipe, asked: Asked) -> Setting:
    """Read configs and, unless their number was told, rows.

    Raises:
        UserError: a base, teacher or source that cannot be read or does not fit.
    """
    recipe = recipe.model_copy(update={"mixed_precision": settled_precision(recipe)})
    options = options_of(recipe)
    models = read_models(recipe, options)
    found = find_rows(options) if asked.rows is None else None
    counts = [len(row.references) for row in found.all] if found else []
    return Setting(
        recipe,
        options,
        models,
        sample_shapes(models, options),
        found,
        max(counts, default=options.max_references),
        asked.processes or max(1, torch.cuda.device_count()),
    )


def settled_precision(recipe: Recipe) -> str:
    """The recipe's precision, else the launcher's where there is one, else bf16, the recipes' accelerate files'.

    Raises:
        UserError: one that training does not do.
    """
    wanted = recipe.mixed_precision or os.environ.get("ACCELERATE_MIXED_PRECISION") or "bf16"
    if wanted not in ("no", "bf16"):
        raise UserError(f"mixed_precision must be no or bf16, accelerate launch says {wanted!r}; relaunch with bf16")
    return wanted


def find_rows(options: CacheOptions) -> FoundRows | None:
    """The rows of the options' sources, clips and images not opened; None unless all tables are on this machine.

    Raises:
        UserError: sources that cannot be read.
    """
    sources = {split: sources_of(value, f"{split}_data") for split, value in options.manifests.items()}
    every = [source for named in sources.values() for source in named]
    if "train" not in sources or not all(Path(source.path).exists() for source in every):
        return None
    rows: dict[str, list[Row]] = {split: [] for split in sources}
    counts: dict[str, int] = {}
    problems = 0
    for split, named in sources.items():
        for source in named:
            _, reading = read_source(source, max_references=options.max_references, field=f"{split}_data")
            rows[split] += reading.rows
            counts[f"{split}: {source.path}"] = len(reading.rows)
            problems += len(reading.problems)
    return FoundRows(rows, counts, problems)
