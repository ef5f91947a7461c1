"""Where a data set's tables are and what is in them: local files and folders, and data sets on the Hub.

CSV, Parquet and Arrow are read by the `datasets` library, streamed: the first rows of a large table come at once and
nothing is copied. JSON lines are read one by one, so that each faulty line is told by its number and the others stay.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Sequence
from itertools import islice
from pathlib import Path
from typing import Any

from ..errors import UserError
from ..hub import fetch

BUILDERS = {".csv": "csv", ".tsv": "csv", ".parquet": "parquet", ".arrow": "arrow"}
TABLE_SUFFIXES = (".jsonl", ".json", *BUILDERS)


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
    rows = _stream(path) if path.suffix.lower() in BUILDERS else _json_lines(path)
    yield from islice(rows, max_rows)


def _json_lines(path: Path) -> Iterator[tuple[int, Any]]:
    try:
        with path.open(encoding="utf-8-sig", newline="\n") as file:
            for number, line in enumerate(file, 1):
                if line.strip():
                    yield number, _json_value(line)
    except (OSError, UnicodeDecodeError) as error:
        reason = getattr(error, "strerror", None) or "not UTF-8 text"
        raise UserError(f"cannot read {str(path)!r} ({reason})") from None


def _json_value(line: str) -> Any:
    try:
        return json.loads(line)
    except ValueError as error:
        return UserError(f"is not JSON ({error})")


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
    options: dict[str, Any] = {"sep": "\t"} if path.suffix.lower() == ".tsv" else {}
    if builder == "csv":
        options["na_filter"] = False  # a caption "None" is a caption
    try:
        table = load_dataset(builder, data_files=str(path), split="train", streaming=True, **options)
        for number, row in enumerate(table, 1):
            yield number, {name: value for name, value in row.items() if value not in (None, "")}
    except (OSError, ValueError, KeyError, DatasetsError) as error:
        reason = " ".join(str(error).split())[:200]
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
        with path.open("rb") as file:
            if file.read(64).lstrip()[:1] != b"{":
                raise UserError(f"path: {str(path)!r} must be a JSON object that maps names to records")
            file.seek(0)
            yield from ijson.kvitems(file, "", use_float=True)
    except FileNotFoundError:
        raise UserError(f"path: {str(path)!r} does not exist") from None
    except (OSError, ijson.JSONError) as error:
        reason = " ".join(str(error).split())[:200]
        raise UserError(f"path: {str(path)!r} is not readable JSON ({reason})") from None
