"""Atomic writes. What is written is there whole or not at all, and a write that fails is one clear line."""

from __future__ import annotations

import errno
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from .errors import UserError
from .exchange import exchange
from .files import writing
from .leftovers import temporary_path


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
