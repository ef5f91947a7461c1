"""Processes of the demo: their failures are told, and an interruption reaches what a launcher has launched."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from refalign_adapter import UserError
from refalign_adapter.world.processes import run_module

LAUNCHER = """
import subprocess, sys
sys.exit(subprocess.Popen([sys.executable, "-m", "worker", sys.argv[1]]).wait())
"""
WORKER = """
import pathlib, signal, sys, time
note = pathlib.Path(sys.argv[1])
def end(number, frame):
    time.sleep(1)  # longer than a launcher waits for it
    note.write_text("saved")
    sys.exit(143)
signal.signal(signal.SIGTERM, end)
signal.signal(signal.SIGINT, signal.SIG_IGN)
note.write_text("working")
time.sleep(60)
"""
RUNNER = """
import sys
from refalign_adapter.world.processes import run_module
try:
    run_module("launcher", sys.argv[1])
except KeyboardInterrupt:
    sys.exit(130)
"""


@pytest.fixture
def modules(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    for name, text in (("launcher", LAUNCHER), ("worker", WORKER), ("fails", "print('why'); raise SystemExit(3)")):
        (tmp_path / f"{name}.py").write_text(text)
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    return tmp_path


def wait_for(note: Path, text: str) -> None:
    deadline = time.monotonic() + 30
    while not note.is_file() or note.read_text() != text:
        assert time.monotonic() < deadline
        time.sleep(0.05)


@pytest.mark.parametrize("whole_group", [True, False], ids=["terminal", "kill"])
def test_interruption_waits_for_what_a_launcher_launched(modules: Path, whole_group: bool):
    note = modules / "note"
    runner = subprocess.Popen([sys.executable, "-c", RUNNER, str(note)], start_new_session=True)
    wait_for(note, "working")
    if whole_group:
        os.killpg(runner.pid, signal.SIGINT)
    else:
        runner.send_signal(signal.SIGINT)
    assert runner.wait(timeout=30) == 130
    assert note.read_text() == "saved"


def test_failure_is_one_line_after_its_own_message(modules: Path, capfd: pytest.CaptureFixture):
    with pytest.raises(UserError, match="^fails failed with exit code 3; its own message is above$"):
        run_module("fails")
    assert capfd.readouterr().out == "why\n"


def test_quiet_drops_standard_output(modules: Path, capfd: pytest.CaptureFixture):
    with pytest.raises(UserError):
        run_module("fails", quiet=True)
    assert capfd.readouterr().out == ""


def test_a_launcher_is_named_by_what_it_launches(modules: Path):
    with pytest.raises(UserError, match="^refalign_adapter.train failed"):
        run_module("fails", "-m", "refalign_adapter.train")
