"""`refalign generate` ended at random moments: finished videos are whole, nothing else stays after the next run."""

import json
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import av
import pytest
from listening import wait_until_it_listens
from tiny_adapter import SIZE, picture, save_tiny_adapter
from tiny_models import save_tiny_pipeline

import refalign_adapter

VIDEOS = 6
SECONDS = 12.0
"""In which the run ends by itself on two cores; the moment is drawn from it."""
ENDINGS = {signal.SIGTERM: 143, signal.SIGINT: 130, signal.SIGHUP: 129, signal.SIGUSR1: 128 + signal.SIGUSR1}


@pytest.fixture(scope="module")
def command(tmp_path_factory):
    folder = tmp_path_factory.mktemp("models")
    picture().save(folder / "a.png")
    rows = [{"key": f"v{index}", "prompt": f"dog {index}", "references": ["a.png"]} for index in range(VIDEOS)]
    (folder / "prompts.jsonl").write_text("\n".join(map(json.dumps, rows)))
    base, adapter = save_tiny_pipeline(folder / "base"), save_tiny_adapter(folder / "adapter")
    sizes = [f"--{name.replace('_', '-')}={value}" for name, value in SIZE.items()]
    return [
        sys.executable, "-m", "refalign_adapter", "generate", f"--base={base}", f"--adapter={adapter}",
        f"--prompts={folder / 'prompts.jsonl'}", "--num-inference-steps=2", "--device=cpu", *sizes,
    ]  # fmt: skip


def run(command, output, number=None, after=0.0):
    """(exit code, lines on standard error) of a run that got signal `number` after so many seconds."""
    environment = os.environ | {"PYTHONPATH": str(Path(refalign_adapter.__file__).parents[1])}
    streams = {"stdout": subprocess.DEVNULL, "stderr": subprocess.PIPE, "text": True}
    process = subprocess.Popen([*command, f"--output={output}"], env=environment, **streams)
    if number is not None:
        time.sleep(after)
        if number != signal.SIGKILL:
            wait_until_it_listens(process)
        process.send_signal(number)
    _, told = process.communicate(timeout=120)
    return process.returncode, told.splitlines()


def check_videos(output):
    for path in output.glob("[!.]*.mp4"):
        with av.open(str(path)) as container:
            assert sum(1 for _ in container.decode(video=0)) == SIZE["num_frames"], path


FINISHED = [".refalign_generate.json", *(f"v{index}.mp4" for index in range(VIDEOS))]


def end_at_random(command, output, numbers, seed):
    """End runs at random moments, each ending looked at, then let one finish; what lies in its folder."""
    draw = random.Random(seed)
    print(f"seed {seed}")
    for number in numbers:
        code, lines = run(command, output, number, draw.uniform(1.0, SECONDS))
        assert code in (0, -signal.SIGKILL if number == signal.SIGKILL else ENDINGS[number]), lines
        assert "Traceback" not in "\n".join(lines)
        if code > 0:
            said = [line for line in lines if line.startswith("interrupted; ")]
            assert len(said) == 1, lines
        check_videos(output)
    code, lines = run(command, output)
    assert code == 0, lines
    check_videos(output)
    return sorted(path.name for path in output.iterdir())


@pytest.mark.slow
def test_killed_and_asked_to_stop(command, tmp_path):
    numbers = [signal.SIGKILL, signal.SIGUSR1]
    assert end_at_random(command, tmp_path / "out", numbers, int(time.time())) == FINISHED


@pytest.mark.slow
@pytest.mark.parametrize("turn", range(4))
def test_ended_many_times(command, tmp_path, turn):
    numbers = [signal.SIGKILL, signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGUSR1]
    assert end_at_random(command, tmp_path / "out", numbers, int(time.time()) + turn) == FINISHED
