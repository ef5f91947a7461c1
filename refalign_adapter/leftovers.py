"""What killed processes left half-written is told from what live ones are writing, by its name.

Temporary files are named `.<name>.<host>.<process>-<its start>.tmp`, so that the next run can tell those of dead
processes from those of live ones, see `remove_leftovers`. A process's number alone would not do: it is given again.
"""

from __future__ import annotations

import os
import re
import shutil
import socket
import sys
import time
from contextlib import suppress
from pathlib import Path

HOST = re.sub(r"[^\w-]", "-", socket.gethostname())[:32] or "host"
ABANDONED = 86_400.0
"""Seconds after which a temporary file of another host is taken to be a dead process's."""
_TEMPORARY = re.compile(
    r"\.(?P<name>.+)\.(?P<host>[\w-]+)\.(?P<process>\d+)(-(?P<start>\d+))?\.(?P<kind>tmp|old)(?P<suffix>\.\w+)?"
)
_OLDER = re.compile(r"\.(?P<name>.+)\.(?P<process>\d+)\.(?P<kind>tmp|old)(?P<suffix>\.\w+)?")
"""As versions before 0.2 named them."""


def remove_leftovers(folder: str | Path) -> None:
    """Delete what killed processes left half-written directly in `folder`, and put back what one had moved aside.

    What a live process of this machine is writing stays, and so does what another machine may still be writing.
    """
    found: list[Path] = []
    with suppress(OSError):
        found = sorted(Path(folder).glob(".*.*"))
    for path in found:
        with suppress(OSError):  # another run is at it too
            _remove_leftover(path)


def _remove_leftover(path: Path) -> None:
    found = _TEMPORARY.fullmatch(path.name) or _OLDER.fullmatch(path.name)
    if found is None or not _is_dead(path, found):
        return
    target = path.with_name(found["name"] + (found["suffix"] or ""))
    if found["kind"] == "old" and not target.exists():
        os.replace(path, target)
    elif path.is_dir() and not path.is_symlink():
        shutil.rmtree(path, ignore_errors=True)
    else:
        path.unlink(missing_ok=True)


def _is_dead(path: Path, found: re.Match[str]) -> bool:
    if found.groupdict().get("host") not in (None, HOST):
        return time.time() - path.lstat().st_mtime > ABANDONED
    process, start = int(found["process"]), found.groupdict().get("start")
    try:
        os.kill(process, 0)
    except (ProcessLookupError, OverflowError):
        return True
    except PermissionError:  # of another user; whether it is the same process is still to be seen
        pass
    started = process_start(process)
    if process == 0 or started == 0:
        return True
    if start is not None:
        return started is not None and started != int(start)
    return _began_later(process, path.lstat().st_mtime)


def process_start(process: int) -> int | None:
    """When a process started, as the system counts: with its number, this tells it from every other one.

    Returns:
        0 for one that is dead and only waits to be fetched by its parent; None where it cannot be told.
    """
    if sys.platform.startswith("linux"):
        with suppress(OSError, ValueError, IndexError):
            state = Path(f"/proc/{process}/stat").read_text(errors="replace").rpartition(")")[2].split()
            return 0 if state[0] in "ZX" else int(state[19])
    began = _began(process)
    return None if began is None else int(began * 1000)


def _began(process: int) -> float | None:
    import psutil

    try:
        return psutil.Process(process).create_time()
    except psutil.Error:
        return None


def _began_later(process: int, written: float) -> bool:
    """Whether a process began so long after a file was written that no difference of two clocks explains it: it has
    the number of the writer, whose start the file's name does not say, and is another one.
    """
    began = _began(process)
    return began is not None and began - written > ABANDONED


def temporary_path(target: Path, kind: str) -> Path:
    """A hidden name beside `target` by which the next run knows whose it is; `kind` is tmp or old."""
    process = os.getpid()
    start = process_start(process)
    known = f"{process}-{start}" if start else process
    return target.with_name(f".{target.stem}.{HOST}.{known}.{kind}{target.suffix}")
