"""What is tried where training does not fit."""

import pytest

from refalign_adapter.estimate.memory import training_memory
from refalign_adapter.estimate.setting import Asked, read_setting
from refalign_adapter.estimate.ways_out import ways_out
from refalign_adapter.recipes.file import load_recipe

ISOLATED = ("adapter.attention=isolated", "adapter.lora_scope=all", "train_batch_size=2", "data.num_frames=21")


def keys(ways):
    return [" ".join(way.changes) for way in ways]


@pytest.mark.slow
def test_each_way_has_the_total_of_the_recipe_with_it(setting_of, tiny):
    setting = setting_of(*ISOLATED)
    total = training_memory(setting).gpu.total
    tried = []
    ways = ways_out(setting, total - 1000, tried.append)
    assert keys(ways) == [
        "gradient_checkpointing=true",
        "gradient_checkpointing=true offload_activations=true",
        "quantization=nf4",
        "train_batch_size=1 gradient_accumulation_steps=2",
        "adapter.reference_scale=0.5",
        "data.num_frames=13",
    ]
    assert len(tried) == len(ways)
    for way in ways:
        recipe = load_recipe(tiny / "recipe.yaml", [*ISOLATED, *way.changes])
        assert training_memory(read_setting(recipe, Asked())).gpu.total == way.total
        assert way.fits is (way.total <= total - 1000)
    assert any(way.fits for way in ways)


@pytest.mark.slow
def test_where_none_is_enough_they_are_taken_together(setting_of):
    setting = setting_of(
        "adapter.attention=isolated", "adapter.lora_scope=all", "alignment.weight=0", "data.num_frames=9"
    )
    alone = ways_out(setting, 10**12, lambda _: None)
    *same, together = ways_out(setting, min(way.total for way in alone) - 1, lambda _: None)
    assert keys(same) == keys(alone)
    assert together.fits
    assert len(together.changes) > 1
    assert together.total < min(way.total for way in alone)


def test_where_nothing_is_enough_all_are_told_together(setting_of):
    *alone, last = ways_out(setting_of("gradient_checkpointing=true", "data.num_frames=9"), 1, lambda _: None)
    assert not last.fits
    assert set(last.changes) == {change for way in alone for change in way.changes}


@pytest.mark.parametrize(
    ("overrides", "expected"),
    [
        (("data.num_frames=1",), ["gradient_checkpointing", "offload_activations", "quantization"]),
        (("data.num_frames=1", "gradient_checkpointing=true", "quantization=nf4"), ["offload_activations"]),
        (
            ("gradient_checkpointing=true", "offload_activations=true", "quantization=int8", "data.num_frames=9"),
            ["data.num_frames"],
        ),
    ],
)
def test_nothing_is_tried_that_the_recipe_has_already(setting_of, overrides, expected):
    ways = ways_out(setting_of(*overrides), 10**12, lambda _: None)
    names = dict.fromkeys(change.partition("=")[0] for way in ways for change in way.changes)
    assert list(names) == expected


def test_of_several_sizes_the_longest_are_cut(setting_of):
    setting = setting_of("data.buckets=[21x32x48, 5x48x32, 17x32x48]")
    *_, last = ways_out(setting, 10**12, lambda _: None)
    assert last.changes == ("data.buckets=[13x32x48,5x48x32]",)
