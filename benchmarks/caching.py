"""What `refalign cache` takes: memory of its processes row by row, rows a second, bytes of a row.

    python benchmarks/caching.py                    # 1,000 rows of the demo's world, three runs: five minutes
    python benchmarks/caching.py --rows 200 --json figures.json

Clips (mp4), references and masks (PNG) are drawn, all of them different, and encoded with the tiny base and teacher
that come with the package. Each run is a process of its own, looked at from outside: a first one without decoding
processes, one over the finished cache, a first one with decoding processes. Memory is what the run holds (RSS) and
what each of its children holds alone (USS); flat when the line through the second half of the rows hardly rises:
the keys and digests of a row are a few kilobytes that have to be kept.
"""

from __future__ import annotations

import multiprocessing
import tempfile
import time
from contextlib import suppress
from dataclasses import dataclass
from multiprocessing.sharedctypes import Synchronized
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import psutil
import typer
from _report import MIB, Bar, machine, print_bars, print_machine, print_table, start, write_json
from _setting import JsonOption

from refalign_adapter.data.cache.build import CacheReport, cache_dataset
from refalign_adapter.errors import UserError
from refalign_adapter.recipes.cache_options import options_of
from refalign_adapter.recipes.file import load_recipe
from refalign_adapter.recipes.shipped import recipe_path
from refalign_adapter.world.base import unpack_base, unpack_teacher
from refalign_adapter.world.write import write_world

EARLY = 100
"""Rows after which buffers are taken to be as large as they get."""
INTERVAL = 0.05
"""Seconds between two looks at a run's memory."""
KIB_PER_ROW = 16.0
"""What a row may leave behind: its line of the index and its files' digests take a few KiB."""
COLUMNS = ("", "rows/s", "MiB at {} rows", "at the end", "peak", "KiB a row, second half")


@dataclass(frozen=True)
class Look:
    """A run's memory at one moment.

    Attributes:
        rows: that it is done with.
        bytes: of it and its children.
    """

    rows: int
    bytes: int


@dataclass(frozen=True)
class Run:
    """One run of the cache.

    Attributes:
        report: what it says of itself.
        looks: at its memory, in order of time.
    """

    report: CacheReport
    looks: list[Look]

    @property
    def at_work(self) -> list[Look]:
        """While some rows were done and some left: decoding processes end with the last; of a short run, all."""
        total = self.looks[-1].rows
        return [look for look in self.looks if 0 < look.rows < total] or self.looks

    @property
    def peak(self) -> int:
        """Most bytes at a time, loading the encoders included."""
        return max(look.bytes for look in self.looks)

    def bytes_at(self, rows: int) -> int:
        """Bytes when so many rows were done."""
        return next((look.bytes for look in self.at_work if look.rows >= rows), self.at_work[-1].bytes)

    def growth(self) -> float:
        """Bytes a row in the second half of the rows, by least squares; 0 where that was over in one look."""
        later = [look for look in self.at_work if look.rows >= self.looks[-1].rows / 2]
        rows = [look.rows for look in later]
        if len(set(rows)) < 2:
            return 0.0
        return float(np.polyfit(rows, [look.bytes for look in later], 1)[0])

    def to_dict(self) -> dict[str, Any]:
        """JSON."""
        return {
            "rows_per_second": self.report.rows_per_second,
            "seconds_of": self.report.seconds_of,
            "bytes_per_part": self.report.bytes_per_part(),
            "made": self.report.made,
            "reused": self.report.reused,
            "peak_bytes": self.peak,
            "growth_bytes_per_row": self.growth(),
            "looks": [(look.rows, look.bytes) for look in self.looks],
        }


def write_inputs(folder: Path, rows: int) -> None:
    """Base, teacher and clips."""
    unpack_base(folder / "base")
    unpack_teacher(folder / "teacher")
    write_world(folder / "data", clips=rows)


def cache_rows(folder: Path, cache: str, workers: int, progress: Any = None) -> CacheReport:
    """Make, or go over, the cache `folder/cache`, as `refalign cache` does.

    Args:
        folder: see `write_inputs`.
        cache: name of the cache's folder in it.
        workers: decoding processes.
        progress: see `cache_dataset`.
    """
    values = {
        "pretrained_model_name_or_path": folder / "base",
        "adapter.teachers": f"[{folder / 'teacher'}]",
        "data.train_data": folder / "data",
        "data.validation_data": "null",
        "data.cache_dir": folder / cache,
        "data.num_workers": workers,
        "validation_steps": "null",
    }
    recipe = load_recipe(recipe_path("demo/isolated"), [f"{name}={value}" for name, value in values.items()])
    return cache_dataset(options_of(recipe), device="cpu", progress=progress)


def tree_bytes(process: psutil.Process) -> int:
    """Bytes that a process holds, and that its children hold for themselves.

    What a child shares with it counts once; a copy that a child keeps of what the process has changed since it started
    the child does not: it is no more than the process was large then.
    """
    total = process.memory_info().rss
    for child in process.children(recursive=True):
        with suppress(psutil.NoSuchProcess):  # it ended just now
            total += child.memory_full_info().uss
    return total


def _child(watcher: Any, done: Synchronized, folder: Path, cache: str, workers: int) -> None:
    def progress(count: int, _total: int, kind: str) -> None:
        if kind == "rows":
            done.value = count

    multiprocessing.set_start_method(None, force=True)  # decoding processes start as they do under `refalign cache`
    watcher.send(cache_rows(folder, cache, workers, progress))
    watcher.recv()  # when it has had its last look


def watch(folder: Path, cache: str, workers: int) -> Run:
    """`cache_rows` in a process of its own, whose memory is looked at until it has reported.

    Raises:
        UserError: it failed; what it wrote to standard error says why.
    """
    context = multiprocessing.get_context("spawn")
    here, there = context.Pipe()
    done = context.Value("l", 0)
    child = context.Process(target=_child, args=(there, done, folder, cache, workers))
    child.start()
    there.close()
    assert child.pid is not None
    process, looks = psutil.Process(child.pid), []
    try:
        finished = False
        while not finished:
            finished = here.poll(INTERVAL)
            looks.append(Look(done.value, tree_bytes(process)))
        report = here.recv()
        here.send(None)
    except EOFError:
        raise UserError("caching: the run failed; see above") from None
    finally:
        child.join()
    return Run(report, looks)


def measure(folder: Path, rows: int, workers: int) -> dict[str, Run]:
    """The three runs."""
    write_inputs(folder, rows)
    runs = {"first": watch(folder, "cache", 0), "over the finished cache": watch(folder, "cache", 0)}
    if workers:
        runs[f"first, {workers} decoding processes"] = watch(folder, "cache_by_workers", workers)
    return runs


def print_result(runs: dict[str, Run], early: int) -> list[Bar]:
    """Tables; returns the bars."""
    lines = []
    for name, run in runs.items():
        figures = (run.bytes_at(early) / MIB, run.at_work[-1].bytes / MIB, run.peak / MIB)
        shown = [f"{value:.0f}" for value in figures]
        lines.append([name, f"{run.report.rows_per_second:.1f}", *shown, f"{run.growth() / 1024:.1f}"])
    print_table("Caching", [column.format(early) for column in COLUMNS], lines)
    for name, run in runs.items():
        print(f"{name}: seconds " + ", ".join(f"{key} {value:.1f}" for key, value in run.report.seconds_of.items()))
    parts = next(iter(runs.values())).report.bytes_per_part()
    print("KB a row: " + ", ".join(f"{part} {value / 1e3:.1f}" for part, value in parts.items()))
    bars = [Bar(f"{name}: KiB a row, second half", run.growth() / 1024, KIB_PER_ROW) for name, run in runs.items()]
    print_bars(bars)
    return bars


def main(
    rows: Annotated[int, typer.Option(min=2, help="Rows of the data set.")] = 1000,
    workers: Annotated[int, typer.Option(min=0, help="Decoding processes of the last run; 0 leaves it out.")] = 2,
    json: JsonOption = None,
) -> None:
    """Cache a drawn data set three times and look at the memory it takes."""
    facts = machine("cpu")
    print_machine(facts)
    with tempfile.TemporaryDirectory() as folder:
        started = time.perf_counter()
        runs = measure(Path(folder), rows, workers)
    print(f"{rows} rows, {time.perf_counter() - started:.0f} s")
    bars = print_result(runs, min(EARLY, rows // 2))
    if json is not None:
        figures = {name: run.to_dict() for name, run in runs.items()}
        write_json(json, {"machine": facts, "rows": rows, "runs": figures, "bars": [bar.to_dict() for bar in bars]})


if __name__ == "__main__":
    start(main)
