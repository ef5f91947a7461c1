"""A training run that is killed or asked to stop at any moment ends, taken up again, as one that nobody disturbed."""

import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from listening import wait_until_it_listens
from safetensors.torch import load_file

STEPS = 8
OPTIONS = [
    f"max_train_steps={STEPS}",
    "checkpointing_steps=1",
    "checkpoints_total_limit=2",
    "ema_decay=0.9",
    "gradient_accumulation_steps=2",
    "resume_from_checkpoint=latest",
]


def start(world, output):
    command = [sys.executable, "-m", "refalign_adapter.train", "--config", world / "recipe.yaml"]
    return subprocess.Popen(
        [*map(str, command), f"output_dir={output}", *OPTIONS],
        env={**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


@pytest.fixture(scope="module")
def undisturbed(tiny_world, tmp_path_factory):
    output = tmp_path_factory.mktemp("undisturbed") / "out"
    process = start(tiny_world, output)
    _, errors = process.communicate(timeout=200)
    assert process.returncode == 0, errors
    return output


def tensors(output):
    """Every tensor that the run wrote: the adapter, the projectors, the newest checkpoint."""
    files = [output / "adapter", output / "training", output / f"checkpoint-{STEPS}"]
    found = sorted(path for folder in files for path in folder.rglob("*.safetensors"))
    return {str(path.relative_to(output)): load_file(path) for path in found}


def different(one, other):
    """Files, and tensors in them, that are not the same bit for bit."""
    assert one.keys() == other.keys()
    assert all(state.keys() == other[file].keys() for file, state in one.items())
    return [
        (file, name)
        for file, state in one.items()
        for name, tensor in state.items()
        if not torch.equal(tensor, other[file][name])
    ]


def disturb(world, output, seed, turns):
    """Stop the run at random moments, then let it finish; what each stop said is checked."""
    generator = random.Random(seed)
    print("seed", seed)
    signals = [signal.SIGTERM, signal.SIGHUP, signal.SIGUSR1, signal.SIGINT, signal.SIGKILL]
    for number in (signal.SIGKILL, *generator.choices(signals, k=turns - 1)):
        process = start(world, output)
        done, began = generator.randrange(0, STEPS), time.monotonic()
        while process.poll() is None and time.monotonic() - began < 100:
            if (output / f"checkpoint-{done}").is_dir() or (done == 0 and time.monotonic() - began > 4):
                break
            if any((output / f"checkpoint-{step}").is_dir() for step in range(done + 1, STEPS + 1)):
                break
            time.sleep(0.005)
        time.sleep(generator.random() * 0.4)
        if number != signal.SIGKILL:
            wait_until_it_listens(process)
        process.send_signal(number)
        _, errors = process.communicate(timeout=100)
        assert "Traceback" not in errors, errors
        if number == signal.SIGKILL:
            assert process.returncode in (-signal.SIGKILL, 0)
        else:
            at_the_end = number == signal.SIGINT and "adapter written" in errors  # Ctrl-C while Python shuts down
            ended = (-number,) if at_the_end else ()
            assert process.returncode in (128 + number, 0, *ended), errors
    process = start(world, output)
    _, errors = process.communicate(timeout=200)
    assert process.returncode == 0, errors
    assert [path.name for path in output.iterdir() if path.name.endswith((".tmp", ".old"))] == []


@pytest.mark.slow
def test_killed_and_asked_to_stop(tiny_world, undisturbed, tmp_path):
    disturb(tiny_world, tmp_path / "out", 1, 2)
    assert different(tensors(tmp_path / "out"), tensors(undisturbed)) == []


@pytest.mark.slow
@pytest.mark.timeout(900)
@pytest.mark.parametrize("seed", range(2, 7))
def test_stopped_again_and_again(tiny_world, undisturbed, tmp_path, seed):
    disturb(tiny_world, tmp_path / "out", seed, 4)
    assert different(tensors(tmp_path / "out"), tensors(undisturbed)) == []


def test_killed_while_the_adapter_changes_places_one_is_there(tmp_path):
    """At every moment of the swap the folder holds a whole version."""
    code = """
import itertools, sys
from pathlib import Path
from refalign_adapter.atomic import atomic_folder
target = Path(sys.argv[1])
for number in itertools.count():
    with atomic_folder(target) as temporary:
        for name in ("a", "b"):
            (temporary / name).write_text(str(number) * 1000)
    if number == 0:
        print("ready", flush=True)
"""
    generator = random.Random(0)
    for _ in range(12):
        process = subprocess.Popen([sys.executable, "-c", code, tmp_path / "x"], stdout=subprocess.PIPE, text=True)
        assert process.stdout.readline() == "ready\n"
        time.sleep(generator.random() * 0.1)
        process.kill()
        process.wait()
        process.stdout.close()
        one, other = ((Path(tmp_path) / "x" / name).read_text() for name in ("a", "b"))
        assert one == other
        assert one
