"""What a training run will need, before anything starts: GPU memory, disk, host memory, hours."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import psutil
import torch

from ..recipes.schema import Recipe
from .disk import CacheSize, assumed_cache_size, cache_size
from .duration import Duration, duration_of
from .host import host_memory
from .live_bytes import module_bytes
from .measure import Measured, measure_steps
from .memory import CachingMemory, Memory, TrainingMemory, caching_memory, training_memory
from .setting import Asked, Setting, Tell, read_setting
from .shapes import largest_size
from .simulate import simulate_encoding
from .ways_out import WayOut, ways_out


@dataclass(frozen=True)
class Disk:
    """Where the cache is to be.

    Attributes:
        folder: its folder.
        free: bytes that are free there.
        cache: its size.
    """

    folder: str
    free: int
    cache: CacheSize

    @property
    def fits(self) -> bool:
        """Whether the cache fits, or one row of it where their number is not known."""
        return self.cache.total <= self.free


@dataclass(frozen=True)
class Estimate:
    """All that is said of a run.

    Attributes:
        setting: what it is of.
        training: memory of one training process.
        caching: GPU memory of making the cache.
        disk: the cache's.
        host: memory of one training process on the host.
        host_total: bytes that this machine has.
        duration: hours and samples.
        measured: what steps here took; None: none were asked for.
        gpu_memory: bytes of the GPU to fit on; None: not known.
        ways_out: what can be changed where training does not fit.
        notes: what was assumed, for people.
    """

    setting: Setting
    training: TrainingMemory
    caching: CachingMemory
    disk: Disk
    host: Memory
    host_total: int
    duration: Duration
    measured: Measured | None
    gpu_memory: int | None
    ways_out: tuple[WayOut, ...]
    notes: tuple[str, ...]

    @property
    def fits(self) -> bool | None:
        """Whether training fits on the GPU; None: the GPU is not known."""
        return None if self.gpu_memory is None else self.training.gpu.total <= self.gpu_memory


def make_estimate(recipe: Recipe, asked: Asked, tell: Tell = lambda _: None) -> Estimate:
    """Read configs and tables, simulate a step, add everything up.

    Args:
        recipe: what to train.
        asked: what else is known.
        tell: called with what is being done.

    Raises:
        UserError: a base, teacher or source that cannot be read or does not fit.
    """
    tell("reading configs and tables")
    setting = read_setting(recipe, asked)
    tell("simulating a training step")
    training = training_memory(setting)
    gpu_memory = _gpu_memory(asked)
    ways: tuple[WayOut, ...] = ()
    if gpu_memory is not None and training.gpu.total > gpu_memory:
        ways = ways_out(setting, gpu_memory, tell)
    tell("simulating the VAE")
    caching = caching_memory(setting.models, simulate_encoding(setting.models, setting.options))
    measured = None
    if asked.measure:
        tell(f"running {asked.measure + 1} optimizer steps")
        measured = measure_steps(setting, asked.measure)
    step_time = measured.seconds if measured else asked.step_time
    return Estimate(
        setting,
        training,
        caching,
        _disk(setting, asked),
        host_memory(setting, training),
        psutil.virtual_memory().total,
        duration_of(setting, step_time, asked.rows),
        measured,
        gpu_memory,
        ways,
        tuple(_notes(setting, recipe, asked)),
    )


def _gpu_memory(asked: Asked) -> int | None:
    if asked.gpu_memory is not None:
        return int(asked.gpu_memory * 1e9)
    return torch.cuda.get_device_properties(0).total_memory if torch.cuda.is_available() else None


def _disk(setting: Setting, asked: Asked) -> Disk:
    options, shapes, found = setting.options, setting.shapes, setting.found
    size = cache_size(options, shapes, found.all) if found else assumed_cache_size(options, shapes, asked.rows)
    folder = Path(options.cache_dir).absolute()
    existing = next(path for path in (folder, *folder.parents) if path.exists())
    return Disk(options.cache_dir, shutil.disk_usage(existing).free, size)


def _notes(setting: Setting, given: Recipe, asked: Asked) -> Iterator[str]:
    """What was assumed."""
    recipe, options, found = setting.recipe, setting.options, setting.found
    yield (
        "an estimate: the step is simulated without data, with flash attention and all references there; it has not "
        "been compared with a GPU"
    )
    if given.mixed_precision is None:
        yield (
            f"mixed_precision: {recipe.mixed_precision}, as refalign train takes it on a GPU; accelerate launch goes "
            "by its own configuration"
        )
    if found is None and asked.rows is None:
        yield "data: the sources are not on this machine; the cache is told for one row, --rows N multiplies it"
    if found and found.problems:
        yield f"data: {found.problems} records are no rows as they stand and do not count; refalign cache names them"
    if len(options.sizes) > 1:
        yield f"data.buckets: every clip counts as one of the largest size, {largest_size(options)}"
    if recipe.sample_steps:
        size = sum(module_bytes(getattr(setting.models.encoders.pipe, name)) for name in ("text_encoder", "vae"))
        yield (
            f"sample_steps: before the first step, text encoder and VAE ({size / 1e9:.1f} GB) lie on the GPU, too; "
            "that and the making of the videos are not counted here"
        )
