"""Signals end a command with one line and the exit code that shells expect, whatever a library makes of them."""

import os
import pty
import signal
import subprocess
import sys
import textwrap
import time

import pytest

from refalign_adapter.signals import NUMBERS, Stopped, ended_by_signals, stopping_means

HEAD = """
import os, signal, sys, time
from refalign_adapter.signals import ended_by_signals, stopping_means
def wait():  # one long sleep that a signal comes just before is not cut short
    for _ in range(600):
        time.sleep(0.05)
"""


def run(code, number=None):
    process = subprocess.Popen(
        [sys.executable, "-c", HEAD + textwrap.dedent(code)], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    if number is not None:
        assert process.stdout.readline() == "ready\n"
        process.send_signal(number)
    _, errors = process.communicate(timeout=30)
    return process.returncode, errors


@pytest.mark.parametrize("number", NUMBERS)
def test_a_signal_is_one_line_and_128_plus_its_number(number):
    code = """
        with ended_by_signals(), stopping_means("run it again"):
            print("ready", flush=True)
            wait()
    """
    assert run(code, number) == (128 + number, "interrupted; run it again\n")


def test_a_library_that_makes_an_error_of_the_signal_does_not_hide_it():
    code = """
        with ended_by_signals():
            try:
                print("ready", flush=True)
                wait()
            except BaseException as error:
                raise RuntimeError("cannot load a component") from error
    """
    assert run(code, signal.SIGTERM) == (143, "interrupted; nothing was written\n")


def test_what_is_ignored_stays_ignored():
    code = """
        signal.signal(signal.SIGHUP, signal.SIG_IGN)
        with ended_by_signals():
            os.kill(os.getpid(), signal.SIGHUP)
    """
    assert run(code) == (0, "")


def test_a_second_signal_at_once_does_not_disturb_the_cleaning_up():
    code = """
        with ended_by_signals():
            try:
                print("ready", flush=True)
                wait()
            finally:
                os.kill(os.getpid(), signal.SIGTERM)
                time.sleep(0.1)
                print("cleaned", file=sys.stderr)
    """
    assert run(code, signal.SIGINT) == (130, "cleaned\ninterrupted; nothing was written\n")


def test_handlers_and_meanings_are_gone_afterwards(capsys):
    def stopped_inside():
        with stopping_means("not this one"):
            pass
        with stopping_means("this one"):
            signal.raise_signal(15)
            time.sleep(1)

    def stopped_outside():
        raise Stopped(15)

    before = [signal.getsignal(number) for number in NUMBERS]
    for command, line in ((stopped_inside, "this one"), (stopped_outside, "nothing was written")):
        with pytest.raises(SystemExit, match="143"), ended_by_signals():
            command()
        assert capsys.readouterr().err == f"interrupted; {line}\n"
    assert [signal.getsignal(number) for number in NUMBERS] == before


def test_errors_and_success_go_through():
    with pytest.raises(KeyError), ended_by_signals(), stopping_means("a"):
        raise KeyError
    with pytest.raises(SystemExit, match="2"), ended_by_signals():
        sys.exit(2)
    with ended_by_signals():
        pass


PRINTING = """
    with ended_by_signals():
        print("ready", flush=True)
        for _ in range(3):
            time.sleep(0.05)
            print("x" * 100_000)
            print("y", file=sys.stderr, flush=True)
        print("z")  # stays in the buffer
    sys.exit(7)
"""


@pytest.mark.parametrize("ends", [os.pipe, pty.openpty], ids=["pipe", "terminal"])
def test_a_reader_that_is_gone_ends_nothing(ends):
    ours, theirs = ends()
    code = [sys.executable, "-c", HEAD + textwrap.dedent(PRINTING)]
    process = subprocess.Popen(code, stdout=theirs, stderr=theirs, start_new_session=True)
    os.close(theirs)
    assert os.read(ours, 5) == b"ready"
    os.close(ours)
    assert process.wait(timeout=30) == 7


@pytest.mark.parametrize("buffered", [False, True])
def test_output_that_finds_no_room_is_one_line(buffered):
    """At once, or at the end, when what is buffered is written."""
    code = "from refalign_adapter.commands import app\n"
    code += 'sys.stdout = open(1, "w", buffering=4096, closefd=False)\n' * buffered + 'app.main(["recipes", "list"])'
    with open("/dev/full", "w") as full:
        done = subprocess.run(
            [sys.executable, "-c", HEAD + code], stdout=full, stderr=subprocess.PIPE, text=True, check=False
        )
    line = "error: cannot write 'standard output' (No space left on device); free some space\n"
    assert (done.returncode, done.stderr) == (2, line)


def test_a_signal_while_python_shuts_down_changes_nothing():
    code = """
        import atexit
        @atexit.register  # before ours, so called after it
        def slow():
            print("ready", flush=True)
            time.sleep(0.5)
        with ended_by_signals():
            pass
        sys.exit(3)
    """
    for number in (signal.SIGTERM, signal.SIGHUP, signal.SIGUSR1):
        assert run(code, number) == (3, "")
    assert run(code, signal.SIGINT) == (-signal.SIGINT, "")
