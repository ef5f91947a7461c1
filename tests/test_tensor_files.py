"""safetensors files whose bytes follow from their content."""

import torch
from safetensors import safe_open
from safetensors.torch import load_file

from refalign_adapter.tensor_files import save_tensors

METADATA = {"format": "pt", "zeta": '{"a": "\u00e4\\n"}', "alpha": "1", "refalign": "{}", "beta": "x" * 300}


def test_the_same_content_gives_the_same_bytes_whatever_its_order(tmp_path):
    tensors = {"b": torch.arange(6.0).view(2, 3), "a": torch.ones(3, dtype=torch.bfloat16), "c": torch.tensor(1)}
    contents = set()
    for number in range(8):  # hash tables of the library differ from call to call
        turned = dict(reversed(tensors.items())) if number % 2 else tensors
        save_tensors(tmp_path / "a", turned, dict(reversed(METADATA.items())) if number % 3 else METADATA)
        contents.add((tmp_path / "a").read_bytes())
    assert len(contents) == 1
    assert all(torch.equal(load_file(tmp_path / "a")[name], tensor) for name, tensor in tensors.items())
    with safe_open(tmp_path / "a", "pt") as file:
        assert file.metadata() == METADATA


def test_files_without_metadata_are_the_librarys_own(tmp_path):
    save_tensors(tmp_path / "a", {"x": torch.zeros(2)})
    with safe_open(tmp_path / "a", "pt") as file:
        assert file.metadata() is None
