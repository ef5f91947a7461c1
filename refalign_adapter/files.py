"""Atomic writes. What is written is there whole or not at all, and a write that fails is one clear line.

Temporary files are named `.<name>.<host>.<process>-<its start>.tmp`, so that the next run can tell those of dead
processes from those of live ones, see `remove_leftovers`. A process's number alone would not do: it is given again.
"""

from __future__ import annotations

import errno
import os
import re
import shutil
import socket
import stat
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import IO

from .errors import UserError, WriteError
from .exchange import exchange

PICKLE_SUFFIXES = {".bin", ".ckpt", ".pkl", ".pickle", ".pt", ".pth"}
HOST = re.sub(r"[^\w-]", "-", socket.gethostname())[:32] or "host"
ABANDONED = 86_400.0
"""Seconds after which a temporary file of another host is taken to be a dead process's."""
_TEMPORARY = re.compile(
    r"\.(?P<name>.+)\.(?P<host>[\w-]+)\.(?P<process>\d+)(-(?P<start>\d+))?\.(?P<kind>tmp|old)(?P<suffix>\.\w+)?"
)
_OLDER = re.compile(r"\.(?P<name>.+)\.(?P<process>\d+)\.(?P<kind>tmp|old)(?P<suffix>\.\w+)?")
"""As versions before 0.2 named them."""
_SYSTEM_ERROR = re.compile(r"\(os error (\d+)\)")
"""How libraries written in Rust (safetensors) tell what the system said."""
ADVICE = {
    errno.ENOSPC: "free some space",
    errno.EDQUOT: "free some of your quota",
    errno.EROFS: "choose a folder that is not read-only",
    errno.EACCES: "choose a writable folder",
    errno.EPERM: "choose a writable folder",
    errno.EEXIST: "a file is in the way, choose another folder",
    errno.ENOTDIR: "a file is in the way, choose another folder",
    errno.EISDIR: "a folder is in the way, move it away",
    errno.ENOENT: "its folder is gone; make it again or choose another",
}
"""What the system says -> the way out."""
KINDS = {
    stat.S_IFIFO: "a named pipe",
    stat.S_IFSOCK: "a socket",
    stat.S_IFCHR: "a device",
    stat.S_IFBLK: "a device",
    stat.S_IFDIR: "a folder",
}


def require_regular(path: str | Path) -> None:
    """Before a file is opened: what is none may keep whoever opens or reads it waiting for ever.

    Raises:
        OSError: it is not there, or cannot be looked at.
        ValueError: it is a named pipe, a socket, a device or a folder.
    """
    kind = stat.S_IFMT(os.stat(path).st_mode)
    if kind != stat.S_IFREG:
        raise ValueError(f"{KINDS.get(kind, 'something else')}, not a file")


def require_writable_folder(path: str | Path, field: str = "output") -> Path:
    """Create the folder `path` and prove that files can be written in it.

    Raises:
        UserError: the path is a file, or the folder cannot be created or written.
    """
    folder = Path(path)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            pass
    except (OSError, ValueError) as error:
        reason = getattr(error, "strerror", None) or error
        raise UserError(f"{field}: cannot write to {str(folder)!r} ({reason}); choose a writable folder") from None
    return folder


@contextmanager
def writing(path: str | Path) -> Iterator[None]:
    """What the system refuses inside the context becomes one line that names `path`.

    Raises:
        WriteError: the disk is full, the folder read-only or gone, or the like.
    """
    try:
        yield
    except Exception as error:
        if isinstance(error, UserError) or (number := system_error(error)) is None:
            raise
        reason, advice = os.strerror(number) if number else str(error), ADVICE.get(number, "look after that disk")
        raise WriteError(f"cannot write {str(path)!r} ({reason}); {advice}") from error


def system_error(error: BaseException) -> int | None:
    """The system's error number behind an exception, 0 where it has none; None when the system is not to blame."""
    if isinstance(error, OSError):
        return error.errno or 0
    if type(error).__name__ == "SafetensorError" and (found := _SYSTEM_ERROR.search(str(error))):
        return int(found[1])
    return None


def lock_file(path: str | Path, field: str) -> IO[bytes]:
    """Open a file that processes lock, and make it where there is none.

    Raises:
        UserError: a pipe, a folder or the like stands there, which could keep its opener waiting for ever.
        WriteError: it cannot be opened.
    """
    with writing(path):
        try:
            require_regular(path)
        except FileNotFoundError:
            pass
        except ValueError as error:
            raise UserError(f"{field}: {str(path)!r} is {error}; delete it") from None
        return open(path, "ab")


@contextmanager
def atomic_file(path: str | Path, *, durable: bool = True) -> Iterator[Path]:
    """Yield a temporary path beside `path`; on success it replaces `path`, on any exception it is removed.

    The temporary file keeps `path`'s suffix, so that writers that look at it (video, image) see the real format. The
    file gets the mode that the process's umask gives, whichever its writer chose.

    Args:
        path: the file.
        durable: whether it must survive a power cut once this returns; what can be made again need not.

    Raises:
        WriteError: it cannot be written. An older file is as it was.
    """
    target = Path(path)
    temporary = temporary_path(target, "tmp")
    try:
        with writing(target):
            target.parent.mkdir(parents=True, exist_ok=True)
            temporary.touch()
            mode = temporary.stat().st_mode
            yield temporary
            _settle(temporary, mode, durable)
            os.replace(temporary, target)
            if durable:
                _sync(target.parent)
    finally:
        with suppress(OSError):
            temporary.unlink(missing_ok=True)


@contextmanager
def atomic_folder(path: str | Path) -> Iterator[Path]:
    """Yield an empty temporary folder beside `path`; on success it replaces `path`, on any exception it is removed.

    Of an existing folder, what the new one does not contain is kept: a user may save into a folder with files of their
    own. Both change places in one step where the file system can; elsewhere the old one is moved aside first and
    deleted last, so that at every moment one whole version is on disk. It survives a power cut once this returns.

    Raises:
        UserError: `path` is a file.
        WriteError: it cannot be written. An older folder is as it was.
    """
    target = Path(path).resolve()
    if target.exists() and not target.is_dir():
        raise UserError(f"{str(path)!r} is a file; choose a folder")
    temporary = temporary_path(target, "tmp")
    try:
        with writing(target):
            target.parent.mkdir(parents=True, exist_ok=True)
            shutil.rmtree(temporary, ignore_errors=True)
            temporary.mkdir()
            yield temporary
            _settle_all(temporary)
            if target.exists():
                _adopt(target, temporary)
                _swap(temporary, target)
            else:
                os.replace(temporary, target)
            _sync(target.parent)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


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


def _settle_all(folder: Path) -> None:
    """Modes and durability of everything in a folder."""
    probe = folder / f".{os.getpid()}.probe"
    probe.touch()
    mode = probe.stat().st_mode
    probe.unlink()
    for path in sorted(folder.rglob("*"), reverse=True):
        if path.is_dir():
            _sync(path)
        else:
            _settle(path, mode, durable=True)
    _sync(folder)


def _settle(path: Path, mode: int, durable: bool) -> None:
    os.chmod(path, mode)
    if durable:
        _sync(path)


def _sync(path: Path) -> None:
    """Have the system write a file, or a folder's list of names, to disk."""
    try:
        descriptor = os.open(path, os.O_RDONLY)
    except PermissionError:  # Windows opens no folders
        return
    try:
        os.fsync(descriptor)
    except OSError as error:
        if error.errno not in (errno.EINVAL, errno.ENOTSUP, errno.EBADF):  # a file system that cannot
            raise
    finally:
        os.close(descriptor)


def _adopt(old: Path, new: Path) -> None:
    """Have `new` contain what `old` alone contains, by links where the file system has them: nothing is moved away."""
    for entry in old.iterdir():
        if not os.path.lexists(new / entry.name):
            if entry.is_dir() and not entry.is_symlink():
                shutil.copytree(entry, new / entry.name, symlinks=True, copy_function=_link)
            else:
                _link(entry, new / entry.name)


def _link(source: str | Path, target: str | Path) -> None:
    try:
        os.link(source, target, follow_symlinks=False)
    except (OSError, NotImplementedError):
        shutil.copy2(source, target, follow_symlinks=False)


def _swap(new: Path, target: Path) -> None:
    """Put `new` in the place of `target`; the old version is at `new`'s place then, or gone."""
    if exchange(new, target):
        return
    previous = temporary_path(target, "old")
    os.replace(target, previous)
    try:
        os.replace(new, target)
    except BaseException:
        os.replace(previous, target)
        raise
    shutil.rmtree(previous, ignore_errors=True)
