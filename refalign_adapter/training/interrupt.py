"""Signals end training after the step in hand, not in the middle of it; and processes that fail do so together."""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from types import FrameType

from accelerate import Accelerator

from ..errors import UserError
from ..signals import NUMBERS, install, terminal_may_be_gone

LAUNCHED = "TORCHELASTIC_RUN_ID"
"""Of the environment that torch's launcher, which `accelerate launch` is for several processes, gives them."""


class Interrupted(Exception):
    """Training was stopped by a signal; what it had done is in a checkpoint.

    Args:
        signal_number: of the signal.
        message: one line: where it stopped and how to go on.
    """

    def __init__(self, signal_number: int, message: str):
        super().__init__(message)
        self.exit_code = 128 + signal_number


class FailedElsewhere(UserError):
    """Another process of the run has failed, and says why: nothing is left to be told."""


class SignalWatch:
    """Inside the context, signals are noted; Ctrl-C once more, a second later, raises KeyboardInterrupt.

    What comes at once does not: launchers pass a signal on that the terminal has sent to all processes anyway.

    Attributes:
        received: the first signal's number, or 0.
    """

    def __init__(self) -> None:
        self.received = 0
        self._since = 0.0
        self._process = os.getpid()
        self._launcher = os.getppid() if LAUNCHED in os.environ else 0
        self._installed: AbstractContextManager[None] | None = None

    def __enter__(self) -> SignalWatch:
        self._installed = install(NUMBERS, self._note)
        self._installed.__enter__()
        return self

    def __exit__(self, *_: object) -> None:
        if self._installed is not None:
            self._installed.__exit__(None, None, None)

    def _note(self, number: int, _: FrameType | None) -> None:
        if os.getpid() != self._process:  # a data worker, forked in here: it goes when the training process says so
            if number == signal.SIGTERM:
                os._exit(128 + number)
        elif not self.received:
            self.received, self._since = number, time.monotonic()
            if os.environ.get("RANK", "0") == "0":
                with terminal_may_be_gone():
                    os.write(
                        2, b"\nstopping after this step; Ctrl-C again stops at once, without a checkpoint of it\n"
                    )
        elif number == signal.SIGINT and time.monotonic() - self._since > 1:
            raise KeyboardInterrupt

    def anywhere(self, accelerator: Accelerator) -> int:
        """The signal that any process has received, or 0; the same on all of them, so that they stop together.

        A launcher that is gone counts as SIGTERM: it died of a signal that it would have passed on, and without it the
        run would hold its GPUs unseen.
        """
        if not self.received and self._launcher not in (0, os.getppid()):
            self.received = int(signal.SIGTERM)
        return largest(accelerator, self.received)


def largest(accelerator: Accelerator, number: int) -> int:
    """The largest of the processes' numbers, the same on all of them."""
    if accelerator.num_processes == 1:
        return number
    import torch

    return int(accelerator.gather(torch.tensor([number], device=accelerator.device)).max())  # type: ignore[union-attr]


@contextmanager
def together(accelerator: Accelerator) -> Iterator[None]:
    """Processes leave the context together: if a user's mistake or a disk stopped one, none goes on to wait for it.

    Nothing inside may wait for other processes but in a context of this kind: one that has failed would not be there.

    Raises:
        UserError: the process's own, of the first process that has one.
        FailedElsewhere: that was another process.
    """
    own: UserError | None = None
    try:
        yield
    except UserError as error:
        own = error
    place = accelerator.num_processes - accelerator.process_index
    tells = own is not None and not isinstance(own, FailedElsewhere)
    first = largest(accelerator, place if tells else 0)
    if own is not None and first == place:
        raise own
    if first:
        raise FailedElsewhere("training: stopped, as another process of the run has failed")
