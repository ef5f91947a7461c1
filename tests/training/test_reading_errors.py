"""What goes wrong with reading while a run trains: one line with the way out, whichever process or thread met it."""

import json
import os
import re
import shutil
import signal
from types import SimpleNamespace

import pytest
from seals import seal
from torch.utils.data import Dataset

from refalign_adapter.data.cache.dataset import UnreadableRowError
from refalign_adapter.data.cache.parts import DAMAGED, CacheGoneError
from refalign_adapter.data.cache.prefetch import in_workers, loaded, workers_told
from refalign_adapter.errors import ConfigError, ReadError, UserError
from refalign_adapter.training import loop
from refalign_adapter.training.checkpoint_files import read_rows
from refalign_adapter.training.loop import train
from refalign_adapter.training.resuming import _rows_changed
from refalign_adapter.training.setup import build_accelerator, build_run
from refalign_adapter.training.tracking import read_metrics
from refalign_adapter.training.validation import validate

FAST = ("optimizer=adamw", "gradient_accumulation_steps=1", "train_batch_size=1")


@pytest.fixture
def copied(tiny_world, make_recipe, tmp_path):
    """`copied("key=value", …)`: the tiny recipe, made fast, on a copy of its cache."""
    shutil.copytree(tiny_world / "cache", tmp_path / "cache")

    def make(*overrides):
        return make_recipe(f"data.cache_dir={tmp_path / 'cache'}", *FAST, *overrides)

    return make


class Failing(Dataset):
    def __getitem__(self, item):
        if item == 1:
            raise ConfigError(["one", "two"], source="here")
        if item == 2:
            os.kill(os.getpid(), signal.SIGKILL)
        return item


@pytest.mark.parametrize("workers", [0, 1])
def test_a_users_mistake_comes_out_of_a_worker_as_it_is(workers):
    for read in (loaded, in_workers):
        items = read(Failing(), [0, 1], workers)
        assert next(items) == 0
        with pytest.raises(ConfigError) as told:
            next(items)
        assert (told.value.problems, told.value.source) == (["one", "two"], "here")
        assert str(told.value) == "here: one\nhere: two"


def test_a_worker_that_is_killed_is_one_line():
    with pytest.raises(ReadError) as told, workers_told("data.num_workers"):
        list(loaded(Failing(), [0, 2], 1))
    assert re.fullmatch(
        r"data.num_workers: DataLoader worker \(pid.* \d+\) .*; if memory ran out, lower data.num_workers",
        str(told.value),
    )
    with pytest.raises(RuntimeError, match="mine"), workers_told("data.num_workers"):
        raise RuntimeError("mine")


@pytest.mark.parametrize("workers", [0, 2])
def test_a_cache_that_goes_away_ends_the_run_with_its_checkpoint(copied, tmp_path, monkeypatch, workers):
    save = loop._save

    def save_then_lose(run):
        save(run)
        if run.progress.step == 1:
            os.rename(tmp_path / "cache", tmp_path / "away")

    monkeypatch.setattr(loop, "_save", save_then_lose)
    recipe = copied("checkpointing_steps=1", "max_train_steps=20", f"dataloader_num_workers={workers}")
    with pytest.raises(CacheGoneError) as told:
        train(recipe)
    line = str(told.value)
    assert line.startswith(f"cache_dir: {str(tmp_path / 'cache')!r} cannot be read any more (meta.json: No such file")
    step = int(
        re.search(r"stopped at step (\d+), checkpoint-\1 is whole: then run the same command with resume", line)[1]
    )
    assert 1 <= step < 20
    assert len(line.splitlines()) == 1
    assert not list((tmp_path / "away").rglob(f"*{DAMAGED}"))
    os.rename(tmp_path / "away", tmp_path / "cache")
    monkeypatch.setattr(loop, "_save", save)
    train(copied_again(recipe, max_train_steps=step + 1))


def copied_again(recipe, **changes):
    return recipe.model_copy(update={**changes, "resume_from_checkpoint": "latest"})


def spoil(recipe, row):
    """Cut a row's clip short; returns where the row stands."""
    from refalign_adapter.data.cache.index import read_index
    from refalign_adapter.data.cache.parts import PartStore

    entry = read_index(recipe.data.cache_dir, "train")[row]
    os.truncate(PartStore(recipe.data.cache_dir).path("video", entry.parts.video), 300)
    return entry.place("train")


def test_held_out_rows_that_cannot_be_read_are_left_out_and_named(copied, tmp_path, capfd):
    recipe = copied("max_train_steps=1", "validation_steps=1", "train_batch_size=2")
    run = build_run(recipe, build_accelerator(recipe, tmp_path), tmp_path)

    def held_out(groups, left_out=()):
        load, empty_text = run.data.validation_batch, run.data.empty_text
        return validate(
            run.module, load, groups, empty_text, run.accelerator, weights={"reference": 1.0}, left_out=left_out
        )

    groups = run.data.groups
    bad = groups[0][0]
    run.data.groups = [[row for row in group if row != bad] for group in groups]
    expected = held_out(run.data.groups)
    run.data.groups = groups
    place = spoil(recipe, len(run.data.training) + bad)
    assert held_out(groups, run.data.left_out) == pytest.approx(expected, rel=1e-5)
    assert list(run.data.left_out) == [bad]
    train(recipe)
    errors = capfd.readouterr().err
    assert errors.count(f"validation: 1 of 3 held-out rows cannot be read ({place}); the first: cache: ") == 1
    assert len(re.findall(r"step [01]: validation flow loss [\d.]+, of 2 of 3 rows\n", errors)) == 2
    losses = [
        row["validation/flow"] for row in read_metrics(tmp_path / "out/metrics.jsonl") if "validation/flow" in row
    ]
    assert len(losses) == 2
    for row in set(range(3)) - {bad}:
        spoil(recipe, len(run.data.training) + row)
    with pytest.raises(
        UnreadableRowError, match=r"^validation: 3 of 3 held-out rows cannot be read \(train line"
    ) as told:
        train(recipe.model_copy(update={"output_dir": str(tmp_path / "other")}))
    assert len(str(told.value).splitlines()) == 1


def test_resuming_on_other_rows_says_what_they_mean(copied, tmp_path, capfd):
    index = tmp_path / "cache/index-train.jsonl"
    lines = index.read_text().splitlines(keepends=True)
    index.write_text("".join(lines[:-1]))
    seal(tmp_path / "cache")
    train(copied("max_train_steps=1", "checkpointing_steps=1"))
    rows = read_rows(tmp_path / "out/checkpoint-1")
    assert [*rows["training"], *rows["held_out"]] == [json.loads(line)["key"] for line in lines[:-1]]
    index.write_text("".join(lines))
    seal(tmp_path / "cache")
    capfd.readouterr()
    train(copied("max_train_steps=2", "checkpointing_steps=1", "resume_from_checkpoint=latest"))
    errors = capfd.readouterr().err
    (line,) = [line for line in errors.splitlines() if line.startswith("resume_from_checkpoint:")]
    assert line == (
        "resume_from_checkpoint: the rows have changed since; training rows: 0 removed, 1 added, 7 now: their order "
        "is another one, the pass over the data starts again, and the run is no longer bit for bit what it would have "
        "been; held-out rows: 1 removed, 1 added, 3 now: their losses do not compare with earlier ones"
    )
    assert "changed since then: rows" not in errors
    assert "so the order" not in errors
    train(copied("max_train_steps=3", "resume_from_checkpoint=latest"))
    assert "resume_from_checkpoint:" not in capfd.readouterr().err


def test_what_has_changed_about_rows():
    def told(before, now, held_before=(), held_now=()):
        rows = {"training": list(now), "held_out": list(held_now)}
        run = SimpleNamespace(data=SimpleNamespace(rows=rows))
        return _rows_changed({"training": list(before), "held_out": list(held_before)}, run, known=before == now)

    assert told("abc", "abc", "d", "d") is None
    assert "training rows: the same 3 in another order: their order" in told("abc", "acb")
    assert "training rows: 1 removed, 2 added, 4 now: their" in told("abc", "abde")
    assert "training rows: 1 removed, 0 added, 3 now, the others in another order: their" in told("abcd", "cba")
    assert "training rows: 2 removed, 2 added, 2 now: their" in told("ab", "cd")
    leak = told("abc", "ab", "d", "c")
    assert leak.endswith("losses do not compare with earlier ones, and 1 of these rows have been trained on")
    run = SimpleNamespace(data=SimpleNamespace(rows={}))
    assert _rows_changed(None, run, known=True) is None
    assert "no longer bit for bit" in _rows_changed(None, run, known=False)
    assert isinstance(UnreadableRowError(""), UserError)
