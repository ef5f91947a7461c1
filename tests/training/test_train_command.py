"""The training command as users start it: real processes and signals, several processes, mistakes in plain lines."""

import json
import os
import re
import signal
import subprocess
import sys
import time

import pytest
import torch
import yaml
from safetensors.torch import load_file

from refalign_adapter.commands.train import main
from refalign_adapter.errors import UserError
from refalign_adapter.export.folder import open_adapter
from refalign_adapter.recipes.file import field_paths, load_recipe
from refalign_adapter.recipes.shipped import copy_recipe
from refalign_adapter.training import loop
from refalign_adapter.training.checkpoint_files import list_checkpoints
from refalign_adapter.training.interrupt import Interrupted
from refalign_adapter.training.loop import train
from refalign_adapter.training.setup import build_accelerator, build_run, step_seed
from refalign_adapter.training.tracking import read_metrics

WEIGHTS = "adapter/pytorch_lora_weights.safetensors"
ACCELERATE = ("-m", "accelerate.commands.launch")


def start(tiny_world, output_dir, *overrides, launcher=()):
    """A training process in a group of its own, as in a terminal."""
    arguments = ["-m", "refalign_adapter.train", "--config", tiny_world / "recipe.yaml", f"output_dir={output_dir}"]
    return subprocess.Popen(
        list(map(str, [sys.executable, *launcher, *arguments, *overrides])),
        env={**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""},
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )


def wait_for_steps(folder, steps, process):
    limit = time.monotonic() + 200
    while len(read_metrics(folder / "metrics.jsonl")) < steps:
        assert process.poll() is None, process.stderr.read()
        assert time.monotonic() < limit
        time.sleep(0.02)


def test_ctrl_c_run_is_taken_up_where_it_stopped(tiny_world, make_recipe, tmp_path):
    steps = "max_train_steps=500"
    rest = ["train_batch_size=1", "checkpointing_steps=1000"]
    process = start(tiny_world, tmp_path / "stopped", steps, "dataloader_num_workers=1", *rest)
    wait_for_steps(tmp_path / "stopped", 3, process)
    os.killpg(process.pid, signal.SIGINT)  # as a terminal does it: to the data worker as well
    message = process.communicate(timeout=200)[1]
    assert process.returncode == 130
    (checkpoint,) = list_checkpoints(tmp_path / "stopped")
    step = int(checkpoint.name.partition("-")[2])
    assert 3 <= step < 500
    assert message.count("stopping after this step") == 1
    assert "Traceback" not in message
    (line,) = [line for line in message.splitlines() if "resume_from_checkpoint=latest" in line]
    assert line.startswith(f"stopped at step {step}, checkpoint written; to go on, run the same command with ")
    assert not (tmp_path / "stopped" / "adapter").exists()
    end = f"max_train_steps={step + 2}"  # a few steps more are the same as without a stop
    stopped = train(make_recipe(end, *rest, f"output_dir={tmp_path / 'stopped'}", "resume_from_checkpoint=latest"))
    straight = train(make_recipe(end, *rest, f"output_dir={tmp_path / 'straight'}"))
    one, other = (load_file(folder.parent / WEIGHTS) for folder in (stopped, straight))
    assert all(torch.equal(one[name], other[name]) for name in one)


def test_a_recipe_of_the_checkout_under_accelerate_launch_and_ctrl_c(tiny_world, tmp_path):
    recipe = copy_recipe("demo/isolated", tmp_path / "mine.yaml")
    first_line = recipe.read_text().splitlines()[0].removeprefix("# accelerate launch ").split()
    small = yaml.safe_load((tiny_world / "recipe.yaml").read_text())
    changes = [f"{name}={json.dumps(value)}" for name, value in small.items() if name != "output_dir"]
    process = subprocess.Popen(
        [sys.executable, *ACCELERATE, *first_line, *changes, f"output_dir={tmp_path / 'out'}", "max_train_steps=500",
         "checkpointing_steps=1000", "validation_steps=null"],
        env={**os.environ, "OMP_NUM_THREADS": "1"}, stderr=subprocess.PIPE, text=True, start_new_session=True,
    )  # fmt: skip
    wait_for_steps(tmp_path / "out", 2, process)
    os.killpg(process.pid, signal.SIGINT)
    message = process.communicate(timeout=200)[1]
    assert process.returncode != 0
    assert "resume_from_checkpoint=latest" in message
    (checkpoint,) = list_checkpoints(tmp_path / "out")
    assert (checkpoint / WEIGHTS).is_file()
    assert load_recipe(tmp_path / "out" / "recipe.yaml").adapter.r == 4


def test_sigterm_while_validating_stops_after_the_step(make_recipe, tmp_path, monkeypatch):
    def validate(*_, **__):
        if signal.getsignal(signal.SIGTERM) is not before:
            os.kill(os.getpid(), signal.SIGTERM)
        return {"flow": 1.0}

    before = signal.getsignal(signal.SIGTERM)
    monkeypatch.setattr(loop, "validate", validate)
    with pytest.raises(Interrupted, match="^stopped at step 1, checkpoint written") as caught:
        train(make_recipe("checkpointing_steps=1", "validation_steps=1"))
    assert caught.value.exit_code == 143
    assert signal.getsignal(signal.SIGTERM) is before
    assert [path.name for path in list_checkpoints(tmp_path / "out")] == ["checkpoint-1"]


@pytest.mark.parametrize(
    "adapter",
    [
        pytest.param(["dropout.references=0.5"], marks=pytest.mark.slow),
        ["adapter.attention=isolated", "adapter.lora_scope=reference"],
    ],
    ids=["joint", "isolated reference"],
)
def test_two_processes_average_their_gradients(tiny_world, make_recipe, launch, tmp_path, adapter):
    """One step of SGD on two processes is the step that the mean gradient of both batches gives."""
    options = ["optimizer=sgd", "max_train_steps=1", "train_batch_size=1", "gradient_accumulation_steps=1",
               "max_grad_norm=null", "adam_weight_decay=0", "adapter.lora_dropout=0", "learning_rate=1.0",
               "validation_steps=1", *adapter]  # fmt: skip
    launcher = (*ACCELERATE, "--multi_gpu", "--num_processes", "2", "--main_process_port", "0")
    result = launch(tmp_path / "two", *options, launcher=launcher, environment={"ACCELERATE_USE_CPU": "true"})
    assert result.returncode == 0, result.stderr
    recipe = make_recipe(*options)
    run = build_run(recipe, build_accelerator(recipe, tmp_path), tmp_path)
    total, flows = 0, []
    for process in (0, 1):
        sampler = run.data.sampler
        sampler.step_size, sampler.rank, sampler.world_size = 2, process, 2
        batch = next(run.data.training_batches(0, 0))
        generator = torch.Generator().manual_seed(step_seed(0, 0, process))
        output = run.module(batch, run.data.empty_text, generator=generator, weights={"reference": 1.0})
        total, flows = total + output.loss / 2, [*flows, float(output.flow)]
    total.backward()
    saved = open_adapter(tmp_path / "two" / "adapter").tensors()
    for name, parameter in run.trained.branch.named_parameters():
        expected = (parameter - parameter.grad).detach()
        assert torch.allclose(saved[name.replace(".refalign", "")], expected, atol=1e-6), name
    before, row, after = read_metrics(tmp_path / "two" / "metrics.jsonl")
    assert row["train/flow"] == pytest.approx(sum(flows) / 2, rel=1e-6)
    alone = train(make_recipe("max_train_steps=1", "validation_steps=1", *options[2:]))
    assert before["validation/flow"] == pytest.approx(
        read_metrics(alone.parent / "metrics.jsonl")[0]["validation/flow"], rel=1e-6
    )
    assert after["validation/flow"] != before["validation/flow"]


def command(tiny_world, *overrides):
    return main(["--config", str(tiny_world / "recipe.yaml"), *overrides])


def test_mistakes_are_told_at_once_and_nothing_is_written(tiny_world, tmp_path, capsys):
    mistakes = ["learning_rte=1", "adapter.r=0", "seed=x", "dropout.text=0.9", "optimizer=adamx"]
    assert command(tiny_world, f"output_dir={tmp_path / 'out'}", *mistakes) == 2
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 5
    assert all(line.startswith("error: ") for line in lines)
    assert lines[0].endswith("learning_rte is no known field; did you mean learning_rate?")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["output_dir={file}/below"], r"^output_dir: cannot write to "),
        (
            ["pretrained_model_name_or_path={folder}"],
            r"^pretrained_model_name_or_path: .* is no diffusers pipeline",
        ),
        (["data.cache_dir={folder}/none"], r"^cache_dir: there is no "),
        (["data.height=64"], r"^cache_dir: the cache in .* was made with height 48 instead of 64; run "),
        (["adapter.align_layers=4"], r"^align_layers reaches block 3, but the model has 3 blocks"),
        (
            ["resume_from_checkpoint=latest", "output_dir={damaged}"],
            r"^resume_from_checkpoint: no checkpoint in .* is whole: checkpoint-3 \(it lacks training/state.json\)",
        ),
        (
            ["adapter.attention=isolated", "adapter.lora_scope=all", "adapter.reference_size=[33,48]"],
            r"^adapter.reference_size must be a multiple of what a token covers, \[16, 16\] pixels, got \[33, 48\]",
        ),
        (["train_batch_size=64"], r"^train_batch_size: a step takes 64 samples"),
        (["data.validation_rows=10"], r"^data.validation_rows must leave rows to train on, got 10 of 10"),
        (["resume_from_checkpoint={folder}"], r"^resume_from_checkpoint: .* is no checkpoint"),
        (["init_adapter={folder}"], r"^init_adapter: .* is no adapter folder"),
        (
            ["sample_steps=1", "sample_prompts=[{{prompt: a}}]", "sample.height=50"],
            r"^height must be a multiple of 16",
        ),
    ],
)
def test_what_does_not_fit_is_one_line(make_recipe, tmp_path, overrides, message):
    (tmp_path / "file").write_text("")
    (tmp_path / "folder").mkdir()
    (tmp_path / "damaged" / "checkpoint-3" / "training").mkdir(parents=True)
    places = {name: tmp_path / name for name in ("file", "folder", "damaged")}
    with pytest.raises(UserError, match=message) as caught:
        train(make_recipe(*[item.format(**places) for item in overrides]))
    assert len(str(caught.value).splitlines()) == 1


def test_a_folder_that_cannot_be_written_is_told_before_any_model_is_loaded(tiny_world, tmp_path, capsys):
    (tmp_path / "file").write_text("")
    places = [f"output_dir={tmp_path / 'file' / 'out'}", "pretrained_model_name_or_path=nowhere"]
    assert command(tiny_world, *places) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("error: output_dir: cannot write to ")


def test_checkpoints_of_another_run_are_not_mixed_with_this_ones(make_recipe, tmp_path):
    train(make_recipe("max_train_steps=2", "checkpointing_steps=1"))
    with pytest.raises(UserError, match=r"^output_dir: .* holds checkpoint-2 of an earlier run; set resume_from_chec"):
        train(make_recipe("max_train_steps=2"))
    with pytest.raises(UserError, match=r"holds checkpoint-2 of an earlier run"):
        train(make_recipe(f"resume_from_checkpoint={tmp_path / 'out' / 'checkpoint-1'}"))
    train(make_recipe("max_train_steps=3", "resume_from_checkpoint=latest"))
    assert list_checkpoints(tmp_path / "out")[-1].name == "checkpoint-3"


def test_a_checkpoint_of_another_optimizer_is_told_before_the_base_is_loaded(make_recipe, capsys):
    train(make_recipe("max_train_steps=1", "checkpointing_steps=1", "optimizer=adamw"))
    capsys.readouterr()
    given = ["resume_from_checkpoint=latest", "pretrained_model_name_or_path=nowhere"]
    with pytest.raises(UserError) as caught:
        train(make_recipe(*given, "optimizer=sgd"))
    assert re.fullmatch(
        "resume_from_checkpoint: '.*checkpoint-1' has the state of optimizer 'adamw', this recipe's is SGD; set "
        "optimizer=adamw, or start anew from its weights with init_adapter='.*adapter' and another output_dir",
        str(caught.value),
    )
    assert "changed since then" not in "".join(capsys.readouterr())


def test_precision_of_recipe_and_launcher_must_agree(make_recipe, monkeypatch, tmp_path):
    monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", "bf16")
    with pytest.raises(UserError, match="the recipe says 'no' and accelerate launch 'bf16'"):
        build_accelerator(make_recipe("mixed_precision=no"), tmp_path)
    monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", "fp16")
    with pytest.raises(UserError, match="^mixed_precision must be no or bf16, accelerate launch says 'fp16'"):
        build_accelerator(make_recipe(), tmp_path)


def test_help_documents_every_field(capsys):
    with pytest.raises(SystemExit, match="^0$"):
        main(["--help"])
    text = capsys.readouterr().out
    assert [path for path in field_paths() if f"{path}: " not in text] == []
    assert "  learning_rate: float > 0 ≤ 1000 (default 0.0001)\n      of the LoRA\n" in text
    assert "  adapter.target_modules: list of text or text or null (default null)" in text
