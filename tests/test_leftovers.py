"""What killed processes left goes, and what live ones are writing stays."""

import os
import subprocess
import sys
import time

from refalign_adapter.leftovers import HOST, process_start, remove_leftovers, temporary_path


def names(folder):
    return sorted(path.name for path in folder.iterdir())


def test_leftovers_of_dead_processes_go_and_those_of_live_ones_stay(tmp_path):
    dead = subprocess.Popen([sys.executable, "-c", ""])
    dead.wait()
    here, there = f"{HOST}.{dead.pid}", "another-host.1"
    for name in (f".a.{here}.tmp", f".a.{os.getpid()}.tmp", f".b.{HOST}.{os.getpid()}.tmp.mp4", f".c.{there}.tmp"):
        (tmp_path / name).write_text("half")
    for name in (f".adapter.{here}.old", f".kept.{here}.old", f".d.{dead.pid}.tmp", "kept"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "weights").write_text(name)
    (tmp_path / ".hidden.file").touch()
    remove_leftovers(tmp_path)
    live = [f".a.{os.getpid()}.tmp", f".b.{HOST}.{os.getpid()}.tmp.mp4"]
    assert names(tmp_path) == sorted([*live, f".c.{there}.tmp", ".hidden.file", "adapter", "kept"])
    assert (tmp_path / "adapter" / "weights").read_text() == f".adapter.{here}.old"
    os.utime(tmp_path / f".c.{there}.tmp", (0, 0))
    remove_leftovers(tmp_path)
    assert not (tmp_path / f".c.{there}.tmp").exists()
    remove_leftovers(tmp_path / "absent")


def test_a_number_that_another_process_was_given_since_protects_no_leftover(tmp_path):
    """A live process has the dead writer's number: that it is another one shows by when it began."""
    other = subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE)
    try:
        start = process_start(other.pid)
        assert start
        mine = temporary_path(tmp_path / "mine.txt", "tmp")
        mine.write_text("half")
        assert remove_and_list(tmp_path) == [mine.name]
        live, dead = f".a.{HOST}.{other.pid}-{start}.tmp", f".b.{HOST}.{other.pid}-{start - 1}.tmp"
        recent, old = f".c.{HOST}.{other.pid}.tmp", f".d.{HOST}.{other.pid}.tmp"  # as named before: no start
        for name in (live, dead, recent, old):
            (tmp_path / name).write_text("half")
        os.utime(tmp_path / live, (0, 0))
        os.utime(tmp_path / old, (0, 0))
        assert remove_and_list(tmp_path) == sorted([mine.name, live, recent])
    finally:
        other.communicate(b"\n")


def test_a_dead_process_that_nobody_has_fetched_is_dead(tmp_path):
    dead = subprocess.Popen([sys.executable, "-c", ""], stdout=subprocess.PIPE)
    assert dead.stdout is not None
    dead.stdout.read()  # it has ended, and is not waited for
    deadline = time.monotonic() + 10
    while process_start(dead.pid) and time.monotonic() < deadline:
        time.sleep(0.01)
    for name in (f".a.{HOST}.{dead.pid}-1.tmp", f".b.{HOST}.{dead.pid}.tmp"):
        (tmp_path / name).touch()
    assert remove_and_list(tmp_path) == []
    dead.wait()


def remove_and_list(folder):
    remove_leftovers(folder)
    return names(folder)
