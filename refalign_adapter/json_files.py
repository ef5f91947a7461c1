"""JSON in and out. What is read may come from anyone: of any size, depth and encoding, with keys twice."""

from __future__ import annotations

import codecs
import json
import os
import re
import stat
from collections.abc import Callable
from pathlib import Path
from typing import Any, NoReturn

from .atomic import atomic_file
from .errors import UserError

MAX_BYTES = 64 * 2**20
"""Of a file that is read whole. Tables of rows are read line by line and may be larger."""
MAX_DEPTH = 100
"""Of lists and objects in each other; what is deeper only makes trouble later, where it is compared or printed."""
_OTHER_ENCODINGS = {codecs.BOM_UTF16_LE: "UTF-16", codecs.BOM_UTF16_BE: "UTF-16"}
_HALF_OF_A_PAIR = re.compile(r"\\u[dD][89a-fA-F]")


def write_json(path: str | Path, value: Any) -> None:
    """Write `value` as indented JSON, atomically.

    Raises:
        WriteError: it cannot be written.
    """
    with atomic_file(path) as temporary:
        temporary.write_text(json.dumps(value, indent=2) + "\n", encoding="utf-8")


def read_json(path: str | Path, field: str = "file", *, max_bytes: int = MAX_BYTES) -> Any:
    """Read a JSON file; see `parse_json`.

    Raises:
        UserError: the file is missing, unreadable, too large, or not JSON.
    """
    try:
        return parse_json(read_bytes(path, max_bytes=max_bytes))
    except FileNotFoundError:
        raise UserError(f"{field}: {str(path)!r} does not exist") from None
    except (OSError, ValueError) as error:
        reason = getattr(error, "strerror", None) or error
        raise UserError(f"{field}: {str(path)!r} is not readable JSON ({reason})") from None


def read_bytes(path: str | Path, *, max_bytes: int = MAX_BYTES) -> bytes:
    """The bytes of a regular file; a pipe or device, which may never end, is not opened.

    Raises:
        OSError: it cannot be read, with a `strerror`.
        ValueError: it is no regular file, or larger than `max_bytes`.
    """
    status = os.stat(path)
    if not stat.S_ISREG(status.st_mode) and not stat.S_ISDIR(status.st_mode):
        raise ValueError("a pipe or device, not a file")
    with open(path, "rb") as file:
        content = file.read(max_bytes + 1)
    if len(content) > max_bytes:
        raise ValueError(f"larger than {max_bytes // 1024:,} KB")
    return content


def decode_text(content: bytes) -> str:
    """UTF-8 bytes, with or without a byte order mark, as text.

    Raises:
        ValueError: another encoding, with the one it looks like.
    """
    for mark, name in _OTHER_ENCODINGS.items():
        if content.startswith(mark):
            raise ValueError(f"{name} text; save it as UTF-8")
    try:
        return content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise ValueError(
            f"not UTF-8 text, byte {error.start} is {content[error.start]:#04x}; save it as UTF-8"
        ) from None


def parse_json(content: str | bytes, *, pairs: Callable[[list[tuple[str, Any]]], Any] | None = None) -> Any:
    """A value of JSON types from a text that anyone may have written.

    Args:
        content: text, or UTF-8 bytes.
        pairs: makes an object of its (key, value) pairs; None: a dict in which no key may stand twice.

    Raises:
        ValueError: not JSON by the standard, with a reason in one line: NaN and Infinity, keys twice, half a surrogate
            pair, and what is nested beyond `MAX_DEPTH` included.
    """
    text = decode_text(content) if isinstance(content, bytes) else content
    try:
        value = (_decoder(pairs) if pairs else _DECODER).decode(text)
    except RecursionError:
        raise ValueError(_TOO_DEEP) from None
    if text.count("[") + text.count("{") > MAX_DEPTH:
        _check_depth(value)
    if _HALF_OF_A_PAIR.search(text):
        try:
            json.dumps(value, ensure_ascii=False).encode()
        except UnicodeEncodeError:
            raise ValueError("a text in it holds half of a surrogate pair, which is no character") from None
    return value


_TOO_DEEP = f"lists and objects in it are nested more than {MAX_DEPTH} deep"


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    values = dict(pairs)
    if len(values) < len(pairs):
        seen: set[str] = set()
        twice = next(key for key, _ in pairs if key in seen or seen.add(key))
        raise ValueError(f"key {twice[:60]!r} is given twice")
    return values


def _refuse_constant(name: str) -> NoReturn:
    raise ValueError(f"{name} is no JSON value; write null, or leave it out")


def _decoder(pairs: Callable[[list[tuple[str, Any]]], Any]) -> json.JSONDecoder:
    return json.JSONDecoder(object_pairs_hook=pairs, parse_constant=_refuse_constant)


_DECODER = _decoder(_object)
"""`json.loads` makes one for every line, which takes a fifth of the time of reading a list of files."""


def _check_depth(value: Any) -> None:
    level = [value]
    for _ in range(MAX_DEPTH + 1):
        children = [item for item in level if isinstance(item, dict | list | tuple)]
        if not children:
            return
        level = [item for child in children for item in (child.values() if isinstance(child, dict) else child)]
    raise ValueError(_TOO_DEEP)
