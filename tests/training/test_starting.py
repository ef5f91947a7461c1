"""What a run may begin with: checkpoints of the first versions, another run's adapter, what a killed one left."""

import json
import os
import shutil
import signal
import subprocess
import sys
import warnings

import pytest
import torch
from safetensors.torch import load_file, save_file

from refalign_adapter.errors import UserError
from refalign_adapter.leftovers import HOST
from refalign_adapter.recipes.file import load_recipe
from refalign_adapter.training.checkpoint_files import find_checkpoint
from refalign_adapter.training.loop import train
from refalign_adapter.training.objectives import heads_state
from refalign_adapter.training.setup import build_accelerator, build_run

WEIGHTS = "adapter/pytorch_lora_weights.safetensors"
FAST = ("optimizer=adamw", "gradient_accumulation_steps=1", "max_train_steps=4", "checkpointing_steps=2")
AVERAGED = (*FAST, "ema_decay=0.5")


@pytest.fixture(scope="module")
def finished(tiny_world, tmp_path_factory):
    """The folder of a run with checkpoints 2 and 4 and a moving average; not to be changed."""
    out = tmp_path_factory.mktemp("finished") / "out"
    train(load_recipe(tiny_world / "recipe.yaml", [f"output_dir={out}", *AVERAGED]))
    return out


def same(one, other):
    left, right = load_file(one), load_file(other)
    return left.keys() == right.keys() and all(torch.equal(left[name], right[name]) for name in left)


def as_first_versions_wrote_it(checkpoint):
    """No checksums, no count of skipped steps; the adapter holds the weights themselves, not their average."""
    (checkpoint / "training/checksums.json").unlink()
    raw = checkpoint / "training/lora.safetensors"
    weights = checkpoint / WEIGHTS
    names = {f"transformer.{name.replace('.refalign.', '.')}": tensor for name, tensor in load_file(raw).items()}
    assert names.keys() == load_file(weights).keys()
    from safetensors import safe_open

    with safe_open(weights, "pt") as file:
        metadata = file.metadata()
    save_file(names, weights, metadata)
    raw.unlink()
    state = checkpoint / "training/state.json"
    content = json.loads(state.read_text())
    del content["skipped"], content["run"]["rows"]
    state.write_text(json.dumps(content))


def copy_of(checkpoint, folder):
    shutil.copytree(checkpoint, folder / checkpoint.name)
    return folder / checkpoint.name


def test_a_checkpoint_of_the_first_versions_is_taken_up_exactly(finished, make_recipe, tmp_path, capsys):
    as_first_versions_wrote_it(copy_of(finished / "checkpoint-2", tmp_path / "out"))
    train(make_recipe(*AVERAGED, "resume_from_checkpoint=latest"))
    assert "resumed from " in capsys.readouterr().err
    for name in ("lora", "ema", "optimizer", "projectors"):
        file = f"checkpoint-4/training/{name}.safetensors"
        assert same(finished / file, tmp_path / "out" / file), name
    assert same(finished / WEIGHTS, tmp_path / "out" / WEIGHTS)


@pytest.mark.parametrize("file", ["training/ema.safetensors", "training/optimizer.safetensors", WEIGHTS])
@pytest.mark.parametrize("damage", ["torn", "gone"])
def test_damage_in_one_of_the_first_versions_is_one_line(finished, make_recipe, tmp_path, file, damage):
    checkpoint = copy_of(finished / "checkpoint-2", tmp_path / "out")
    as_first_versions_wrote_it(checkpoint)
    if damage == "gone":
        (checkpoint / file).unlink()
    else:
        os.truncate(checkpoint / file, 100)
    with pytest.raises(
        UserError, match="^resume_from_checkpoint: .*checkpoint-2' is damaged .*; delete it to"
    ) as told:
        train(make_recipe(*AVERAGED, "resume_from_checkpoint=latest"))
    assert len(str(told.value).splitlines()) == 1


def build(make_recipe, tmp_path, *overrides):
    recipe = make_recipe(*FAST, *overrides)
    return build_run(recipe, build_accelerator(recipe, tmp_path), tmp_path)


OTHERS = {
    "adapter.lora_alpha=8": "has lora_alpha 4.0, this recipe 8.0",
    "adapter.r=8": "has r 4, this recipe 8",
    "adapter.attention=isolated": "has attention 'joint', this recipe 'isolated'",
    "adapter.rank_pattern={to_q: 2}": "has the rank and alpha of blocks.0.attn1.to_q ",
    "adapter.alpha_pattern={to_q: 2}": "has the rank and alpha of blocks.0.attn1.to_q ",
    "adapter.target_modules=[to_q, to_k]": "the LoRA in .* do not fit this recipe: blocks.* here not known",
    "adapter.align_layers=[1]": "the projectors in .* do not fit this recipe: ",
}


@pytest.mark.parametrize("change", OTHERS)
def test_another_adapter_is_refused_as_a_start(finished, make_recipe, tmp_path, change):
    with pytest.raises(UserError, match=f"^init_adapter: .*{OTHERS[change]}") as told:
        build(make_recipe, tmp_path, f"init_adapter={finished / 'adapter'}", "adapter.lora_scope=all", change)
    (line,) = str(told.value).splitlines()
    assert line.endswith("; use the adapter section it was trained with")


def test_a_lora_for_references_alone_and_one_for_all_are_no_start_for_each_other(finished, make_recipe, tmp_path):
    changes = ["adapter.attention=isolated", "adapter.lora_scope=reference"]
    with pytest.raises(UserError, match="^init_adapter: .* has lora_scope 'all', this recipe 'reference'; use the"):
        build(make_recipe, tmp_path, f"init_adapter={finished / 'adapter'}", *changes)


@pytest.mark.parametrize("change", ["adapter.lora_dropout=0", "learning_rate=1e-5", "seed=3", "alignment.weight=0"])
def test_what_does_not_change_the_adapter_may_be_another(finished, make_recipe, tmp_path, change):
    run = build(make_recipe, tmp_path, f"init_adapter={finished / 'adapter'}", change)
    weights = load_file(finished / WEIGHTS)
    for name, parameter in run.trained.branch.named_parameters():
        assert torch.equal(weights[f"transformer.{name.replace('.refalign', '')}"], parameter)


SIDECAR = "training/projectors.safetensors"


def with_sidecar(finished, folder):
    """A copy of a finished run's adapter and what lies beside it."""
    for name in ("adapter", "training"):
        shutil.copytree(finished / name, folder / name)
    return folder


def flip(path):
    content = bytearray(path.read_bytes())
    content[-3] ^= 1
    path.write_bytes(bytes(content))


def rename_in_checksums(path):
    checksums = path.with_name("checksums.json")
    checksums.write_text(checksums.read_text().replace("projectors", "others"))


SPOILT = {
    "another": (flip, "training/projectors.safetensors is not as it was written"),
    "not named": (rename_in_checksums, "checksums.json does not name projectors.safetensors"),
    "no checksums": (lambda path: path.with_name("checksums.json").write_text("[]"), "holds no checksums"),
    "no JSON": (lambda path: path.with_name("checksums.json").write_text("{"), "is not readable JSON"),
    "torn": (lambda path: os.truncate(path, 50), "is not as it was written"),
}


@pytest.mark.parametrize("spoilt", SPOILT)
def test_projectors_that_are_not_as_they_were_written(finished, make_recipe, tmp_path, spoilt):
    folder = with_sidecar(finished, tmp_path / "stage1")
    act, message = SPOILT[spoilt]
    act(folder / SIDECAR)
    with pytest.raises(UserError, match=f"^init_adapter: .*its projectors, .*{message}.*copy them again") as told:
        build(make_recipe, tmp_path, f"init_adapter={folder / 'adapter'}")
    assert len(str(told.value).splitlines()) == 1
    build(make_recipe, tmp_path, f"init_adapter={folder / 'adapter'}", "alignment.weight=0")  # needs none
    (folder / SIDECAR).unlink()
    build(make_recipe, tmp_path, f"init_adapter={folder / 'adapter'}")


def test_projectors_of_the_first_versions_have_no_checksum(finished, make_recipe, tmp_path):
    folder = with_sidecar(finished, tmp_path / "stage1")
    (folder / "training/checksums.json").unlink()
    run = build(make_recipe, tmp_path, f"init_adapter={folder / 'adapter'}")
    saved = load_file(folder / SIDECAR)
    assert all(torch.equal(saved[name], value) for name, value in heads_state(run.trained.objectives).items())


def test_a_checkpoints_projectors_are_compared_too(finished, make_recipe, tmp_path):
    checkpoint = copy_of(finished / "checkpoint-2", tmp_path)
    build(make_recipe, tmp_path, f"init_adapter={checkpoint / 'adapter'}")
    flip(checkpoint / SIDECAR)
    with pytest.raises(UserError, match="^init_adapter: .*its projectors, .* is not as it was written"):
        build(make_recipe, tmp_path, f"init_adapter={checkpoint / 'adapter'}")


PATTERNS = {
    "rank_pattern={nosuch: 2}": "adapter.rank_pattern: 'nosuch' matches no layer",
    "alpha_pattern={nosuch: 2}": "adapter.alpha_pattern: 'nosuch' matches no layer",
    "target_modules=[to_q, nosuch]": "adapter.target_modules: 'nosuch' matches no layer",
    "target_modules=[nosuch]": "target_modules: .'nosuch',. do not fit this transformer",
    "target_modules=nosuch": "target_modules: 'nosuch' do not fit this transformer",
    "rank_pattern={'((': 2}": "adapter.rank_pattern holds '..', which is no regular expression",
    "alpha_pattern={'a{2,1}': 2}": "adapter.alpha_pattern holds .* which is no regular expression",
    "target_modules='*'": "adapter.target_modules holds '.', which is no regular expression",
}


@pytest.mark.parametrize("change", PATTERNS)
def test_patterns_that_match_nothing_are_one_line_of_ours(make_recipe, tmp_path, change):
    with warnings.catch_warnings():
        warnings.simplefilter("error", RuntimeWarning)
        with pytest.raises(UserError, match=PATTERNS[change]) as told:
            build(make_recipe, tmp_path, f"adapter.{change}")
    assert len(str(told.value).splitlines()) == 1


LEAVER = """
import sys, time
from pathlib import Path
from refalign_adapter.atomic import atomic_file, atomic_folder
from refalign_adapter.leftovers import temporary_path
out = Path(sys.argv[1])
with (
    atomic_folder(out / "checkpoint-4") as checkpoint, atomic_folder(out / "adapter") as adapter,
    atomic_folder(out / "training"), atomic_file(out / "metrics.jsonl"), atomic_file(out / "recipe.yaml"),
    atomic_file(out / "samples/step-2/00-a-dog.mp4"),
):
    (checkpoint / "half").write_text("x")
    (adapter / "half").write_text("x")
    print("ready", flush=True)
    time.sleep(60)
"""


def test_what_a_killed_run_left_goes_with_the_next_one(make_recipe, finished, tmp_path):
    out = tmp_path / "out"
    copy_of(finished / "checkpoint-2", out)
    process = subprocess.Popen([sys.executable, "-c", LEAVER, str(out)], stdout=subprocess.PIPE, text=True)
    assert process.stdout.readline() == "ready\n"
    process.kill()
    process.communicate()
    (out / f".aside.{HOST}.{process.pid}.old").mkdir()
    mine = out / f".mine.{HOST}.{os.getpid()}.tmp"
    mine.touch()
    assert len([path for path in out.rglob(".*.*") if f".{process.pid}" in path.name]) == 7
    assert find_checkpoint(out, "latest").name == "checkpoint-2"
    train(make_recipe(*AVERAGED, "resume_from_checkpoint=latest"))
    assert [path for path in out.rglob(".*.*") if f".{process.pid}" in path.name] == []
    assert mine.exists()  # of a process that lives
    assert (out / "aside").is_dir()  # put back: nothing else is there of that name
    assert process.returncode == -signal.SIGKILL
    assert same(finished / WEIGHTS, out / WEIGHTS)
