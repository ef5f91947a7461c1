"""Two paths change places in one step, where the system can do that (Linux, renameat2)."""

from __future__ import annotations

import ctypes
import os
import sys
from pathlib import Path

AT_FDCWD, RENAME_EXCHANGE = -100, 2
"""Of linux/fcntl.h and linux/fs.h."""


def exchange(first: Path, second: Path) -> bool:
    """Have two existing paths of one file system change places; whether it was done. Nothing has changed if not."""
    if not sys.platform.startswith("linux"):
        return False
    try:
        renameat2 = ctypes.CDLL(None, use_errno=True).renameat2
    except (OSError, AttributeError):  # musl, or a C library from before 2018
        return False
    return renameat2(AT_FDCWD, os.fsencode(first), AT_FDCWD, os.fsencode(second), RENAME_EXCHANGE) == 0
