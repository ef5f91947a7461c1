"""Disks that fill up, turn read-only or go away under a run: one line with the path, what is whole, and what to do."""

import errno
import os
import subprocess

import pytest
import torch
from safetensors.torch import load_file
from small_disk import fill, small_disk
from tiny_adapter import picture

from refalign_adapter import atomic
from refalign_adapter.errors import UserError
from refalign_adapter.training import loop
from refalign_adapter.training.checkpoint_files import find_checkpoint, list_checkpoints
from refalign_adapter.training.loop import train
from refalign_adapter.training.samples import Sampler

WEIGHTS = "adapter/pytorch_lora_weights.safetensors"
FAST = ("optimizer=adamw", "gradient_accumulation_steps=1", "max_train_steps=6", "checkpointing_steps=2")
LATEST = "checkpoint-2 is whole: then run the same command with resume_from_checkpoint=latest"


def at_step_3(monkeypatch, act):
    """Call `act(folder)` while step 3 is being made."""
    clip = loop._clip
    monkeypatch.setattr(
        loop, "_clip", lambda run: (act(run.output_dir) if run.progress.step == 2 else None, clip(run))[1]
    )


def refused(recipe):
    with pytest.raises(UserError) as told:
        train(recipe)
    (line,) = str(told.value).splitlines()
    return line


def same(one, other):
    left, right = load_file(one), load_file(other)
    return left.keys() == right.keys() and all(torch.equal(left[name], right[name]) for name in left)


def turn_read_only(folder):
    subprocess.run(["mount", "--bind", str(folder), str(folder)], check=True)
    subprocess.run(["mount", "-o", "remount,bind,ro", str(folder)], check=True)


@pytest.fixture(scope="module")
def straight(tiny_world, tmp_path_factory):
    """The weights of a run that nothing happened to."""
    from refalign_adapter.recipes.file import load_recipe

    out = tmp_path_factory.mktemp("straight") / "out"
    train(load_recipe(tiny_world / "recipe.yaml", [f"output_dir={out}", *FAST]))
    return out / WEIGHTS


def test_a_folder_that_turns_read_only(make_recipe, tmp_path, monkeypatch, straight):
    with small_disk(tmp_path / "disk", 8 * 2**20) as disk:
        at_step_3(monkeypatch, turn_read_only)
        recipe = [*FAST, f"output_dir={disk}"]
        try:
            line = refused(make_recipe(*recipe))
            assert f"cannot write '{disk}/" in line
            assert "(Read-only file system); choose a folder that is not read-only; stopped at step 4" in line
            assert line.endswith(LATEST)
            line = refused(make_recipe(*recipe, "resume_from_checkpoint=latest"))
            assert line.startswith(f"output_dir: cannot write to '{disk}' (Read-only file system)")
        finally:
            subprocess.run(["umount", "--lazy", str(disk)], check=True)
        monkeypatch.undo()
        assert find_checkpoint(disk, "latest").name == "checkpoint-2"
        train(make_recipe(*recipe, "resume_from_checkpoint=latest"))
        assert same(disk / WEIGHTS, straight)


def test_a_quota(make_recipe, tmp_path, monkeypatch, straight):
    """No file system with quotas can be had here: what the system says is put in its mouth."""
    sync = atomic._sync

    def over_quota(path):
        if "checkpoint-4" in str(path):
            raise OSError(errno.EDQUOT, os.strerror(errno.EDQUOT), str(path))
        sync(path)

    monkeypatch.setattr(atomic, "_sync", over_quota)
    line = refused(make_recipe(*FAST))
    assert "checkpoint-4" in line
    assert "(Disk quota exceeded); free some of your quota; stopped at step 4, " in line
    assert line.endswith(LATEST)
    assert [path.name for path in (tmp_path / "out").glob("*checkpoint*")] == ["checkpoint-2"]
    assert list((tmp_path / "out").glob(".*.tmp")) == []
    monkeypatch.setattr(atomic, "_sync", sync)
    train(make_recipe(*FAST, "resume_from_checkpoint=latest"))
    assert same(tmp_path / "out" / WEIGHTS, straight)


GONE = r"(No such file or directory); its folder is gone; make it again or choose another; stopped at step 3, "
BACK = "checkpoint-2 was whole and is out of reach now: once it is back, resume from it"


def test_a_folder_that_is_moved_away(make_recipe, tmp_path, monkeypatch, straight):
    at_step_3(monkeypatch, lambda folder: folder.rename(tmp_path / "away"))
    line = refused(make_recipe(*FAST))
    assert line == f"cannot write '{tmp_path}/out/metrics.jsonl' {GONE}{BACK}"
    assert not (tmp_path / "out").exists()
    monkeypatch.undo()
    (tmp_path / "away").rename(tmp_path / "out")
    train(make_recipe(*FAST, "resume_from_checkpoint=latest"))
    assert same(tmp_path / "out" / WEIGHTS, straight)


def test_a_disk_that_goes_away(make_recipe, tmp_path, monkeypatch):
    """What was mounted there is gone, and the folder below, which is empty, is not taken for it."""
    with small_disk(tmp_path / "disk", 8 * 2**20) as disk:
        subprocess.run(["mount", "--bind", str(disk), str(disk)], check=True)
        (disk / "out").mkdir()

        def unmount(_):
            for _ in range(2):
                subprocess.run(["umount", "--lazy", str(disk)], check=True)

        at_step_3(monkeypatch, unmount)
        line = refused(make_recipe(*FAST, f"output_dir={disk / 'out'}"))
        assert line == f"cannot write '{disk}/out/metrics.jsonl' {GONE}{BACK}"
        assert list(disk.iterdir()) == []
        subprocess.run(["mount", "-t", "tmpfs", "tmpfs", str(disk)], check=True)  # for the context to unmount


def fill_before(monkeypatch, owner, name, leave=0):
    """Fill the run's disk when a function is first called."""
    function = getattr(owner, name)

    def filling(first, *arguments):
        run = getattr(first, "run", first)
        if not (run.output_dir / "ballast").exists():
            fill(run.output_dir, leave=leave)
        return function(first, *arguments)

    monkeypatch.setattr(owner, name, filling)


FULL = "(No space left on device); free some space; stopped at step "


def test_no_room_for_the_final_adapter(make_recipe, tmp_path, monkeypatch, straight):
    with small_disk(tmp_path / "disk", 8 * 2**20) as disk:
        fill_before(monkeypatch, loop, "finish")
        recipe = [*FAST, f"output_dir={disk}"]
        whole = LATEST.replace("checkpoint-2", "checkpoint-6")
        assert refused(make_recipe(*recipe)) == f"cannot write '{disk}/adapter' {FULL}6, {whole}"
        assert not (disk / "adapter").exists()
        monkeypatch.undo()
        (disk / "ballast").unlink()
        train(make_recipe(*recipe, "resume_from_checkpoint=latest"))
        assert same(disk / WEIGHTS, straight)


def test_no_room_for_the_log(make_recipe, tmp_path, monkeypatch):
    with small_disk(tmp_path / "disk", 8 * 2**20) as disk:
        fill_before(monkeypatch, loop, "_clip")
        line = refused(make_recipe(*FAST, "max_train_steps=50", "checkpointing_steps=50", f"output_dir={disk}"))
        assert line.startswith(f"cannot write '{disk}/metrics.jsonl' {FULL}")
        assert line.endswith(", no checkpoint was written yet")


def test_no_room_for_a_sample_video(make_recipe, tmp_path, monkeypatch):
    picture().save(tmp_path / "a.png")
    samples = [f"sample_prompts=[{{prompt: a dog, references: [{tmp_path / 'a.png'}]}}]", "sample_steps=2"]
    with small_disk(tmp_path / "disk", 8 * 2**20) as disk:
        (disk / "samples" / "step-2").mkdir(parents=True)
        fill_before(monkeypatch, Sampler, "write")
        line = refused(make_recipe(*FAST, *samples, "sample.num_inference_steps=1", f"output_dir={disk}"))
        assert line == f"cannot write '{disk}/samples/step-2/00-a-dog.mp4' {FULL}2, {LATEST}"
        assert list((disk / "samples" / "step-2").iterdir()) == []
        assert [path.name for path in list_checkpoints(disk)] == ["checkpoint-2"]
