"""One run at a time in an output folder. The operating system gives up the lock of a killed run."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from ..errors import UserError
from ..files import lock_file

try:
    import fcntl
except ImportError:  # no such locks on Windows: there, nobody is warned
    fcntl = None

LOCK_NAME = ".run.lock"


@contextmanager
def only_run(output_dir: Path) -> Iterator[None]:
    """No other run writes to `output_dir` inside the context. To be entered by one process of a run.

    The lock is the process's own and not inherited: a data worker that outlives it for a moment does not hold it.

    Raises:
        UserError: another run is at work there, or what stands in the lock's place is no file.
    """
    with lock_file(output_dir / LOCK_NAME, "output_dir") as file:
        if fcntl is not None:
            try:
                fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except (BlockingIOError, PermissionError):
                raise UserError(
                    f"output_dir: another run is writing to {str(output_dir)!r}; wait until it is done, or choose "
                    "another folder"
                ) from None
            except OSError:  # a network file system without locks: there, nobody is warned either
                pass
        yield
