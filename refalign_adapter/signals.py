"""Signals that end a command: one line that says what that means, and the exit code that shells expect.

SIGINT (Ctrl-C), SIGTERM (kill, schedulers), SIGHUP (a closed terminal), SIGUSR1 (schedulers, before they pre-empt).
"""

from __future__ import annotations

import os
import select
import signal
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from types import FrameType
from typing import Any

NAMES = ("SIGINT", "SIGTERM", "SIGHUP", "SIGUSR1")
NUMBERS = tuple(int(getattr(signal, name)) for name in NAMES if hasattr(signal, name))
TOGETHER = 1.0
"""Seconds in which several signals count as one: launchers pass on what the terminal has sent to all anyway."""

_meanings = ["nothing was written"]
_handlers: list[_Handler] = []


class Stopped(BaseException):
    """A signal came. No KeyboardInterrupt, which click and others answer with lines of their own.

    Args:
        number: of the signal.
    """

    def __init__(self, number: int):
        super().__init__(number)
        self.number = number


class _Handler:
    """Raises `Stopped` in the process that installed it."""

    def __init__(self) -> None:
        self.received, self._since, self._process = 0, 0.0, os.getpid()

    def __call__(self, number: int, _: FrameType | None) -> None:
        if os.getpid() != self._process:  # a worker that was forked in here
            if number == signal.SIGTERM:
                os._exit(128 + number)
            return  # it goes when the command itself does
        now = time.monotonic()
        if self.received and now - self._since < TOGETHER:
            return
        self.received, self._since = number, now
        raise Stopped(number)


@contextmanager
def install(numbers: tuple[int, ...], handler: Any) -> Iterator[None]:
    """`handler` for these signals inside the context. One that is ignored, as nohup does with SIGHUP, stays so.

    Outside of the main thread, where Python takes no handlers, nothing is done.
    """
    previous = {}
    if threading.current_thread() is threading.main_thread():
        for number in numbers:
            if signal.getsignal(number) != signal.SIG_IGN:
                previous[number] = signal.signal(number, handler)
    try:
        yield
    finally:
        for number, before in previous.items():
            signal.signal(number, before)


@contextmanager
def ended_by_signals() -> Iterator[None]:
    """Around a whole command, from before its first slow import.

    Raises:
        SystemExit: 128 + n after signal n, once a line has said what being stopped there means. Whatever exception a
            library made of the signal on its way out, it counts as the signal.
    """
    handler = _Handler()
    _handlers.append(handler)
    try:
        with install(NUMBERS, handler):
            yield
    except BaseException as error:
        number = handler.received or _number_of(error)
        if not number or (isinstance(error, SystemExit) and error.code in (0, None)):
            raise
        tell(f"interrupted; {_meanings[-1]}")
        raise SystemExit(128 + number) from None
    finally:
        _handlers.pop()
        del _meanings[1:]


def _number_of(error: BaseException) -> int:
    """The signal that an exception stands for, or 0."""
    if isinstance(error, Stopped):
        return error.number
    return int(signal.SIGINT) if isinstance(error, KeyboardInterrupt) else 0


@contextmanager
def stopping_means(outcome: str) -> Iterator[None]:
    """What the line says if a signal comes inside the context, such as "run the same command again to go on"."""
    _meanings.append(outcome)
    try:
        yield
    except (Stopped, KeyboardInterrupt):
        raise  # it is still to be told
    except BaseException:
        if not any(handler.received for handler in _handlers):
            _meanings.pop()
        raise
    else:
        _meanings.pop()


def tell(line: str) -> None:
    """Print a line on standard error; nothing when the terminal is gone."""
    with terminal_may_be_gone():
        print(line, file=sys.stderr, flush=True)


@contextmanager
def terminal_may_be_gone() -> Iterator[None]:
    """What is printed inside the context is lost when the terminal is gone, and so is all that anybody prints later.

    A closed terminal fails every print with an OSError, of libraries too, which would end a run that has lost nothing
    but its audience.
    """
    try:
        yield
    except (OSError, ValueError):
        with suppress(OSError):
            nowhere = os.open(os.devnull, os.O_WRONLY)
            for stream in (1, 2):
                if _is_gone(stream):
                    os.dup2(nowhere, stream)
            os.close(nowhere)


def _is_gone(stream: int) -> bool:
    """Whether a terminal or pipe has nobody at its other end; files, which may be full, are not meant."""
    try:
        waiting = select.poll()
        waiting.register(stream, select.POLLOUT)
        return any(event & (select.POLLERR | select.POLLHUP) for _, event in waiting.poll(0))
    except (AttributeError, OSError):  # Windows has no poll
        return False
