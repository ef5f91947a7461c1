"""Looking through a data set before anything is encoded: every row is read as the cache would read it.

Neither base model nor GPU is needed, and nothing but hashes and numbers is kept of a row.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path

from ...errors import ConfigError, UserError
from ..cache.captions import token_counter
from ..cache.options import CacheOptions
from ..cache.prefetch import in_workers
from ..sources.manifest import read_source, sources_of
from ..sources.readers.base import Source
from ..sources.rows import Row
from .between_rows import CheckedRow, findings_between
from .findings import Finding
from .inspection import RowInspector, RowLook

Progress = Callable[[int, int], None]
PLACES = {".jsonl": "line", ".json": "record"}
"""What a row's number counts in a table; in others, rows."""
NAMES_OF_OWNER = "folder"
"""The format whose subjects are named by the data set's owner."""


@dataclass
class SourceCheck:
    """What a source gave.

    Attributes:
        split: "train" or "validation".
        source: which.
        table: its main table.
        rows: how many rows it gave.
        problems: what its reader reports of rows that cannot be made.
        left_out: why -> how many records its format's rules leave out.
    """

    split: str
    source: Source
    table: str
    rows: int
    problems: list[str]
    left_out: Counter[str]


@dataclass
class DataCheck:
    """What was found in a data set.

    Attributes:
        sources: of both splits.
        rows: those that could be made, in order.
        findings: all of them; problems of a row that could not be made have no row.
    """

    sources: list[SourceCheck] = field(default_factory=list)
    rows: list[CheckedRow] = field(default_factory=list)
    findings: list[Finding] = field(default_factory=list)

    @property
    def problems(self) -> list[Finding]:
        """What has to be mended."""
        return [finding for finding in self.findings if finding.problem]

    @property
    def notes(self) -> list[Finding]:
        """What people should look at."""
        return [finding for finding in self.findings if not finding.problem]

    def verdict(self) -> str:
        """How much was found in how much."""
        problems, notes, rows = len(self.problems), len(self.notes), len(self.rows)
        counts = (
            f"{count or 'no'} {name}{'s' * (count != 1)}" for count, name in ((problems, "problem"), (notes, "note"))
        )
        return f"{' and '.join(counts)} in {rows} row{'s' * (rows != 1)}"


def check_data(
    options: CacheOptions, *, held_out: int = 0, workers: int | None = None, progress: Progress | None = None
) -> DataCheck:
    """Look at every row of both splits.

    Args:
        options: of the cache that would be made; base, teachers and cache folder are not looked at.
        held_out: last training rows that are held out where there is no validation_data.
        workers: processes that decode; None: as many as the options say.
        progress: called with (rows done, rows in all).

    Raises:
        ConfigError: sources that cannot be read at all; what is wrong with their rows is in the findings.
    """
    if not options.train_data:
        raise UserError("data.train_data must name the rows to check, got null")
    check = DataCheck()
    rows = _read(options, check)
    if "validation" not in options.manifests and held_out:
        _hold_out(rows, held_out)
    workers = options.num_workers if workers is None else workers
    looks = in_workers(RowInspector(options), [checked.row for checked in rows], workers)
    for number, (checked, look) in enumerate(zip(rows, looks, strict=True)):
        checked.look = look
        clip = checked.row.file_name
        check.findings += [replace(item, place=checked.place, clip=clip, row=number) for item in look.findings]
        if progress:
            progress(number + 1, len(rows))
    check.rows = rows
    check.findings += _long_captions(rows, options)
    check.findings += findings_between(rows)
    return check


def _read(options: CacheOptions, check: DataCheck) -> list[CheckedRow]:
    """The rows of all sources, not looked at yet; the sources and their readers' findings go to the check."""
    rows: list[CheckedRow] = []
    problems: list[str] = []
    for split, value in options.manifests.items():
        field_name = f"data.{split}_data"
        for number, source in enumerate(sources_of(value, field_name)):
            try:
                table, reading = read_source(source, max_references=options.max_references, field=field_name)
            except UserError as error:
                problems.append(str(error))
                continue
            found = SourceCheck(split, source, table, len(reading.rows), reading.problems, reading.left_out)
            check.sources.append(found)
            check.findings += [_of_table(table, problem) for problem in reading.problems]
            check.findings += [replace(_of_table(table, line), kind="outside") for line in reading.outside]
            rows += [_unseen(replace(row, source=number), found) for row in reading.rows]
    if problems:
        raise ConfigError(problems)
    return rows


def _long_captions(rows: list[CheckedRow], options: CacheOptions) -> Iterator[Finding]:
    """Captions that the base's text encoder does not see whole; nothing where its tokenizer is not here."""
    tokens = token_counter(options)
    for number, checked in enumerate(rows if tokens else []):
        if tokens and (count := tokens(checked.row.caption)) > (most := options.max_sequence_length):
            text = f"caption: {count} tokens, {most} are seen"
            yield Finding("long_caption", text, checked.place, checked.row.file_name, number)


def _of_table(table: str, problem: str) -> Finding:
    """A reader's problem; it opens with the row's number."""
    where, _, text = problem.partition(": ")
    placed = re.fullmatch(r"(line|row|record) \d+", where)
    return Finding("table", text, f"{table} {where}") if placed else Finding("table", problem, table)


def _unseen(row: Row, source: SourceCheck) -> CheckedRow:
    place = f"{source.table} {PLACES.get(Path(source.table).suffix, 'row')} {row.line}"
    return CheckedRow(source.split, source.table, place, source.source.format == NAMES_OF_OWNER, row, RowLook())


def _hold_out(rows: list[CheckedRow], count: int) -> None:
    """Mark the rows that training would hold out: the last ones of the cache, which is ordered by line."""
    for checked in sorted(rows, key=lambda checked: checked.row.line)[-count:]:
        checked.split = "validation"
