"""Every command, stopped while it is still loading: one line, the right exit code, nothing written."""

import os
import signal
import subprocess
import sys
import time

import pytest

COMMANDS = {
    "train": ["refalign_adapter.train", "--config", "{world}/recipe.yaml", "output_dir={out}/run"],
    "cache": ["refalign_adapter.cache", "--config", "{world}/recipe.yaml", "data.cache_dir={out}/cache"],
    "data check": ["refalign_adapter", "data", "check", "--config", "{world}/recipe.yaml", "--output", "{out}/r"],
    "estimate": ["refalign_adapter", "estimate", "--config", "{world}/recipe.yaml"],
    "generate": [
        *("refalign_adapter", "generate", "--base", "{world}/base", "--adapter", "{world}/no", "--prompt", "a"),
        *("--reference", "{world}/clips/0_0.png", "--output", "{out}/a.mp4"),
    ],
}
SIGNALS = [signal.SIGTERM, signal.SIGHUP, signal.SIGUSR1, signal.SIGINT]


def stopped(world, out, command, number, after):
    out.mkdir()
    arguments = [part.format(world=world, out=out) for part in COMMANDS[command]]
    process = subprocess.Popen(
        [sys.executable, "-m", *arguments],
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
    )
    time.sleep(after)
    process.send_signal(number)
    _, errors = process.communicate(timeout=60)
    assert "Traceback" not in errors, errors
    if process.returncode in (128 + number, 2, 0):  # 2, 0: it was done
        return process.returncode == 128 + number, errors
    assert process.returncode == -number, errors  # before Python had read the first line of ours
    return False, errors


@pytest.mark.parametrize("command", COMMANDS)
def test_a_signal_while_loading(tiny_world, tmp_path, command):
    number = SIGNALS[list(COMMANDS).index(command) % len(SIGNALS)]
    told, errors = stopped(tiny_world, tmp_path / "out", command, number, 1.2)
    if told:
        assert errors.splitlines()[-1].startswith(("interrupted; ", "stopped "))
        assert not list((tmp_path / "out").rglob("*.safetensors"))
        assert not list((tmp_path / "out").glob("*.mp4"))


@pytest.mark.slow
@pytest.mark.timeout(600)
@pytest.mark.parametrize("command", COMMANDS)
def test_a_signal_at_any_moment_of_loading(tiny_world, tmp_path, command):
    told = 0
    for index in range(8):
        after = 0.4 + 0.35 * index
        found, errors = stopped(tiny_world, tmp_path / str(index), command, SIGNALS[index % 4], after)
        told += found
        if found:
            assert errors.splitlines()[-1].startswith(("interrupted; ", "stopped "))
    assert told >= 3
