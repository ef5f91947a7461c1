"""What an estimate is of: rows where they are here, shapes of the largest samples, the precision."""

import json

import pytest
from tiny_data import write_data

from refalign_adapter.errors import UserError


def test_rows_are_counted_by_source(setting_of, tmp_path):
    first, second = write_data(tmp_path / "first", 4), write_data(tmp_path / "second", 2)
    held_out = write_data(tmp_path / "held_out", 1)
    sources = json.dumps([{"path": str(first), "max_rows": 3}, {"path": str(second)}])
    setting = setting_of(f"data.train_data={sources}", f"data.validation_data={held_out}")
    counts = {f"train: {first}": 3, f"train: {second}": 2, f"validation: {held_out}": 1}
    assert setting.found.counts == counts
    assert [len(setting.found.rows[split]) for split in ("train", "validation")] == [5, 1]
    assert (len(setting.found.all), setting.references) == (6, 3)


@pytest.mark.parametrize("source", ["nothing/here/metadata.jsonl", "somebody/a-data-set"])
def test_rows_elsewhere_are_not_known_and_not_fetched(setting_of, source):
    setting = setting_of(f"data.train_data={source}", "data.max_references=5")
    assert setting.found is None
    assert setting.references == 5


def test_shapes_are_those_of_the_largest_size(setting_of):
    setting = setting_of(
        "data.buckets=[5x32x48, 9x48x64, 21x32x32]", "adapter.attention=isolated", "adapter.lora_scope=all"
    )
    assert setting.shapes.latents == (16, 3, 6, 8)
    assert setting.shapes.reference == (16, 6, 8)
    smaller = setting.changed({"adapter.reference_scale": 0.5, "data.buckets": None, "data.num_frames": 1})
    assert smaller.shapes.latents == (16, 1, 4, 6)
    assert smaller.shapes.reference == (16, 2, 4)
    assert set(smaller.shapes.targets["reference"].values()) == {(1, 2, 24)}
    assert smaller.models is setting.models


@pytest.mark.parametrize(
    ("given", "launched", "found"), [("no", "bf16", "no"), ("null", "no", "no"), ("null", "", "bf16")]
)
def test_precision_is_the_recipes_then_the_launchers_then_bf16(setting_of, monkeypatch, given, launched, found):
    monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", launched)
    assert setting_of(f"mixed_precision={given}").recipe.mixed_precision == found


def test_a_precision_that_training_does_not_do(setting_of, monkeypatch):
    monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", "fp16")
    with pytest.raises(UserError, match="no or bf16, accelerate launch says 'fp16'"):
        setting_of("mixed_precision=null")
