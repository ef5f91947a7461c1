"""A recipe's `data.train_data` to rows: one source or a list of them, each a path or a mapping.

train_data: clips                                              a folder with a metadata.jsonl, or that file
train_data: {path: part1.json, format: opens2v_regular, videos: videos}
train_data: [{path: regular, ratio: 6}, {path: cross, ratio: 4}]
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

from ...config import unknown_key
from ...errors import ConfigError, UserError
from ...hashes import file_digest, hash_of
from .readers.base import Reader, Reading, Source, known_readers
from .rows import Row
from .tables import is_hub_id

logger = logging.getLogger(__name__)

COMMON = tuple(item.name for item in fields(Source) if item.name != "options")
TEXT = ("path", "format", "videos", "revision")
SourceValue = str | dict[str, Any]
SourcesValue = SourceValue | list[SourceValue]


def source_problems(value: Any, field: str = "train_data") -> Iterator[str]:
    """What is wrong with sources as a recipe gives them, a line each; files are not looked for."""
    items = value if isinstance(value, list) else [value]
    if not items:
        yield f"{field} must name at least one source, got []"
    for index, item in enumerate(items):
        yield from _item_problems(item, f"{field}.{index}" if isinstance(value, list) else field)
    given = [isinstance(item, dict) and item.get("ratio") is not None for item in items]
    if any(given) and not all(given):
        yield f"{field}: give every source a ratio, or none of them"


def _item_problems(item: Any, field: str) -> Iterator[str]:
    if isinstance(item, str | Path):
        if not str(item):
            yield f"{field} must be a path, got ''"
        return
    if not isinstance(item, dict):
        yield f"{field} must be a path or a mapping with one, got {item!r}"
        return
    readers = known_readers()
    name = item.get("format", "folder")
    if not isinstance(name, str) or name not in readers:
        yield f"{field}.format must be one of {', '.join(readers)}, got {name!r}"
    options = readers[name].options if isinstance(name, str) and name in readers else {}
    known = [f"{field}.{name}" for name in (*COMMON, *options)]
    yield from (unknown_key(name, known) for key in item if (name := f"{field}.{key}") not in known)
    if not item.get("path"):
        yield f"{field}.path is required"
    for key in TEXT:
        if not isinstance(item.get(key, ""), str | None):
            yield f"{field}.{key} must be text, got {item[key]!r}"
    ratio, most = item.get("ratio"), item.get("max_rows")
    if ratio is not None and not (type(ratio) in (int, float) and 0 < ratio < float("inf")):
        yield f"{field}.ratio must be a positive number, got {ratio!r}"
    if most is not None and not (type(most) is int and most > 0):
        yield f"{field}.max_rows must be a positive whole number, got {most!r}"
    for key, default in options.items():
        if key in item and not _of_type(item[key], default):
            kind = "text" if default is None or isinstance(default, str) else "a number"
            yield f"{field}.{key} must be {kind}, got {item[key]!r}"


def _of_type(value: Any, default: Any) -> bool:
    if isinstance(default, float):
        return type(value) in (int, float)
    return type(value) is int if isinstance(default, int) else isinstance(value, str)


def sources_of(value: Any, field: str = "train_data") -> list[Source]:
    """The sources, with their readers' options complete.

    Raises:
        ConfigError: everything that is wrong with them.
    """
    if problems := list(source_problems(value, field)):
        raise ConfigError(problems)
    return [_source(item) for item in (value if isinstance(value, list) else [value])]


def missing_paths(value: SourcesValue) -> list[str]:
    """Paths of the sources that do not exist here; data sets on the Hub are not looked for."""
    named = [path for source in sources_of(value) for path in (source.path, source.videos) if path]
    return [path for path in named if not Path(path).exists() and not is_hub_id(path)]


def _source(item: SourceValue | Path) -> Source:
    if not isinstance(item, dict):
        return Source(str(item))
    common = {key: value for key, value in item.items() if key in COMMON}
    options = {key: value for key, value in item.items() if key not in COMMON}
    source = Source(**common)
    return replace(source, options={**_reader(source).options, **options})


def _reader(source: Source) -> Reader:
    return known_readers()[source.format]


def manifest_path(value: SourcesValue | Path, number: int = 0) -> Path:
    """The table that stands for a source in messages: its main one.

    Args:
        value: a source or a list of them.
        number: which of them, counted from 0.

    Raises:
        UserError: there is none.
    """
    source = sources_of(value)[number]
    return _reader(source).tables(source)[0]


def sources_digest(value: SourcesValue | Path, digest: Callable[[str | Path], str] = file_digest) -> str:
    """A hash of everything that decides which rows the sources give; their ratios do not.

    Args:
        value: a source or a list of them.
        digest: hashes a file.

    Raises:
        UserError: a table that cannot be read.
    """
    sources = sources_of(value)
    if [replace(source, ratio=None, videos=None) for source in sources] == [Source(sources[0].path)]:
        return digest(manifest_path(value))  # as it was before there were other formats
    tables = [[digest(path) for path in _reader(source).tables(source)] for source in sources]
    return hash_of([[_settings(source), files] for source, files in zip(sources, tables, strict=True)])


def _settings(source: Source) -> dict[str, Any]:
    """A source's settings as JSON types, those left out that say only where it is and how much of it is used."""
    values = {name: getattr(source, name) for name in ("format", "max_rows")}
    return values | {"options": {key: value for key, value in source.options.items() if value is not None}}


def load_manifest(
    value: SourcesValue | Path, *, max_references: int | None = None, field: str = "train_data"
) -> list[Row]:
    """Read all rows of the sources and check that their files exist; clips and images are not opened.

    Args:
        value: a source or a list of them, see the module.
        max_references: most references that a row may have; None: any number.
        field: what errors call the value.

    Raises:
        UserError: a table is missing, or nothing is in it.
        ConfigError: every problem of the rows at once, each with its place.
    """
    rows: list[Row] = []
    problems: list[tuple[str, str]] = []
    for number, source in enumerate(sources_of(value, field)):
        table, reading = read_source(source, max_references=max_references, field=field)
        problems += [(table, problem) for problem in reading.problems]
        rows += [replace(row, source=number) for row in reading.rows]
    if len({table for table, _ in problems}) == 1:
        raise ConfigError([problem for _, problem in problems], problems[0][0])
    if problems:
        raise ConfigError([f"{table}: {problem}" for table, problem in problems])
    return rows


def read_source(
    source: Source, *, max_references: int | None = None, field: str = "train_data"
) -> tuple[str, Reading]:
    """A source's main table and what its reader found in it; records that are left out are logged.

    Raises:
        UserError: a table is missing, or nothing is in it that can be used.
    """
    reader = _reader(source)
    try:
        table = str(reader.tables(source)[0])
        reading = reader.read(source, max_references=max_references)
    except UserError as error:
        raise UserError(f"{field}: {error}") from None
    left_out = ", ".join(f"{count} {why}" for why, count in reading.left_out.most_common())
    if not reading.rows and not reading.problems:
        raise UserError(f"{field}: {table!r} has no rows" + (f" that can be used: {left_out}" if left_out else ""))
    if left_out:
        logger.warning("%s: %s rows; left out: %s", table, len(reading.rows), left_out)
    return table, reading
