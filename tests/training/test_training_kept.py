"""What a training run keeps: damage in any file of a checkpoint, a full disk, a second run, a bad step, signals."""

import os
import shutil
import signal
import subprocess
import sys

import pytest
import torch
from safetensors.torch import load_file
from small_disk import fill, small_disk

from refalign_adapter.errors import UserError
from refalign_adapter.training import loop
from refalign_adapter.training.checkpoint import save_checkpoint
from refalign_adapter.training.checkpoint_files import find_checkpoint, list_checkpoints
from refalign_adapter.training.interrupt import Interrupted
from refalign_adapter.training.loop import train
from refalign_adapter.training.run_lock import only_run
from refalign_adapter.training.tracking import read_metrics

WEIGHTS = "adapter/pytorch_lora_weights.safetensors"
FAST = ("optimizer=adamw", "gradient_accumulation_steps=1")


def one_line(error):
    assert len(str(error.value).splitlines()) == 1
    return str(error.value)


def same(one, other):
    left, right = load_file(one), load_file(other)
    return left.keys() == right.keys() and all(torch.equal(left[name], right[name]) for name in left)


def test_damage_in_any_file_of_a_checkpoint_is_found_and_passed_over(make_recipe, tmp_path):
    train(make_recipe(*FAST, "ema_decay=0.9", "max_train_steps=2", "checkpointing_steps=1"))
    out = tmp_path / "out"
    (out / "checkpoint-99").write_text("stray")
    files = [path for path in sorted((out / "checkpoint-2").rglob("*")) if path.is_file()]
    assert len(files) == 10
    for path in files:
        whole = path.read_bytes()
        middle = len(whole) // 2
        flipped = whole[:middle] + bytes([whole[middle] ^ 1]) + whole[middle + 1 :]
        for torn in (flipped, whole[:middle], b""):
            path.write_bytes(torn)
            lines = []
            assert find_checkpoint(out, "latest", lines.append) == out / "checkpoint-1", path
            (line,) = lines
            assert line.startswith("resume_from_checkpoint: passed over checkpoint-2 (")
            with pytest.raises(UserError, match="^resume_from_checkpoint: .*checkpoint-2' is damaged") as caught:
                find_checkpoint(out, str(out / "checkpoint-2"))
            one_line(caught)
        path.write_bytes(whole)
    assert find_checkpoint(out, "latest") == out / "checkpoint-2"


def test_a_full_disk_stops_the_run_with_its_last_checkpoint(make_recipe, tmp_path, monkeypatch):
    train(make_recipe(*FAST, "max_train_steps=4", "checkpointing_steps=2", f"output_dir={tmp_path / 'straight'}"))
    options = [*FAST, "max_train_steps=4", "checkpointing_steps=2"]

    def save_on_full(output_dir, *arguments):
        if (output_dir / "checkpoint-2").is_dir():
            fill(output_dir, leave=100_000)
        return save_checkpoint(output_dir, *arguments)

    monkeypatch.setattr(loop, "save_checkpoint", save_on_full)
    with small_disk(tmp_path / "disk", 8 * 2**20) as disk:
        with pytest.raises(
            UserError, match=r"checkpoint-4' \(No space left on device\); free some .*stopped at"
        ) as caught:
            train(make_recipe(*options, f"output_dir={disk}"))
        assert "checkpoint-2 is whole" in one_line(caught)
        assert [path.name for path in list_checkpoints(disk)] == ["checkpoint-2"]
        assert list(disk.glob(".checkpoint*")) == []
        (disk / "ballast").unlink()
        monkeypatch.setattr(loop, "save_checkpoint", save_checkpoint)
        train(make_recipe(*options, f"output_dir={disk}", "resume_from_checkpoint=latest"))
        assert same(disk / WEIGHTS, tmp_path / "straight" / WEIGHTS)


def test_a_second_run_in_the_folder_is_refused(make_recipe, tmp_path):
    holder = (
        "import sys, pathlib; from refalign_adapter.training.run_lock import only_run\n"
        "with only_run(pathlib.Path(sys.argv[1])): print('held', flush=True); sys.stdin.read()"
    )
    (tmp_path / "out").mkdir()
    process = subprocess.Popen(
        [sys.executable, "-c", holder, str(tmp_path / "out")], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    try:
        assert process.stdout.readline() == "held\n"
        with pytest.raises(UserError, match="^output_dir: another run is writing to") as caught:
            train(make_recipe(*FAST))
        one_line(caught)
    finally:
        process.kill()
        process.communicate()
    with only_run(tmp_path / "out"):
        pass


def poison(monkeypatch, steps):
    """The loss of these steps is NaN, counted from 1."""
    clip = loop._clip
    monkeypatch.setattr(
        loop, "_clip", lambda run: torch.tensor(float("nan")) if run.progress.step + 1 in steps else clip(run)
    )


def test_a_bad_step_is_skipped_and_resuming_is_exact(make_recipe, tmp_path, monkeypatch, capsys):
    poison(monkeypatch, {2})
    options = [*FAST, "max_train_steps=4", "checkpointing_steps=2", "ema_decay=0.9", "lr_scheduler=cosine"]
    straight, parts = tmp_path / "straight", tmp_path / "parts"
    train(make_recipe(*options, f"output_dir={straight}"))
    assert "step 2 skipped: its loss or gradient is no number; rows " in capsys.readouterr().err
    assert [row["train/skipped"] for row in read_metrics(straight / "metrics.jsonl")] == [0, 1, 1, 1]
    parts.mkdir()
    shutil.copytree(straight / "checkpoint-2", parts / "checkpoint-2")
    train(make_recipe(*options, f"output_dir={parts}", "resume_from_checkpoint=latest"))
    for name in (WEIGHTS, "training/optimizer.safetensors", "training/ema.safetensors", "training/lora.safetensors"):
        assert same(straight / "checkpoint-4" / name, parts / "checkpoint-4" / name)


@pytest.mark.parametrize("number", [signal.SIGHUP, signal.SIGUSR1])
def test_signals_leave_a_checkpoint(make_recipe, tmp_path, monkeypatch, number):
    clip = loop._clip
    monkeypatch.setattr(loop, "_clip", lambda run: (os.kill(os.getpid(), number), clip(run))[1])
    with pytest.raises(Interrupted, match="^stopped at step 1, checkpoint written") as caught:
        train(make_recipe(*FAST))
    assert caught.value.exit_code == 128 + number
    assert find_checkpoint(tmp_path / "out", "latest").name == "checkpoint-1"


@pytest.mark.parametrize("change", ["optimizer=sgd", "alignment.weight=0", "adapter.lora_alpha=8"])
def test_resuming_another_run_is_one_line(make_recipe, tmp_path, change):
    train(make_recipe(*FAST, "max_train_steps=1"))
    with pytest.raises(UserError, match="^resume_from_checkpoint: ") as caught:
        train(make_recipe(*FAST, "max_train_steps=2", "resume_from_checkpoint=latest", change))
    one_line(caught)


def test_patterns_that_match_nothing_are_refused(make_recipe):
    with pytest.raises(UserError, match="rank_pattern: 'nosuch' matches no layer"):
        train(make_recipe(*FAST, "adapter.rank_pattern={nosuch: 2}"))


def test_a_pipe_in_the_locks_place_is_one_line(tmp_path):
    os.mkfifo(tmp_path / ".run.lock")
    with pytest.raises(UserError, match=r"^output_dir: '.*\.run\.lock' is a named pipe, not a file; delete it$"):
        with only_run(tmp_path):
            pass
