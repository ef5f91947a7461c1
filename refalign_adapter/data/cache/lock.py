"""Who works on a cache: any number of runs that fill it, or one that deletes from it.

The operating system gives up the lock of a killed run.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from ...errors import UserError
from ...files import lock_file

try:
    import fcntl
except ImportError:  # no such locks on Windows: there, nobody is warned
    fcntl = None

LOCK_NAME = ".lock"


@contextmanager
def filling(cache_dir: str | Path) -> Iterator[None]:
    """Nothing is deleted from the cache inside the context; others may fill it too.

    Raises:
        UserError: what stands in the lock's place is no file.
        WriteError: it cannot be opened.
    """
    with lock_file(Path(cache_dir) / LOCK_NAME, "cache_dir") as file:
        if fcntl is not None:
            with suppress(OSError):  # a network file system without locks: there, nobody is warned either
                fcntl.flock(file, fcntl.LOCK_SH)
        yield


@contextmanager
def deleting(cache_dir: str | Path) -> Iterator[None]:
    """Nothing fills the cache inside the context.

    Raises:
        UserError: a run is filling it.
    """
    with lock_file(Path(cache_dir) / LOCK_NAME, "cache_dir") as file:
        if fcntl is not None:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except OSError:
                raise UserError(
                    f"cache_dir: {str(cache_dir)!r} is in use by a run that fills it; try again when it is done"
                ) from None
        yield
