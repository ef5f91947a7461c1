"""What reading a cache takes beside a training step: the check of its parts, the staleness check, writing parts.

    python benchmarks/reading.py                     # a small Wan on the CPU, a quarter of its video: two minutes
    python benchmarks/reading.py --device cuda --preset 1.3b --frames 81 --checkpointing
    python benchmarks/reading.py --files 1000 --json figures.json

Rows of random parts, as large as those of the setting, are written to a folder, read with the check that a run makes
when it meets a part for the first time, and without; the files come from memory, where they were just written, so
that the disk does not hide the check. The step is one of joint attention with alignment, see `training.py`. A check
is paid for once a part, in a thread or process of its own beside the step; its share is of a step that would do
nothing else meanwhile. Staleness: files are hashed the first time and known by their stamps later.
"""

from __future__ import annotations

import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any

import _setting as options
import torch
import training
import typer
from _measure import time_in_turn
from _report import Bar, print_bars, print_table, report, start
from _setting import Setting
from torch import Tensor

from refalign_adapter.atomic import atomic_file
from refalign_adapter.batch import EMBEDDING, REFERENCE
from refalign_adapter.data.cache.digests import SETTLED, FileDigests
from refalign_adapter.data.cache.freshness import check_fresh, write_files
from refalign_adapter.data.cache.index import FORMAT, write_meta
from refalign_adapter.data.cache.options import CacheOptions
from refalign_adapter.data.cache.part_file import write_tensor
from refalign_adapter.data.cache.parts import Expected, PartStore
from refalign_adapter.hashes import hash_of

SHARE = 0.01
"""Of a step, that the check of its rows may take."""
CAPTION = 100
"""Text tokens of a row."""
FileCounts = list[int]


@dataclass
class Result:
    """All that was measured.

    Attributes:
        row_bytes: of a row's parts.
        batch: rows of a step.
        checked, unchecked: seconds of reading a row, the first time and later.
        step: seconds of a training step.
        first, again: number of files -> seconds of the staleness check that hashes them, and of a later one.
        written: durable or not -> parts a second.
    """

    row_bytes: int
    batch: int
    checked: float
    unchecked: float
    step: float
    first: dict[int, float] = field(default_factory=dict)
    again: dict[int, float] = field(default_factory=dict)
    written: dict[str, float] = field(default_factory=dict)

    @property
    def share(self) -> float:
        """Of a step, that checking its rows takes."""
        return max(0.0, self.checked - self.unchecked) * self.batch / self.step

    def bars(self) -> list[Bar]:
        """What reading has to reach."""
        return [Bar("check of new parts / training step", self.share, SHARE)]

    def to_dict(self) -> dict[str, Any]:
        """JSON."""
        return {
            "row_bytes": self.row_bytes,
            "seconds": {"checked": self.checked, "unchecked": self.unchecked, "step": self.step},
            "share": self.share,
            "staleness_first": self.first,
            "staleness_again": self.again,
            "parts_per_second": self.written,
            "bars": [bar.to_dict() for bar in self.bars()],
        }


def parts_of(case: training.Case) -> dict[str, Tensor]:
    """The parts of one row, in bfloat16 as a cache has them: of the first of a batch."""
    batch = case.batch
    return {
        "video": batch.latents[0].bfloat16().cpu(),
        "references": batch.references[0].transpose(0, 1)[None].bfloat16().cpu().contiguous(),
        "text": batch.text[EMBEDDING][0, :CAPTION].bfloat16().cpu().contiguous(),
        "teacher": batch.targets[REFERENCE][training.TEACHER][:1].bfloat16().cpu().contiguous(),
    }


def write_rows(folder: Path, parts: dict[str, Tensor], rows: int) -> list[tuple[str, str, Expected]]:
    """Write so many rows; returns what their parts are called and have to hold."""
    store, written = PartStore(folder), []
    for row in range(rows):
        for name, tensor in parts.items():
            key = hash_of([row, name])
            store.write(name, key, tensor)
            written.append((name, key, Expected(tuple(tensor.shape), tensor.dtype)))
    return written


def time_reading(folder: Path, written: list[tuple[str, str, Expected]], rows: int, rounds: int) -> dict[str, float]:
    """Seconds of reading a row, with the check and without."""
    known = PartStore(folder)

    def read(store: PartStore) -> None:
        for part in written:
            store.read(*part)

    works: dict[str, Callable[[], None]] = {
        "checked": lambda: read(PartStore(folder)),
        "unchecked": lambda: read(known),
    }
    times = time_in_turn(works, rounds, "cpu")  # the first, uncounted time makes the parts known
    return {name: times.median(name) / rows for name in works}


def time_staleness(folder: Path, count: int) -> tuple[float, float]:
    """Seconds of the staleness check of so many files, the first time and later."""
    data, cache = folder / "data", folder / "cache"
    data.mkdir()
    cache.mkdir()
    paths = [data / f"{number}.mp4" for number in range(count)]
    for number, path in enumerate(paths):
        path.write_bytes(number.to_bytes(8, "little"))
    time.sleep(SETTLED / 1e9 + 0.1)  # what is newer is not remembered
    digest = FileDigests(folder)
    write_files(
        cache, "train", [(f"line {number}", {str(path): digest(path)}) for number, path in enumerate(paths, 1)]
    )
    meta = {
        "format": FORMAT,
        "options": {"max_sequence_length": 1},
        "manifests": {"train": None},
        "teachers": {},
        "empty_text": "0" * 32,
        "provenance": {"video": {"dtype": "bf16"}},
    }
    write_meta(cache, meta)
    made = CacheOptions(base_model="none", cache_dir=str(cache), train_data=str(data), teachers=())
    seconds = []
    for _ in range(2):
        started = time.perf_counter()
        check_fresh(made)
        seconds.append(time.perf_counter() - started)
    return seconds[0], seconds[1]


def time_writing(folder: Path, tensor: Tensor, count: int) -> dict[str, float]:
    """Parts a second, synced to disk one by one, and not."""
    found = {}
    for name, durable in (("durable", True), ("not durable", False)):
        started = time.perf_counter()
        for number in range(count):
            with atomic_file(folder / f"{name}-{number}.safetensors", durable=durable) as temporary:
                write_tensor(temporary, tensor)
        found[name] = count / (time.perf_counter() - started)
    return found


def measure(setting: Setting, folder: Path, rows: int, files: FileCounts, parts: int) -> Result:
    """All of it, in folders of its own below `folder`."""
    case = training.build_cases(setting)[training.ALIGNED.format("joint")]
    step = time_in_turn({"step": case.step}, setting.rounds, setting.device).median("step")
    tensors = parts_of(case)
    (folder / "rows").mkdir()
    written = write_rows(folder / "rows", tensors, rows)
    reading = time_reading(folder / "rows", written, rows, max(5, setting.rounds))
    size = sum(tensor.nbytes for tensor in tensors.values())
    result = Result(size, setting.batch, reading["checked"], reading["unchecked"], step)
    for count in files:
        below = folder / f"files-{count}"
        below.mkdir()
        result.first[count], result.again[count] = time_staleness(below, count)
    (folder / "written").mkdir()
    result.written = time_writing(folder / "written", tensors["references"], parts)
    return result


def print_result(result: Result) -> None:
    """Tables and the bar."""
    lines = [
        [name, f"{result.row_bytes / seconds / 1e6:,.0f}", f"{seconds * 1e3:.2f}"]
        for name, seconds in (("with the check", result.checked), ("without", result.unchecked))
    ]
    print_table(f"Reading rows of {result.row_bytes / 1e6:.2f} MB", ("", "MB/s", "ms a row"), lines)
    print(f"a training step of {result.batch} rows: {result.step:.2f} s; the check's share: {result.share:.3%}")
    if result.first:
        lines = [[f"{count:,}", f"{result.first[count]:.2f}", f"{result.again[count]:.2f}"] for count in result.first]
        print_table("Staleness check", ("files", "first, s", "again, s"), lines)
    print("parts written a second: " + ", ".join(f"{name} {rate:,.0f}" for name, rate in result.written.items()))
    print_bars(result.bars())


def main(
    preset: options.PresetOption = None,
    dim: options.DimOption = None,
    heads: options.HeadsOption = None,
    layers: options.LayersOption = None,
    ffn: options.FfnOption = None,
    frames: options.FramesOption = 21,
    height: options.HeightOption = None,
    width: options.WidthOption = None,
    references: options.ReferencesOption = 2,
    batch: options.BatchOption = 1,
    rank: options.RankOption = 64,
    dtype: options.DtypeOption = None,
    device: options.DeviceOption = "cpu",
    checkpointing: Annotated[bool, typer.Option("--checkpointing", help="Run blocks again in backward.")] = False,
    rounds: options.RoundsOption = 3,
    threads: options.ThreadsOption = None,
    rows: Annotated[int, typer.Option(min=1, help="Rows that are read.")] = 20,
    files: Annotated[list[int], typer.Option(min=1, help="Files of a staleness check; may be given again.")] = [  # noqa: B006
        30_000,
        100_000,
    ],
    parts: Annotated[int, typer.Option(min=1, help="Parts that are written.")] = 200,
    folder: Annotated[Path | None, typer.Option(help="Where to write; the system's own for such things.")] = None,
    json: options.JsonOption = None,
) -> None:
    """Time reading and checking parts against a training step, the staleness check, and writing parts."""
    if threads is not None:
        torch.set_num_threads(threads)
    model = {"dim": dim, "heads": heads, "layers": layers, "ffn": ffn}
    video = {"frames": frames, "height": height, "width": width}
    setting = options.make_setting(
        options.choose_size(preset, device, model=model, video=video),
        references=references,
        scale=1.0,
        dropped=0.0,
        batch=batch,
        rank=rank,
        dtype=dtype,
        device=device,
        backend=None,
        checkpointing=checkpointing,
        rounds=rounds,
    )
    with tempfile.TemporaryDirectory(dir=folder) as below:
        report(setting, lambda given: measure(given, Path(below), rows, files, parts), print_result, json)


if __name__ == "__main__":
    start(main)
