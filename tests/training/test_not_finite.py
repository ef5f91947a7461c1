"""Held-out losses and sample videos that are no numbers: told with what is behind them, and the run goes on."""

import shutil

import torch
from tiny_adapter import picture

from refalign_adapter.data.cache.index import read_index
from refalign_adapter.data.cache.part_file import read_tensor, write_tensor
from refalign_adapter.data.cache.parts import PartStore
from refalign_adapter.media.video import read_video
from refalign_adapter.training import loop
from refalign_adapter.training.loop import train
from refalign_adapter.training.tracking import read_metrics

FAST = ("optimizer=adamw", "gradient_accumulation_steps=1", "checkpointing_steps=1")


def after_step(monkeypatch, number, act):
    """Have `act(run)` be called once the optimizer has made that step."""
    conclude = loop._conclude

    def acting(run, *arguments):
        conclude(run, *arguments)
        if run.progress.step == number:
            act(run)

    monkeypatch.setattr(loop, "_conclude", acting)


def weights_of(run):
    return [parameter for name, parameter in run.trained.branch.named_parameters() if "lora_B" in name]


def test_weights_that_are_lost_for_one_step(make_recipe, tmp_path, monkeypatch, capsys):
    """Validation and samples of that step are told, the steps before and after are as ever."""
    picture().save(tmp_path / "a.png")
    kept = []

    def lose(run):
        kept.extend(parameter.detach().clone() for parameter in weights_of(run))
        for parameter in weights_of(run):
            parameter.data.fill_(torch.nan)

    def find(run):
        for parameter, value in zip(weights_of(run), kept, strict=True):
            parameter.data.copy_(value)

    after_step(monkeypatch, 2, lose)
    step = loop.optimizer_step
    monkeypatch.setattr(
        loop, "optimizer_step", lambda run, *more: (find(run) if run.progress.step == 2 else None, step(run, *more))[1]
    )
    prompts = f"sample_prompts=[{{prompt: a dog, references: [{tmp_path / 'a.png'}]}}, {{prompt: a cat}}]"
    samples = ["sample_steps=1", "sample.num_inference_steps=1", prompts]
    train(make_recipe(*FAST, "max_train_steps=3", "validation_steps=1", *samples))
    told = [line for line in capsys.readouterr().err.splitlines() if "step 2" in line]
    assert told[0].startswith("step 2: validation flow loss nan: rows 7.mp4 (")
    assert told[0].endswith(") are fine in the cache; lower learning_rate")
    assert told[1:] == [
        f"step 2: no video of sample {number}: its values are no numbers; if that goes on, lower learning_rate"
        for number in ("0 ('a dog')", "1 ('a cat')")
    ]
    out = tmp_path / "out"
    assert {path.parent.name: path.name for path in sorted((out / "samples").rglob("*.mp4"))} == {
        "step-1": "01-a-cat.mp4",
        "step-3": "01-a-cat.mp4",
    }
    assert read_video(out / "samples/step-3/00-a-dog.mp4", num_frames=5, height=48, width=48).shape[0] == 5
    rows = {row["step"]: row for row in read_metrics(out / "metrics.jsonl") if "train/loss" not in row}
    assert ["validation/flow" in rows.get(step, {}) for step in (0, 1, 2, 3)] == [True, True, False, True]


def test_a_held_out_row_that_is_spoilt_while_the_run_goes_on_is_named(
    tiny_world, make_recipe, tmp_path, monkeypatch, capsys
):
    shutil.copytree(tiny_world / "cache", tmp_path / "cache")
    entry = read_index(tmp_path / "cache", "train")[-1]
    path = PartStore(tmp_path / "cache").path("video", entry.parts.video)

    def spoil(_):
        write_tensor(path, read_tensor(path)[1].fill_(torch.nan))

    after_step(monkeypatch, 1, spoil)
    train(make_recipe(*FAST, "max_train_steps=2", "validation_steps=1", f"data.cache_dir={tmp_path / 'cache'}"))
    line = f"step 1: validation flow loss nan: no numbers are in the cache for row 9.mp4 ({entry.key[:12]}); "
    assert f"{line}run refalign cache --verify" in capsys.readouterr().err.splitlines()
