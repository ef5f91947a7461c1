"""Where a data set's tables are and what is in them: local files and folders, and data sets on the Hub.

Parquet and Arrow are read by the `datasets` library, streamed: the first rows of a large table come at once and
nothing is copied. JSON lines and CSV are read one by one, so that each faulty one is told by its number and the others
stay.
"""

from __future__ import annotations

import csv
import os
import re
import stat
from collections.abc import Iterator, Sequence
from itertools import count, islice
from pathlib import Path
from typing import Any, TextIO

from ...errors import UserError, one_line, shorten
from ...hub import fetch
from ...json_files import parse_json, read_bytes
from .nesting import ShallowJSON

BUILDERS = {".parquet": "parquet", ".arrow": "arrow"}
TEXTS = (".csv", ".tsv")
TABLE_SUFFIXES = (".jsonl", ".json", *TEXTS, *BUILDERS)
SEPARATORS = ",;\t"
MAX_LINE = 16 * 2**20
"""Characters; a row has some hundred."""


def is_hub_id(path: str) -> bool:
    """Whether a path that does not exist here can be the name of a data set on the Hub: `user/name`."""
    known = bool(re.fullmatch(r"[\w.-]+/[\w.-]+", path)) and not path.startswith((".", "~"))
    return known and not path.endswith(TABLE_SUFFIXES) and not Path(path).exists()


def local_path(path: str, patterns: Sequence[str] | None = None, *, revision: str | None = None) -> Path:
    """A path here: itself, or the folder that a data set on the Hub is downloaded to.

    Args:
        path: a file, a folder, or the Hub's `user/name`.
        patterns: which files of it to download; None: all.
        revision: branch, tag or commit on the Hub.

    Raises:
        UserError: the Hub does not know it or cannot be reached, see `fetch`.
    """
    if not is_hub_id(path):
        return Path(path)
    return fetch(path, field="path", repo_type="dataset", revision=revision, patterns=patterns)


def read_table(path: Path, max_rows: int | None = None) -> Iterator[tuple[int, Any]]:
    """(number from 1, row) of a table, one at a time; a row that cannot be read is a UserError in its place.

    Args:
        path: .jsonl, .csv, .tsv, .parquet or .arrow.
        max_rows: read no more than these.

    Raises:
        UserError: the file is missing or no such table.
    """
    suffix = path.suffix.lower()
    read = _stream if suffix in BUILDERS else _csv_rows if suffix in TEXTS else _json_lines
    yield from islice(read(path), max_rows)


def _json_lines(path: Path) -> Iterator[tuple[int, Any]]:
    """One JSON value a line, or all of them in one array."""
    try:
        _check_regular(path)
        with path.open(encoding="utf-8-sig", newline="\n") as file:
            if path.suffix.lower() in (".json", ".jsonl") and _opens_list(file):
                yield from _json_array(path)
                return
            file.seek(0)
            for number in count(1):
                line = file.readline(MAX_LINE + 1)
                if len(line) > MAX_LINE:
                    raise UserError(f"cannot read {str(path)!r} (line {number} has more than {MAX_LINE:,} characters)")
                if line.strip():
                    yield number, _json_value(line)
                if not line:
                    return
    except (OSError, UnicodeDecodeError) as error:
        reason = getattr(error, "strerror", None) or "not UTF-8 text; save it as UTF-8"
        raise UserError(f"cannot read {str(path)!r} ({reason})") from None


def _opens_list(file: TextIO) -> bool:
    """Whether the first character that is no blank opens a list."""
    while chunk := file.read(4096):
        if text := chunk.lstrip():
            return text.startswith("[")
    return False


def _json_array(path: Path) -> Iterator[tuple[int, Any]]:
    try:
        values = parse_json(read_bytes(path))
    except ValueError as error:
        raise UserError(f"cannot read {str(path)!r} as one list ({error}); or write one object a line") from None
    yield from enumerate(values, 1)


def _json_value(line: str) -> Any:
    try:
        return parse_json(line)
    except ValueError as error:
        return UserError(f"is not JSON ({error})")


def _check_regular(path: Path) -> None:
    """Refuse what may never end.

    Raises:
        UserError: a pipe or a device.
    """
    mode = os.stat(path).st_mode
    if not stat.S_ISREG(mode) and not stat.S_ISDIR(mode):
        raise UserError(f"cannot read {str(path)!r} (a pipe or device, not a file)")


def _csv_rows(path: Path) -> Iterator[tuple[int, Any]]:
    """Rows of a text table, every value as it is written: 007 stays 007. An empty value is left out.

    Values are separated by what separates the names in the first line: commas, semicolons or tabs.
    """
    try:
        _check_regular(path)
        with path.open(encoding="utf-8-sig", newline="") as file:
            header = file.readline(MAX_LINE)
            file.seek(0)
            separator = max(SEPARATORS, key=header.count)
            rows = csv.DictReader(file, delimiter=separator, strict=True)
            _check_names(path, rows.fieldnames or ())
            for number, row in enumerate(rows, 1):
                if None in row or None in row.values():
                    yield number, UserError(f"has other columns than the first line ({shorten(header.strip())})")
                else:
                    yield number, {name: value for name, value in row.items() if value != ""}
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        reason = getattr(error, "strerror", None) or (
            "not UTF-8 text; save it as UTF-8" if isinstance(error, UnicodeDecodeError) else error
        )
        raise UserError(f"cannot read {str(path)!r} as csv ({reason})") from None


def _check_names(path: Path, names: Sequence[str]) -> None:
    """Refuse two columns of one name: only the last one's values would be seen.

    Columns without a name, which spreadsheets leave at the end of each line, may be several.

    Raises:
        UserError: a name is there twice.
    """
    if twice := next((name for name in names if name and names.count(name) > 1), None):
        raise UserError(
            f"cannot read {str(path)!r} as csv (its first line names column {shorten(twice)} "
            f"{names.count(twice)} times); rename or delete all but one"
        )


def _stream(path: Path) -> Iterator[tuple[int, Any]]:
    """Rows of a table that `datasets` reads; a column that is empty in a row is left out of it."""
    if not path.is_file():
        raise UserError(f"cannot read {str(path)!r} (No such file or directory)")
    try:
        from datasets import load_dataset
        from datasets.exceptions import DatasetsError
    except ImportError:
        raise UserError(
            f"cannot read {str(path)!r}: datasets is not installed; pip install 'refalign-adapter[train]'"
        ) from None
    builder = BUILDERS[path.suffix.lower()]
    try:
        table = load_dataset(builder, data_files=str(path), split="train", streaming=True)
        for number, row in enumerate(table, 1):
            yield number, {name: value for name, value in row.items() if value not in (None, "")}
    except (OSError, ValueError, KeyError, DatasetsError) as error:
        reason = one_line(error)
        raise UserError(f"cannot read {str(path)!r} as {builder} ({reason})") from None


def read_records(path: Path) -> Iterator[tuple[str, Any]]:
    """(name, record) of a JSON file that maps names to records, one at a time: such files can be larger than memory.

    Raises:
        UserError: it is missing, unreadable or something else, or ijson is not installed.
    """
    try:
        import ijson
    except ImportError:
        raise UserError(
            f"cannot read {str(path)!r}: ijson is not installed; pip install 'refalign-adapter[train]'"
        ) from None
    try:
        _check_regular(path)
        with path.open("rb") as file:
            if file.read(64).lstrip()[:1] != b"{":
                raise UserError(f"path: {str(path)!r} must be a JSON object that maps names to records")
            file.seek(0)
            yield from ijson.kvitems(ShallowJSON(file), "", use_float=True)
    except FileNotFoundError:
        raise UserError(f"path: {str(path)!r} does not exist") from None
    except (OSError, ValueError, ijson.JSONError) as error:
        if isinstance(error, UserError):
            raise
        reason = one_line(error)
        raise UserError(f"path: {str(path)!r} is not readable JSON ({reason})") from None
