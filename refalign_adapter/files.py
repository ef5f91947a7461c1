"""What files and folders are before they are used, and in one clear line what the system refuses."""

from __future__ import annotations

import errno
import os
import re
import stat
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO

from .errors import UserError, WriteError

PICKLE_SUFFIXES = {".bin", ".ckpt", ".pkl", ".pickle", ".pt", ".pth"}
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
