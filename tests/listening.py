"""Wait until a process answers signals: before, while Python starts, they end it as they end any program."""

import signal
import time
from pathlib import Path


def wait_until_it_listens(process, seconds=60):
    """Return once `process` has a handler of its own for SIGTERM, or has ended."""
    deadline = time.monotonic() + seconds
    while process.poll() is None and time.monotonic() < deadline:
        try:
            status = Path(f"/proc/{process.pid}/status").read_text()
        except (FileNotFoundError, ProcessLookupError):
            return
        caught = int(status.partition("SigCgt:")[2].split()[0], 16)
        if caught >> (signal.SIGTERM - 1) & 1:
            return
        time.sleep(0.01)
