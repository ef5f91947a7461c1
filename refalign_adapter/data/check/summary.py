"""A checked data set in a few plain tables, for the terminal, for pages and for JSON alike."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from ...media.sizes import VideoFacts
from .between_rows import CheckedRow, distinct_subjects
from .check import DataCheck
from .findings import KINDS, by_kind

QUANTILES = {"smallest": 0.0, "25 %": 0.25, "median": 0.5, "75 %": 0.75, "largest": 1.0}
UNKNOWN_SIZE = "cannot be read"
FINDINGS = "Findings"
"""Title of the table that counts them."""
Cell = str | int | float


@dataclass(frozen=True)
class Table:
    """A table with a heading; the first column is text, the others mostly numbers.

    Attributes:
        title: what it shows.
        columns: their names.
        rows: as many cells each.
    """

    title: str
    columns: tuple[str, ...]
    rows: list[tuple[Cell, ...]]

    def to_json(self) -> list[dict[str, Cell]]:
        """A mapping per row."""
        return [dict(zip(self.columns, row, strict=True)) for row in self.rows]


def summarize(check: DataCheck) -> list[Table]:
    """The tables; those with nothing in them are left out."""
    tables = [
        _sources(check),
        _left_out(check),
        _sizes(check.rows),
        _clips([checked.look.video for checked in check.rows if checked.look.video]),
        _findings(check),
    ]
    return [table for table in tables if table.rows]


def _sources(check: DataCheck) -> Table:
    formats = {source.table: source.source.format for source in check.sources}
    groups: dict[tuple[str, str], list[CheckedRow]] = {(item.split, item.table): [] for item in check.sources}
    for checked in check.rows:
        groups.setdefault((checked.split, checked.table), []).append(checked)
    rows: list[tuple[Cell, ...]] = []
    for (split, table), found in groups.items():
        pairs = Counter(checked.row.pair for checked in found)
        counts = (len(found), pairs["regular"], pairs["cross"], distinct_subjects(found))
        rows.append((split, table, formats[table], *counts))
    return Table("Rows", ("split", "source", "format", "rows", "regular", "cross", "subjects"), rows)


def _left_out(check: DataCheck) -> Table:
    rows: list[tuple[Cell, ...]] = [
        (source.split, source.table, why, count)
        for source in check.sources
        for why, count in source.left_out.most_common()
    ]
    return Table("Records that the formats' rules leave out", ("split", "source", "reason", "records"), rows)


def _sizes(rows: Sequence[CheckedRow]) -> Table:
    counts = Counter((checked.look.size, len(checked.row.references)) for checked in rows)
    numbers = sorted({number for _, number in counts})
    sizes = sorted({size for size, _ in counts if size})

    def line(name: str, wanted: Any) -> tuple[Cell, ...]:
        cells = [sum(counts[size, number] for size in wanted) for number in numbers]
        return (name, *cells, sum(cells))

    lines = [line(str(size), [size]) for size in sizes]
    lines += [line(UNKNOWN_SIZE, [None])] if any(size is None for size, _ in counts) else []
    lines += [line("all", [None, *sizes])] if len(lines) > 1 else []
    names = [f"{number} reference{'s' * (number != 1)}" for number in numbers]
    return Table("Clips by size (frames x height x width) and number of references", ("size", *names, "all"), lines)


def _clips(videos: Sequence[VideoFacts]) -> Table:
    values = {
        "frames a second": [video.fps for video in videos],
        "width": [video.width for video in videos],
        "height": [video.height for video in videos],
        "frames": [video.num_frames for video in videos],
        "seconds": [video.num_frames / video.fps for video in videos if video.fps],
    }
    rows: list[tuple[Cell, ...]] = [
        (name, *map(_rounded, np.quantile(found, list(QUANTILES.values())).tolist()))
        for name, found in values.items()
        if found
    ]
    return Table("Clips as they are, after their rows' segment and crop", ("quantity", *QUANTILES), rows)


def _rounded(value: float) -> int | float:
    value = round(value, 2)
    return int(value) if value.is_integer() else value


def _findings(check: DataCheck) -> Table:
    rows: list[tuple[Cell, ...]] = [
        (KINDS[kind].title, "problem" if KINDS[kind].problem else "note", len(found))
        for kind, found in by_kind(check.findings).items()
    ]
    return Table(FINDINGS, ("kind", "level", "count"), rows)
