"""Signals that end a command: one line that says what that means, and the exit code that shells expect.

SIGINT (Ctrl-C), SIGTERM (kill, schedulers), SIGHUP (a closed terminal), SIGUSR1 (schedulers, before they pre-empt).
A terminal that is gone, or a reader such as `head` that has seen enough, ends nothing: what is printed is lost.
"""

from __future__ import annotations

import atexit
import errno
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

from .errors import WriteError
from .files import writing

NAMES = ("SIGINT", "SIGTERM", "SIGHUP", "SIGUSR1")
NUMBERS = tuple(int(getattr(signal, name)) for name in NAMES if hasattr(signal, name))
TOGETHER = 1.0
"""Seconds in which several signals count as one: launchers pass on what the terminal has sent to all anyway."""
NOBODY_THERE = (errno.EIO, errno.EPIPE)
"""What the system says when nobody reads any more: of a terminal, of a pipe."""

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
            library made of the signal on its way out, it counts as the signal. 2 where standard output cannot be
            written, though somebody is there.
    """
    handler = _Handler()
    _handlers.append(handler)
    try:
        with install(NUMBERS, handler), _printing_never_fails():
            yield
    except BaseException as error:
        number = handler.received or _number_of(error)
        if not number or (isinstance(error, SystemExit) and error.code in (0, None)):
            raise
        if os.environ.get("RANK", "0") == "0":  # a launcher stops all its processes
            tell(f"interrupted; {_meanings[-1]}")
        raise SystemExit(128 + number) from None
    finally:
        _handlers.pop()
        del _meanings[1:]
        atexit.unregister(_nothing_to_stop)
        atexit.register(_nothing_to_stop)  # last, so that it is called first


def _nothing_to_stop() -> None:
    """The command is over and Python shuts down, which takes a moment: the exit code is no signal's any more.

    Ctrl-C still ends a process that hangs there.
    """
    for number in NUMBERS:
        if signal.getsignal(number) != signal.SIG_IGN:
            signal.signal(number, signal.SIG_DFL if number == signal.SIGINT else signal.SIG_IGN)


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
        _let_go_of_the_gone()


class _Forgiving:
    """A standard stream whose writing does not fail when nobody reads it.

    Args:
        stream: the stream; everything else is its own.
        name: what messages call it; None: nothing about it can be told, whatever it is that fails.
    """

    def __init__(self, stream: Any, name: str | None):
        self._stream, self._name = stream, name

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)

    def write(self, text: str) -> int:
        """Write a text; returns its length.

        Raises:
            WriteError: a full disk, or the like.
        """
        self._try(self._stream.write, text)
        return len(text)

    def flush(self) -> None:
        """Pass on what was written.

        Raises:
            WriteError: a full disk, or the like.
        """
        self._try(self._stream.flush)

    def _try(self, act: Any, *arguments: Any) -> None:
        try:
            act(*arguments)
        except OSError as error:
            _let_go_of_the_gone()
            if self._name is not None and error.errno not in NOBODY_THERE:
                _send_nowhere(1)  # Python would try once more as it shuts down
                with writing(self._name):
                    raise


@contextmanager
def _printing_never_fails() -> Iterator[None]:
    """Inside the context, libraries can print to a terminal that is gone; see `terminal_may_be_gone`.

    What is still buffered is written at the end: where Python does that, an error is an exit code of its own.

    Raises:
        SystemExit: 2, the standard output cannot be written; a line says why.
    """
    out, err = sys.stdout, sys.stderr
    sys.stdout, sys.stderr = forgiving = _Forgiving(out, "standard output"), _Forgiving(err, None)
    try:
        yield
    finally:
        try:
            for stream in forgiving:
                stream.flush()
        except WriteError as error:
            tell(f"error: {error}")
            raise SystemExit(2) from None
        finally:
            sys.stdout, sys.stderr = out, err


def _let_go_of_the_gone() -> None:
    """Have standard streams without a reader write to nowhere."""
    _send_nowhere(*filter(_is_gone, (1, 2)))


def _send_nowhere(*streams: int) -> None:
    with suppress(OSError):
        nowhere = os.open(os.devnull, os.O_WRONLY)
        for stream in streams:
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
