"""Cached references from a file that anyone may have written: one line at loading, before any model runs."""

import json

import pytest
import torch
from safetensors import safe_open
from tiny_adapter import SIZE, save_tiny_adapter
from tiny_generation import IMAGES, generate
from tiny_models import tiny_pipeline

import refalign_adapter as ra
from refalign_adapter.branch.reference_cache import FORMAT
from refalign_adapter.tensor_files import save_tensors


@pytest.fixture(scope="module")
def pipe(tmp_path_factory):
    folder = save_tiny_adapter(tmp_path_factory.mktemp("a") / "a", attention="isolated", lora_scope="reference")
    made = ra.load_adapter(tiny_pipeline(), folder)
    made.set_progress_bar_config(disable=True)
    return made


@pytest.fixture(scope="module")
def saved(pipe, tmp_path_factory):
    """(tensors, facts) of a good file."""
    path = pipe.encode_references(IMAGES, **SIZE).save(tmp_path_factory.mktemp("c") / "c.safetensors")
    with safe_open(path, "pt") as file:
        return {name: file.get_tensor(name) for name in file.keys()}, json.loads(file.metadata()[FORMAT])  # noqa: SIM118


def load(path, tensors, facts):
    tensors = {name: tensor.contiguous() for name, tensor in tensors.items()}
    save_tensors(path, tensors, {FORMAT: json.dumps(facts)})
    return ra.ReferenceCache.load(path)


def nan(tensor):
    tensor = tensor.clone()
    tensor[0, 0, 0, 0] = torch.nan
    return tensor


TENSORS = {
    "keys shorter than values": {"keys.1": lambda t: t[:, :1]},
    "values shorter than keys": {"values.1": lambda t: t[:, :1]},
    "no token": {name: lambda t: t[:, :0] for name in ("keys.0", "values.0")},
    "whole numbers": {"keys.0": lambda t: t.int()},
    "eight bits": {"values.2": lambda t: t.to(torch.float8_e4m3fn)},
    "NaN": {"values.1": nan},
    "infinity": {"keys.2": lambda t: nan(t).nan_to_num(nan=float("inf"))},
    "another rank": {"keys.0": lambda t: t.flatten(2)},
    "no keys of the first block": {"keys.0": lambda t: None},
    "another tensor": {"more": lambda t: torch.zeros(1)},
    "a mask of numbers": {"mask": lambda t: torch.ones(1, 12, dtype=torch.int64)},
    "a mask that is added": {"mask": lambda t: torch.ones(1, 12)},
    "a longer mask": {"mask": lambda t: torch.ones(1, 13, dtype=torch.bool)},
    "a mask of three axes": {"mask": lambda t: torch.ones(1, 12, 2, dtype=torch.bool)},
    "a mask for two": {"mask": lambda t: torch.ones(2, 12, dtype=torch.bool)},
    "a mask without axes": {"mask": lambda t: torch.tensor(True)},
    "a mask of nothing": {"mask": lambda t: torch.zeros(1, 12, dtype=torch.bool)},
}
FACTS = {
    "an unknown fact": {"zz": 1},
    "no name": {"adapter_name": None},
    "a name that is none": {"adapter_name": True},
    "an endless name": {"adapter": "a" * 10_000},
    "frames of another kind": {"frames": "2"},
    "a canvas of another kind": {"canvas": [0, 4]},
}


@pytest.mark.parametrize("changes", TENSORS.values(), ids=TENSORS)
def test_tensors_that_no_run_wrote(saved, tmp_path, changes):
    tensors, facts = saved
    changed = {name: change(tensors.get(name)) for name, change in changes.items()}
    tensors = {name: tensor for name, tensor in (tensors | changed).items() if tensor is not None}
    with pytest.raises(ra.UserError, match="holds no cached references") as told:
        load(tmp_path / "c.safetensors", tensors, facts)
    assert "\n" not in str(told.value)


def test_complex_numbers_that_no_run_wrote(saved, tmp_path):
    """By their name in the header, in place of a type of their size: safetensors before 0.7 writes none."""
    tensors, facts = saved
    path = tmp_path / "c.safetensors"
    save_tensors(path, tensors | {"keys.0": tensors["keys.0"].double()}, {FORMAT: json.dumps(facts)})
    data = path.read_bytes()
    assert data.count(b'"F64"') == 1
    path.write_bytes(data.replace(b'"F64"', b'"C64"'))
    with pytest.raises(ra.UserError, match="holds no cached references") as told:
        ra.ReferenceCache.load(path)
    assert "\n" not in str(told.value)


@pytest.mark.parametrize("changes", FACTS.values(), ids=FACTS)
def test_facts_that_no_run_wrote(saved, tmp_path, changes):
    tensors, facts = saved
    with pytest.raises(ra.UserError, match="holds no cached references") as told:
        load(tmp_path / "c.safetensors", tensors, {**facts, **changes})
    assert len(str(told.value)) < 600


def test_a_mask_alone(tmp_path, saved):
    with pytest.raises(ra.UserError, match="other tensors than keys and values of every block"):
        load(tmp_path / "c.safetensors", {"mask": torch.ones(1, 2, dtype=torch.bool)}, saved[1])


def test_what_was_written_is_read(pipe, saved, tmp_path):
    expected = generate(pipe, "a cat", IMAGES)
    cache = load(tmp_path / "c.safetensors", *saved)
    assert torch.equal(generate(pipe, "a cat", reference_cache=cache), expected)
