"""Ctrl-C and SIGTERM end training after the step in hand, not in the middle of it."""

from __future__ import annotations

import os
import signal
import time
from types import FrameType
from typing import Any

from accelerate import Accelerator


class Interrupted(Exception):
    """Training was stopped by a signal; what it had done is in a checkpoint.

    Args:
        signal_number: of the signal.
        message: one line: where it stopped and how to go on.
    """

    def __init__(self, signal_number: int, message: str):
        super().__init__(message)
        self.exit_code = 128 + signal_number


class SignalWatch:
    """Inside the context, SIGINT and SIGTERM are noted; Ctrl-C once more, a second later, raises KeyboardInterrupt.

    What comes at once does not: launchers pass a signal on that the terminal has sent to all processes anyway.

    Attributes:
        received: the first signal's number, or 0.
    """

    def __init__(self) -> None:
        self.received = 0
        self._since = 0.0
        self._process = os.getpid()
        self._previous: dict[int, Any] = {}

    def __enter__(self) -> SignalWatch:
        for number in (signal.SIGINT, signal.SIGTERM):
            self._previous[number] = signal.signal(number, self._note)
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)

    def _note(self, number: int, _: FrameType | None) -> None:
        if os.getpid() != self._process:  # a data worker, forked in here: it goes when the training process says so
            if number == signal.SIGTERM:
                os._exit(128 + number)
        elif not self.received:
            self.received, self._since = number, time.monotonic()
            if os.environ.get("RANK", "0") == "0":
                os.write(2, b"\nstopping after this step; Ctrl-C again stops at once, without a checkpoint of it\n")
        elif number == signal.SIGINT and time.monotonic() - self._since > 1:
            raise KeyboardInterrupt

    def anywhere(self, accelerator: Accelerator) -> int:
        """The signal that any process has received, or 0; the same on all of them, so that they stop together."""
        if accelerator.num_processes == 1:
            return self.received
        import torch

        flag = torch.tensor([self.received], device=accelerator.device)
        return int(accelerator.gather(flag).max())  # type: ignore[union-attr]
