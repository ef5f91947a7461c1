"""A folder on a file system so small that a test can fill it."""

import os
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

BLOCK = 4096


@contextmanager
def small_disk(folder: Path, size: int = 2 * 2**20) -> Iterator[Path]:
    """A new file system of `size` bytes, mounted on `folder` inside the context.

    The test is skipped where mounting is not permitted.
    """
    folder.mkdir(parents=True, exist_ok=True)
    options = ["mount", "-t", "tmpfs", "-o", f"size={size},mode=0777", "tmpfs", str(folder)]
    try:
        mounted = subprocess.run(options, capture_output=True, text=True, check=False)
    except FileNotFoundError:
        pytest.skip("there is no mount command")
    if mounted.returncode:
        pytest.skip(f"no small file system can be mounted here: {mounted.stderr.strip()}")
    try:
        yield folder
    finally:
        subprocess.run(["umount", "--lazy", str(folder)], check=True)


def fill(folder: Path, *, leave: int = 0) -> Path:
    """Fill the file system that `folder` is on, but for about `leave` bytes; returns the file that takes the space."""
    assert os.statvfs(folder).f_blocks * os.statvfs(folder).f_frsize < 2**30, "no small file system"
    ballast = folder / "ballast"
    status = os.statvfs(folder)
    free = status.f_bavail * status.f_frsize - leave
    with ballast.open("wb") as file:
        for _ in range(max(0, free) // BLOCK):
            file.write(bytes(BLOCK))
    return ballast
