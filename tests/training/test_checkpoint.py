"""Checkpoints: whole or not there, the newest kept, damage told in one line."""

import json
import os
import shutil

import pytest
import torch
from safetensors.torch import load_file
from tiny_adapter import weights_of

from refalign_adapter.errors import UserError
from refalign_adapter.training.checkpoint import Progress, save_checkpoint
from refalign_adapter.training.checkpoint_files import find_checkpoint, list_checkpoints
from refalign_adapter.training.restore import load_checkpoint, load_initial_weights
from refalign_adapter.training.setup import build_accelerator, build_run

SCOPES = {
    "all": (),
    "reference": ("adapter.attention=isolated", "adapter.lora_scope=reference"),
}


@pytest.fixture
def make_run(make_recipe, tmp_path):
    def make(*overrides):
        recipe = make_recipe(*overrides)
        run = build_run(recipe, build_accelerator(recipe, tmp_path), tmp_path)
        for _, parameter in run.trained.named_parameters():
            parameter.grad = torch.ones_like(parameter)
        run.optimizer.step()
        return run

    return make


def test_newest_are_kept_and_found_by_number(make_run, tmp_path):
    run = make_run()
    leftover = tmp_path / ".checkpoint-1.4194305.tmp"  # above any process's number
    leftover.mkdir()
    for step in (2, 9, 10, 11):
        save_checkpoint(tmp_path, run.trained, Progress(step=step), {}, limit=2)
    assert [path.name for path in list_checkpoints(tmp_path)] == ["checkpoint-10", "checkpoint-11"]
    assert not leftover.exists()
    assert find_checkpoint(tmp_path, "latest") == tmp_path / "checkpoint-11"
    assert find_checkpoint(tmp_path, None) is None
    assert find_checkpoint(tmp_path / "empty", "latest") is None
    with pytest.raises(UserError, match="is no checkpoint, it lacks training/state.json"):
        find_checkpoint(tmp_path, str(tmp_path))


@pytest.mark.parametrize("scope", SCOPES)
def test_everything_comes_back(make_run, tmp_path, scope):
    run = make_run("ema_decay=0.9", *SCOPES[scope])
    run.trained.ema.step([parameter for _, parameter in run.trained.branch.named_parameters()])
    folder = save_checkpoint(tmp_path, run.trained, Progress(3, 6, 1, 2), {"seed": 5})
    other = make_run("ema_decay=0.9", "seed=1", "learning_rate=1e-4", *SCOPES[scope])
    progress, facts = load_checkpoint(folder, other.trained)
    assert (progress, facts) == (Progress(3, 6, 1, 2), {"seed": 5})
    pairs = zip(run.trained.named_parameters(), other.trained.named_parameters(), strict=True)
    for (name, one), (_, two) in pairs:
        assert torch.equal(one, two), name
        left, right = run.trained.optimizer.state[one], other.trained.optimizer.state[two]
        assert left.keys() == right.keys()
        assert left["step"] == right["step"] == 1
        tensors = [key for key, value in left.items() if isinstance(value, torch.Tensor)]
        assert len(tensors) == 6  # both moments, their scales and their quantisation maps
        assert all(torch.equal(left[key], right[key]) and left[key].dtype == right[key].dtype for key in tensors)
    assert other.trained.optimizer.param_groups[0]["lr"] == 1e-4  # the recipe's, not the checkpoint's
    assert other.trained.ema.optimization_step == 1
    assert all(map(torch.equal, run.trained.ema.shadow_params, other.trained.ema.shadow_params))
    assert "pt" not in {path.suffix.strip(".") for path in folder.rglob("*")}
    assert {path.suffix for path in folder.rglob("*") if path.is_file()} == {".safetensors", ".json", ".md"}


@pytest.mark.parametrize(
    "name",
    [
        "adapter/pytorch_lora_weights.safetensors",
        "training/optimizer.safetensors",
        "training/projectors.safetensors",
        "training/state.json",
    ],
)
def test_damage_is_one_line(make_run, tmp_path, name):
    run = make_run()
    folder = save_checkpoint(tmp_path, run.trained, Progress(1, 2, 0, 2), {})
    file = folder / name
    for damage in (lambda: os.truncate(file, file.stat().st_size // 2), file.unlink):
        damage()
        with pytest.raises(
            UserError, match=r"^resume_from_checkpoint: .* is damaged .* delete it to resume"
        ) as caught:
            load_checkpoint(folder, run.trained)
        assert len(str(caught.value).splitlines()) == 1


def test_damage_of_weights_for_references_alone_is_one_line(make_run, tmp_path):
    run = make_run(*SCOPES["reference"])
    folder = save_checkpoint(tmp_path, run.trained, Progress(1, 2, 0, 2), {})
    file = weights_of(folder / "adapter")
    assert file.name == "refalign_reference_lora.safetensors"
    for damage in (lambda: os.truncate(file, file.stat().st_size // 2), file.unlink):
        damage()
        with pytest.raises(UserError, match=r"^resume_from_checkpoint: .* is damaged .* delete it to resume"):
            load_checkpoint(folder, run.trained)


@pytest.mark.parametrize("scope", SCOPES)
def test_an_adapter_starts_another_run_of_its_scope(make_run, tmp_path, scope):
    (other,) = set(SCOPES) - {scope}
    run = make_run(*SCOPES[scope])
    folder = save_checkpoint(tmp_path, run.trained, Progress(1, 2, 0, 2), {})
    second = make_run("seed=1", *SCOPES[scope]).trained
    assert load_initial_weights(str(folder / "adapter"), second.branch, second.objectives) == {"reference"}
    pairs = zip(run.trained.named_parameters(), second.named_parameters(), strict=True)
    assert all(torch.equal(one, two) for (_, one), (_, two) in pairs)
    third = make_run(*SCOPES[other]).trained
    before = [parameter.clone() for _, parameter in third.named_parameters()]
    refused = {
        "init_adapter": lambda: load_initial_weights(str(folder / "adapter"), third.branch, third.objectives),
        "resume_from_checkpoint": lambda: load_checkpoint(folder, third),
    }
    for field, act in refused.items():
        message = f"^{field}: .* has lora_scope '{scope}', this recipe '{other}'; use the adapter section"
        with pytest.raises(UserError, match=message) as caught:
            act()
        assert "\n" not in str(caught.value)
    assert all(
        torch.equal(parameter, then) for (_, parameter), then in zip(third.named_parameters(), before, strict=True)
    )


def test_a_damaged_adapter_to_start_from_is_one_line(make_run, tmp_path):
    run = make_run(*SCOPES["reference"]).trained
    folder = run.branch.save_pretrained(tmp_path / "adapter")
    weights_of(folder).write_bytes(b"no weights")
    with pytest.raises(UserError, match="^init_adapter: .* is damaged") as caught:
        load_initial_weights(str(folder), run.branch, [])
    assert "\n" not in str(caught.value)


def test_a_state_without_a_field_is_damaged(make_run, tmp_path):
    run = make_run()
    folder = save_checkpoint(tmp_path, run.trained, Progress(1, 2, 0, 2), {})
    state = json.loads((folder / "training" / "state.json").read_text())
    del state["position"]
    (folder / "training" / "state.json").write_text(json.dumps(state))
    with pytest.raises(UserError, match=r"is damaged \(state.json: position: field required\)"):
        load_checkpoint(folder, run.trained)


def test_names_are_those_of_when_reference_alignment_was_alone(make_run, tmp_path):
    run = make_run()
    folder = save_checkpoint(tmp_path, run.trained, Progress(1, 2, 0, 2), {}) / "training"
    (teacher,) = run.recipe.adapter.teachers
    encoded = teacher.replace("%", "%25").replace(".", "%2E")
    heads = {f"heads.{block}:{encoded}.proj.{layer}.weight" for block in (0, 1) for layer in (0, 2)}
    assert load_file(folder / "projectors.safetensors").keys() == heads
    state = json.loads((folder / "state.json").read_text())
    assert {name for name in state["optimizer"] if "lora" not in name} == {f"projectors.{name}" for name in heads}
    assert state["schedule"]["weight"] == 1.0
    assert "schedules" not in state


def test_a_checkpoint_of_another_adapter_is_refused(make_run, tmp_path):
    folder = save_checkpoint(tmp_path, make_run().trained, Progress(1, 2, 0, 2), {})
    with pytest.raises(UserError, match=r"has r 4, this recipe 8; use the adapter section"):
        load_checkpoint(folder, make_run("adapter.r=8").trained)
    with pytest.raises(UserError, match=r"the projectors in .*: heads.0:.* is \(24, 48\), here not known"):
        load_checkpoint(folder, make_run("adapter.align_layers=[1]").trained)


def test_what_is_written_half_is_never_seen(make_run, tmp_path, monkeypatch):
    run = make_run()
    monkeypatch.setattr("refalign_adapter.training.checkpoint.save_sidecar", lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        save_checkpoint(tmp_path, run.trained, Progress(1, 2, 0, 2), {})
    assert list(tmp_path.iterdir()) == []
    shutil.rmtree(tmp_path)
