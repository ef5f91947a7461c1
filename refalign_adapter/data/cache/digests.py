"""Digests of files, remembered from run to run, so that an unchanged data set is not read again to know it.

cache_dir/digests.jsonl    one line per file: [path, size, modified, status changed, sha256, checksum of the five],
                           times in nanoseconds

Lines are only ever appended, each in one write, so that several processes may do it at once; of a path's lines the
last counts. A line that is torn or damaged is left out: its file is hashed again, no more. Lines of before 0.2 have no
checksum.
"""

from __future__ import annotations

import json
import os
import time
import zlib
from contextlib import suppress
from pathlib import Path
from typing import Any

from ...atomic import atomic_file
from ...errors import UserError
from ...files import require_regular
from ...hashes import file_digest
from ...json_files import parse_json

DIGESTS_NAME = "digests.jsonl"
SETTLED = 2_000_000_000
"""Nanoseconds after a change before which a file is not remembered: clocks of file systems are that coarse, and a
second change within one tick would not show."""

Stamp = tuple[int, int, int]
"""Size, time of the last change of the content, time of the last change of anything, which cannot be set back."""


class FileDigests:
    """Calling it with a path gives the sha256 of the file's bytes.

    A file is hashed once, and again when its size or a time stamp has changed. It can be handed to worker processes.

    Args:
        folder: the cache folder.
        rehash: hash every file anew, whatever is remembered.
    """

    def __init__(self, folder: str | Path, *, rehash: bool = False):
        self.path = Path(folder) / DIGESTS_NAME
        self.known = {} if rehash else _read(self.path)[0]

    def __call__(self, path: str | Path) -> str:
        """sha256 of the file.

        Raises:
            UserError: the file cannot be read.
        """
        name, stamp = os.path.abspath(path), _stamp(path)
        stamp_then, digest = self.known.get(name, (None, ""))
        if stamp_then == stamp:
            return digest
        digest = file_digest(path)
        if _stamp(path) == stamp and time.time_ns() - max(stamp[1:]) > SETTLED:
            self._remember(name, stamp, digest)
        return digest

    def _remember(self, name: str, stamp: Stamp, digest: str) -> None:
        self.known[name] = stamp, digest
        with suppress(OSError, ValueError):  # a cache may be read where it is read-only
            if os.path.lexists(self.path):
                require_regular(self.path)
            with self.path.open("ab", buffering=0) as file:
                file.write(_line(name, stamp, digest))

    def tidy(self) -> None:
        """Drop lines that later ones replace; for one process, before the others begin to append."""
        known, lines = _read(self.path)
        if lines > len(known):
            with atomic_file(self.path) as temporary:
                temporary.write_bytes(b"".join(_line(name, *entry) for name, entry in known.items()))


def _stamp(path: str | Path) -> Stamp:
    try:
        status = os.stat(path)
    except OSError as error:
        raise UserError(f"cannot read {str(path)!r} ({error.strerror})") from None
    return status.st_size, status.st_mtime_ns, status.st_ctime_ns


def _line(name: str, stamp: Stamp, digest: str) -> bytes:
    values = [name, *stamp, digest]
    return json.dumps([*values, _checksum(values)]).encode() + b"\n"


def _checksum(values: list[Any]) -> int:
    return zlib.crc32(json.dumps(values).encode())


def _read(path: Path) -> tuple[dict[str, tuple[Stamp, str]], int]:
    """Path -> stamp and digest, and how many lines there are."""
    known: dict[str, tuple[Stamp, str]] = {}
    lines: list[bytes] = []
    with suppress(OSError, ValueError):  # what cannot be read is hashed again
        require_regular(path)
        lines = path.read_bytes().splitlines()
    for line in lines:
        try:
            name, size, modified, changed, digest, *checksum = parse_json(line)
        except (ValueError, TypeError):
            continue
        whole = not checksum or checksum == [_checksum([name, size, modified, changed, digest])]
        if whole and isinstance(name, str) and isinstance(digest, str) and len(digest) == 64:
            known[name] = (size, modified, changed), digest
    return known, len(lines)
