"""A run of two processes in which something goes wrong in one: both end, one line says why, no one waits for ever."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from small_disk import small_disk
from two_processes import end_of, free_port, start_two

from refalign_adapter.training.checkpoint_files import find_checkpoint, list_checkpoints
from refalign_adapter.training.tracking import read_metrics

FAST = ["optimizer=adamw", "gradient_accumulation_steps=1", "train_batch_size=1", "checkpointing_steps=1"]

NO_BATCH = """
from refalign_adapter.errors import UserError
from refalign_adapter.training import loop
batches = loop.endless_batches
def fewer(run):
    for number, batch in enumerate(batches(run)):
        if number == 2:
            raise UserError("data: these rows cannot be read")
        yield batch
loop.endless_batches = fewer
"""
NO_DATA = """
from refalign_adapter.errors import UserError
from refalign_adapter.training import setup
def none(*_):
    raise UserError("data: these rows cannot be read")
setup.open_data = none
"""
NO_HELD_OUT = """
from refalign_adapter.errors import UserError
from refalign_adapter.training.datasource import TrainingData
def none(*_):
    raise UserError("data: these rows cannot be read")
TrainingData.validation_batch = none
"""
NO_NUMBER = """
import torch
from refalign_adapter.training import loop
clip = loop._clip
loop._clip = lambda run: torch.tensor(float("nan")) if run.progress.step == 2 else clip(run)
"""


TOGETHER = """
import os, sys
from accelerate import Accelerator
from refalign_adapter.errors import UserError
from refalign_adapter.training.interrupt import FailedElsewhere, largest, together

def outcome(act):
    try:
        with together(accelerator):
            act()
    except FailedElsewhere:
        return "elsewhere"
    except UserError as error:
        return str(error)
    return "fine"

def fail(*ranks):
    if rank in ranks:
        raise UserError(f"mine {rank}")

def nested(*ranks):
    with together(accelerator):
        fail(*ranks)
    largest(accelerator, 1)  # all are here, or none

children = [os.fork(), 0]
children[1] = os.fork() if children[0] else 0
if 0 in children:
    rank = children.index(0)
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank)}
    accelerator = Accelerator(cpu=True)
    calls = [(fail,), (fail, 1), (fail, 0, 1), (nested, 1), (nested, 0), (nested,)]
    os.write(1, f"{rank} {[outcome(lambda: act(*ranks)) for act, *ranks in calls]}\\n".encode())
    os._exit(0)
sys.exit(max(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) for child in children))
"""


def test_processes_leave_together_and_the_first_that_failed_tells():
    environment = {"WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port())}
    done = subprocess.run(
        [sys.executable, "-c", TOGETHER],
        env=os.environ | environment | {"ACCELERATE_USE_CPU": "true", "CUDA_VISIBLE_DEVICES": ""},
        capture_output=True,
        text=True,
        timeout=60,
        check=True,
    )
    assert sorted(done.stdout.splitlines()) == [
        "0 ['fine', 'elsewhere', 'mine 0', 'elsewhere', 'mine 0', 'fine']",
        "1 ['fine', 'mine 1', 'elsewhere', 'mine 1', 'elsewhere', 'fine']",
    ]


def lines(told):
    """Lines of both processes that are no progress."""
    return [line for text in told for line in text.splitlines() if not line.startswith(("step ", "\x1b"))]


def check_one_error(ends, message):
    codes, told = ends
    assert codes == [2, 2], told
    errors = [line for line in lines(told) if "error" in line.lower()]
    assert len(errors) == 1, told
    assert message in errors[0]
    assert "Traceback" not in "".join(told)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("mishap", "where"),
    [
        (NO_BATCH, 1),
        (NO_BATCH, 0),
        (NO_DATA, 1),
        (NO_HELD_OUT, 1),
    ],
    ids=["a batch", "a batch of the first", "its data", "held-out rows"],
)
def test_a_mistake_that_one_process_meets(tiny_world, tmp_path, mishap, where):
    mishaps = (mishap, "") if where == 0 else ("", mishap)
    processes = start_two(tiny_world, tmp_path / "out", *FAST, "validation_steps=3", mishaps=mishaps)
    check_one_error(end_of(processes), f"{'[process 1] ' if where else ''}error: data: these rows cannot be read")
    if mishap is NO_BATCH:
        assert find_checkpoint(tmp_path / "out", "latest").name == "checkpoint-2"


@pytest.mark.slow
def test_a_bad_step_of_one_process_is_skipped_by_both_or_ends_both(tiny_world, tmp_path):
    processes = start_two(tiny_world, tmp_path / "on", *FAST, "max_train_steps=4", mishaps=("", NO_NUMBER))
    codes, told = end_of(processes)
    assert codes == [0, 0], told
    assert "".join(told).count("step 3 skipped: its loss or gradient is no number; rows ") == 1
    assert read_metrics(tmp_path / "on/metrics.jsonl")[-1]["train/skipped"] == 1
    processes = start_two(tiny_world, tmp_path / "off", *FAST, "max_bad_steps=1", mishaps=("", NO_NUMBER))
    check_one_error(end_of(processes), "error: training: loss or gradient of step 3 is no number, with rows ")
    assert find_checkpoint(tmp_path / "off", "latest").name == "checkpoint-2"


FULL = """
from refalign_adapter.training import loop
from small_disk import fill
save = loop.save_checkpoint
def save_on_full(output_dir, *arguments):
    if (output_dir / "checkpoint-2").is_dir():
        fill(output_dir, leave=100_000)
    return save(output_dir, *arguments)
loop.save_checkpoint = save_on_full
"""


@pytest.mark.slow
def test_a_full_disk_at_a_checkpoint_ends_both(tiny_world, tmp_path, monkeypatch):
    monkeypatch.setenv("PYTHONPATH", str(Path(__file__).parents[1]), prepend=":")
    with small_disk(tmp_path / "disk", 8 * 2**20) as disk:
        processes = start_two(tiny_world, disk, *FAST, mishaps=(FULL, ""))
        check_one_error(end_of(processes), "checkpoint-3' (No space left on device); free some space; stopped at step")
        assert find_checkpoint(disk, "latest").name == "checkpoint-2"


def wait_for_steps(out):
    limit = time.monotonic() + 100
    while len(read_metrics(out / "metrics.jsonl")) < 2:
        assert time.monotonic() < limit
        time.sleep(0.02)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("number", "ranks"), [(signal.SIGTERM, (1,)), (signal.SIGUSR1, (1,)), (signal.SIGUSR1, (0, 1))]
)
def test_a_signal_to_one_process_stops_both(tiny_world, tmp_path, number, ranks):
    out = tmp_path / "out"
    processes = start_two(tiny_world, out, *FAST, "max_train_steps=500", "checkpointing_steps=1000")
    wait_for_steps(out)
    for rank in ranks:
        processes[rank].send_signal(number)
    codes, told = end_of(processes)
    assert codes == [128 + number] * 2, told
    assert "".join(told).count("checkpoint written; to go on, run the same command with") == 1
    assert "Traceback" not in "".join(told)
    (checkpoint,) = list_checkpoints(out)
    assert find_checkpoint(out, "latest") == checkpoint


LAUNCH = ("-m", "accelerate.commands.launch", "--multi_gpu", "--num_processes", "2", "--main_process_port", "0")


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGUSR1, signal.SIGKILL])
def test_a_signal_to_the_launcher_leaves_a_checkpoint(tiny_world, tmp_path, number):
    """It passes on SIGTERM alone and dies of the others; beside its own lines there is one of ours."""
    out = tmp_path / "out"
    options = [*FAST, f"output_dir={out}", "max_train_steps=500", "checkpointing_steps=1000"]
    command = [*LAUNCH, "-m", "refalign_adapter.train", "--config", str(tiny_world / "recipe.yaml"), *options]
    environment = {**os.environ, "ACCELERATE_USE_CPU": "true", "CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1"}
    process = subprocess.Popen(
        [sys.executable, *command],
        env=environment,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
    )
    wait_for_steps(out)
    process.send_signal(number)
    told = process.communicate(timeout=100)[1]  # until the last process has closed it
    assert process.returncode != 0
    assert told.count("checkpoint written; to go on, run the same command with") == 1
    (checkpoint,) = list_checkpoints(out)
    assert find_checkpoint(out, "latest") == checkpoint
