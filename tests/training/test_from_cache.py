"""Training from a cache: no encoder is loaded, and the losses are those of encoding on the fly."""

import dataclasses
import shutil

import pytest
import torch

from refalign_adapter.data.cache.build import cache_dataset
from refalign_adapter.data.cache.collate import collate
from refalign_adapter.data.cache.dataset import open_cache
from refalign_adapter.data.cache.encode import RowEncoder
from refalign_adapter.data.cache.encoders import load_encoders
from refalign_adapter.data.cache.prepare import RowPreparer, plans_of
from refalign_adapter.data.sources.manifest import load_manifest
from refalign_adapter.recipes.cache_options import options_of
from refalign_adapter.recipes.file import load_recipe
from refalign_adapter.training.setup import build_accelerator, build_run

WITHOUT_ENCODERS = """
import sys
from refalign_adapter.train import main

code = main(sys.argv[1:])  # diffusers imports the code of all its VAEs with its first pipeline
parts = (".modeling_umt5", ".modeling_dinov2", ".tokenization_t5", ".tokenization_t5_fast")
found = [name for name in sys.modules if name.endswith(parts)]
print("loaded:", *found)
sys.exit(code)
"""


def test_no_encoder_is_imported_or_loaded(tiny_world, tmp_path, launch):
    """Neither could be: the base has none on disk, and the teacher is gone."""
    base = shutil.copytree(tiny_world / "base", tmp_path / "base")
    for name in ("vae", "text_encoder", "tokenizer"):
        shutil.rmtree(base / name)
    hidden = tiny_world / "teacher.away"
    (tiny_world / "teacher").rename(hidden)
    try:
        script = tmp_path / "train.py"
        script.write_text(WITHOUT_ENCODERS)
        options = ["max_train_steps=2", "validation_steps=1", f"pretrained_model_name_or_path={base}"]
        result = launch(tmp_path / "out", *options, module=[script])
    finally:
        hidden.rename(tiny_world / "teacher")
    assert result.returncode == 0, result.stderr
    assert result.stdout.splitlines()[-1].strip() == "loaded:"
    assert (tmp_path / "out/adapter/pytorch_lora_weights.safetensors").is_file()


class Keeping:
    """A store that keeps parts in memory as the encoders made them."""

    def __init__(self):
        self.parts = {}

    def shape(self, part, key):
        return tuple(self.parts[part, key].shape) if (part, key) in self.parts else None

    def write(self, part, key, tensor):
        self.parts[part, key] = tensor

    read = None


def encoded_on_the_fly(options, monkeypatch):
    """Keys of the rows and their samples, without a cache and without rounding."""
    exact = dataclasses.replace(options, dtype="fp32")
    encoders, rows, store = load_encoders(exact), load_manifest(options.train_data), Keeping()
    plans = plans_of(exact, encoders)
    encoder = RowEncoder(exact, encoders, plans, store)
    preparer = RowPreparer(plans, store)
    for row in rows:
        encoder.encode_text(row.caption)
    entries = [encoder.encode(row, preparer[row]) for row in rows]
    store.read = lambda part, key, expected=None: store.parts[part, key]
    dataset = open_cache(options)
    monkeypatch.setattr(dataset, "store", store)
    monkeypatch.setattr(dataset, "entries", entries)
    return dataset


@pytest.mark.parametrize(("dtype", "tolerance"), [("fp32", 0.0), ("bf16", 2**-8)])
def test_losses_are_those_of_encoding_on_the_fly(tiny_world, tmp_path, monkeypatch, dtype, tolerance):
    changes = [f"data.cache_dir={tmp_path / 'cache'}", f"data.dtype={dtype}", "adapter.lora_dropout=0"]
    recipe = load_recipe(tiny_world / "recipe.yaml", [*changes, "data.text_encoder_dtype=fp32"])
    options = options_of(recipe)
    cache_dataset(options, device="cpu")
    run = build_run(recipe, build_accelerator(recipe, tmp_path), tmp_path)
    cached, direct = open_cache(options), encoded_on_the_fly(options, monkeypatch)
    losses, gradients = [], []
    for dataset in (cached, direct):
        batch = collate([dataset[2], dataset[5]])
        generator = torch.Generator().manual_seed(0)
        empty = run.data.empty_text
        output = run.module(batch, empty, generator=generator, weights={"reference": 1.0}, drop_conditions=False)
        run.module.zero_grad()
        output.loss.backward()
        losses.append(torch.stack([output.flow, *output.logs.values()]))
        gradients.append(torch.cat([item.grad.flatten() for _, item in run.trained.named_parameters()]))
    if not tolerance:
        assert torch.equal(*losses)
        assert torch.equal(*gradients)
    else:
        assert not torch.equal(*losses)
        assert ((losses[0] - losses[1]).abs() <= tolerance * losses[1].abs().clamp_min(0.1)).all()
        assert (gradients[0] - gradients[1]).norm() <= 4 * tolerance * gradients[1].norm()
