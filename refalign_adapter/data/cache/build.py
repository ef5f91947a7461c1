"""Building the cache: the frozen encoders run once over all rows, training then reads what they gave.

A part that is in the cache is skipped, so an interrupted run is taken up by running it again. Under `accelerate
launch` the rows are shared out among the processes.
"""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from datetime import timedelta

import torch
from accelerate import PartialState
from accelerate.utils import gather_object, parse_flag_from_env

from ...errors import ConfigError, UserError
from ...files import require_writable_folder
from ..sources.manifest import load_manifest, manifest_path, sources_digest
from ..sources.rows import Row
from .digests import FileDigests
from .encode import RowEncoder
from .encoders import Encoders, load_encoders
from .entries import IndexEntry, listed_text
from .facts import provenance_of
from .freshness import RowFiles, write_files
from .index import FORMAT, listed_targets, listed_texts, write_index, write_meta
from .lock import filling
from .options import CacheOptions
from .parts import PartStore
from .prefetch import in_workers, workers_told
from .prepare import RowPreparer, plans_of

Progress = Callable[[int, int, str], None]


@dataclass
class CacheReport:
    """What a run did, over all processes.

    Attributes:
        rows: split -> rows in the cache; rows of equal content count once.
        made, reused: part -> how often it was encoded, and how often it was there.
        seconds: duration of the run.
        bytes_of: part -> bytes of the files that the rows use.
        cut: captions with more tokens than are encoded.
        seconds_of: "decoding" (what this process waited for it) and encoder -> seconds, summed over the processes.
    """

    rows: dict[str, int] = field(default_factory=dict)
    made: Counter[str] = field(default_factory=Counter)
    reused: Counter[str] = field(default_factory=Counter)
    seconds: float = 0.0
    bytes_of: dict[str, int] = field(default_factory=dict)
    cut: int = 0
    seconds_of: Counter[str] = field(default_factory=Counter)

    @property
    def bytes(self) -> int:
        """Of all files that the rows use."""
        return sum(self.bytes_of.values())

    @property
    def rows_per_second(self) -> float:
        """Rows that went through, those already cached included."""
        return sum(self.rows.values()) / max(self.seconds, 1e-9)

    @property
    def bytes_per_row(self) -> float:
        """Mean bytes of a row; files that rows share count once."""
        return self.bytes / max(1, sum(self.rows.values()))

    def summary(self) -> str:
        """What was done in one line, then where time and bytes went."""
        rows = " + ".join(f"{count} {split}" for split, count in self.rows.items())
        return (
            f"cached {rows} rows in {self.seconds:.1f} s ({self.rows_per_second:.2f} rows/s): "
            f"{self.made.total()} parts made, {self.reused.total()} were there; "
            f"{self.bytes / 1e6:.1f} MB, {self.bytes_per_row / 1e6:.3f} MB a row\n"
            f"seconds: {', '.join(f'{name} {value:.1f}' for name, value in self.seconds_of.items())}\n"
            f"MB a row: {', '.join(f'{part} {value / 1e6:.3f}' for part, value in self.bytes_per_part().items())}"
            + (f"\n{self.cut} captions are longer than max_sequence_length and were cut" if self.cut else "")
        )

    def bytes_per_part(self) -> dict[str, float]:
        """Part -> mean bytes of a row."""
        return {part: value / max(1, sum(self.rows.values())) for part, value in self.bytes_of.items()}


def process_state() -> PartialState:
    """This process among those that `accelerate launch` started; ACCELERATE_USE_CPU counts as for an Accelerator."""
    # Processes wait at the end for the one with most left to do, which can be hours.
    return PartialState(cpu=bool(parse_flag_from_env("ACCELERATE_USE_CPU")), timeout=timedelta(days=7))


def cache_dataset(
    options: CacheOptions,
    *,
    device: torch.device | str | None = None,
    progress: Progress | None = None,
    rehash: bool = False,
) -> CacheReport:
    """Read the manifests, load the encoders, build the cache.

    Args:
        options: see `CacheOptions`.
        device: of the encoders; None takes accelerate's.
        progress: called with (done, in all, "captions" or "rows") of this process, captions first.
        rehash: hash all files of the data set anew, instead of those that have changed by size or time.

    Raises:
        UserError: something the options name is missing, unreadable or does not fit.
    """
    if not options.train_data:
        raise UserError("train_data must name a manifest to make a cache, got null")
    rows = {
        split: load_manifest(path, max_references=options.max_references, field=f"{split}_data")
        for split, path in options.manifests.items()
    }
    require_writable_folder(options.cache_dir, "cache_dir")
    encoders = load_encoders(options, device or process_state().device or "cpu")
    return build_cache(options, rows, encoders, progress, rehash=rehash)


def build_cache(
    options: CacheOptions,
    rows: dict[str, list[Row]],
    encoders: Encoders,
    progress: Progress | None = None,
    *,
    rehash: bool = False,
) -> CacheReport:
    """Encode what is not in the cache yet, then write the indices and `meta.json`.

    A row that cannot be read does not stop the others; the indices are not written then.

    Args:
        options: see `CacheOptions`.
        rows: split -> rows.
        encoders: see `load_encoders`.
        progress: called with (done, in all, "captions" or "rows") of this process, captions first.
        rehash: see `cache_dataset`.

    Raises:
        ConfigError: lists every row that cannot be read, or sizes that the base cannot cut into tokens.
    """
    encoders.check_sizes(options)
    with filling(require_writable_folder(options.cache_dir, "cache_dir")):
        return _build(options, rows, encoders, progress, rehash)


def _build(
    options: CacheOptions, rows: dict[str, list[Row]], encoders: Encoders, progress: Progress | None, rehash: bool
) -> CacheReport:
    started, state = time.perf_counter(), process_state()
    encoder = RowEncoder(options, encoders, plans_of(options, encoders), PartStore(options.cache_dir))
    digests = FileDigests(options.cache_dir, rehash=rehash)
    if state.is_main_process:
        encoder.store.remove_leftovers()
        digests.tidy()
    work = [(split, row) for split, split_rows in rows.items() for row in split_rows]
    mine = work[state.process_index :: state.num_processes]
    empty_text = _encode_texts([row.caption for _, row in mine], encoder, progress)
    with workers_told("data.num_workers"):
        entries, files, problems = _encode_all(mine, encoder, digests, progress)
    every = gather_object(
        [(entries, problems, encoder.made, encoder.reused, Counter(encoder.seconds), files, encoder.cut)]
    )
    if problems := [problem for item in every for problem in item[1]]:
        raise ConfigError(problems)
    splits = {split: _in_order(every, split) for split in rows}
    report = CacheReport({split: len(found) for split, found in splits.items()})
    for item in every:
        report.made += item[2]
        report.reused += item[3]
        report.seconds_of.update(item[4])
        report.cut += item[6]
    if state.is_main_process:
        for split in rows:
            write_files(options.cache_dir, split, _files_of(every, split))
        _write(options, encoder, splits, empty_text, digests)
        files = {file for found in splits.values() for entry in found for file in entry.parts.files()}
        report.bytes_of = _sizes(files, encoder.store)
    state.wait_for_everyone()
    report.seconds = time.perf_counter() - started
    return report


def _sizes(files: set[tuple[str, str]], store: PartStore) -> dict[str, int]:
    """Part -> bytes of these files."""
    sizes: dict[str, int] = dict.fromkeys(store.part_names(), 0)
    for part, key in files:
        sizes[part] += store.size(part, key)
    return {part: size for part, size in sizes.items() if size}


def _encode_texts(captions: list[str], encoder: RowEncoder, progress: Progress | None) -> dict[str, str]:
    """Write what the captions give, all before the first clip, and the empty text; returns that one's keys."""
    empty_text = encoder.encode_text("")
    for done, caption in enumerate(captions, 1):
        encoder.encode_text(caption)
        if progress:
            progress(done, len(captions), "captions")
    return empty_text


def _encode_all(
    work: list[tuple[str, Row]], encoder: RowEncoder, digests: FileDigests, progress: Progress | None
) -> tuple[list[tuple[str, IndexEntry]], list[tuple[str, RowFiles]], list[str]]:
    """(split, entry) and (split, files) of the rows that could be read, and the problems of the others."""
    entries, files, problems = [], [], []
    preparer = RowPreparer(encoder.plans, encoder.store, digests)
    prepared_rows = in_workers(preparer, [row for _, row in work], encoder.options.num_workers)
    for done, (split, row) in enumerate(work, 1):
        started = time.perf_counter()
        prepared = next(prepared_rows)
        encoder.seconds["decoding"] += time.perf_counter() - started
        problem = prepared.problem
        if problem is None:
            try:
                entries.append((split, encoder.encode(row, prepared)))
                files.append((split, (f"line {row.line}", prepared.files)))
            except UserError as error:
                problem = str(error)
        if problem is not None:
            manifest = encoder.options.manifests.get(split, split)
            problems.append(f"{manifest_path(manifest, row.source)} line {row.line}: {problem}")
        if progress:
            progress(done, len(work), "rows")
    return entries, files, problems


def _files_of(every: list, split: str) -> list[RowFiles]:
    """A split's files from all processes, in one order."""
    return sorted((found for item in every for name, found in item[5] if name == split), key=str)


def _in_order(every: list, split: str) -> list[IndexEntry]:
    """A split's entries from all processes in an order that their number does not change, those of equal content
    once: the first rows of all sources, then the second ones, so that rows held out from the end are of every source.
    """
    found = [entry for item in every for name, entry in item[0] if name == split]
    unique: dict[str, IndexEntry] = {}
    for entry in sorted(found, key=lambda entry: (entry.line, entry.source)):
        unique.setdefault(entry.key, entry)
    return list(unique.values())


def _write(
    options: CacheOptions,
    encoder: RowEncoder,
    splits: dict[str, list[IndexEntry]],
    empty_text: dict[str, str],
    digests: FileDigests,
) -> None:
    for split, entries in splits.items():
        write_index(options.cache_dir, split, entries)
    meta = {
        "format": FORMAT,
        "options": options.compared(),
        "manifests": {split: sources_digest(value, digests) for split, value in options.manifests.items()},
        **listed_targets(encoder.encoders.target_facts(options)),
        **listed_texts(encoder.encoders.texts(options), options.max_sequence_length),
        "empty_text": listed_text(empty_text),
        "provenance": provenance_of(encoder.facts),
    }
    write_meta(options.cache_dir, meta)
