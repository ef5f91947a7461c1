"""The adapter section of a recipe: its defaults are the configuration's, and what follows from it."""

from dataclasses import astuple

import pytest
from recipe_problems import problems

from refalign_adapter.config import RefAlignConfig
from refalign_adapter.flow import unshifted
from refalign_adapter.recipes.cache_options import options_of
from refalign_adapter.recipes.file import load_recipe
from refalign_adapter.training.setup import step_options


def test_an_adapter_that_is_not_spoken_of_is_that_of_the_configuration(recipe_file):
    recipe = load_recipe(recipe_file())
    assert recipe.adapter_config() == RefAlignConfig(base_model="base")
    assert (recipe.adapter.attention, recipe.adapter.lora_scope) == ("isolated", "reference")
    assert load_recipe(recipe_file(), ["adapter.attention=isolated", "adapter.lora_scope=null"]) == recipe
    joint = load_recipe(recipe_file(), ["adapter.attention=joint"])
    assert joint.adapter_config() == RefAlignConfig(attention="joint", base_model="base")
    assert joint.adapter.lora_scope == "all"
    assert problems(recipe_file(), "adapter.attention=joint", "adapter.lora_scope=reference") == [
        "adapter.lora_scope must be one of ['all'] with attention='joint', got 'reference'"
    ]
    assert problems(recipe_file(), "adapter.lora_scope=3") == ["adapter.lora_scope should be a valid string, got 3"]
    assert problems(recipe_file(), "adapter.attention=[joint]") == [
        "adapter.attention should be a valid string, got ['joint']"
    ]


REFERENCE_SCOPE = ("adapter.attention=isolated", "adapter.lora_scope=reference")


@pytest.mark.parametrize(
    ("overrides", "shares"),
    [
        ((), (0.1, 0, 0)),
        (("adapter.attention=joint",), (0.1, 0.1, 0.1)),
        (("adapter.attention=joint", "dropout.text=0", "dropout.both=0.3"), (0, 0.1, 0.3)),
        (("adapter.attention=isolated", "adapter.lora_scope=all"), (0.1, 0.1, 0.1)),
        (REFERENCE_SCOPE, (0.1, 0, 0)),
        ((*REFERENCE_SCOPE, "dropout.text=0.4", "dropout.references=0", "dropout.both=0.0"), (0.4, 0, 0)),
        ((*REFERENCE_SCOPE, "adapter.null_reference=zeros"), (0.1, 0.1, 0.1)),
        ((*REFERENCE_SCOPE, "adapter.null_reference=zeros", "dropout.references=0.3"), (0.1, 0.3, 0.1)),
    ],
)
def test_conditions_dropped_by_default_depend_on_the_scope(recipe_file, overrides, shares):
    recipe = load_recipe(recipe_file(), overrides)
    assert astuple(recipe.dropout_shares()) == shares
    options = step_options(recipe, unshifted)
    assert (options.text_dropout, options.reference_dropout, options.both_dropout) == shares


def test_references_are_not_dropped_where_they_alone_are_trained(recipe_file):
    assert problems(recipe_file("dropout: {references: 0.1, both: 0.2}\n"), *REFERENCE_SCOPE) == [
        f"dropout.{name} must be 0 with adapter.lora_scope='reference', got {share}; leave it out: without references "
        "that LoRA is the base itself, and the step would train nothing"
        for name, share in (("references", 0.1), ("both", 0.2))
    ]
    assert problems(recipe_file(), *REFERENCE_SCOPE, "dropout.text=0.9", "dropout.both=0.2") == [
        "dropout: the shares must sum to at most 1, got text 0.9 + references 0.0 + both 0.2 = 1.1",
        "dropout.both must be 0 with adapter.lora_scope='reference', got 0.2; leave it out: without references that "
        "LoRA is the base itself, and the step would train nothing",
    ]


def test_the_adapter_and_its_cache_agree_on_references(recipe_file):
    overrides = ("adapter.attention=isolated", "adapter.reference_scale=0.5", "adapter.drop_background=true")
    recipe = load_recipe(recipe_file(), overrides)
    for made in (recipe.adapter_config(), options_of(recipe)):
        assert (made.reference_scale, made.drop_background) == (0.5, True)
    default = options_of(load_recipe(recipe_file()))
    assert (default.reference_scale, default.drop_background) == (1.0, False)
    assert problems(recipe_file(), "adapter.attention=isolated", "adapter.reference_scale=0") == [
        "adapter.reference_scale must be in (0, 1], got 0.0"
    ]
    sized = load_recipe(recipe_file(), ("adapter.attention=isolated", "adapter.reference_size=[512, 384]"))
    assert (sized.adapter_config().reference_size, options_of(sized).reference_size) == ((512, 384), (512, 384))
    assert options_of(sized).compared()["reference_size"] == [512, 384]
    assert problems(recipe_file(), "adapter.attention=isolated", "adapter.reference_size=[512]") == [
        "adapter.reference_size must be [height, width] in pixels, each in [1, 4096], or null, got [512]"
    ]
    assert problems(recipe_file(), "adapter.attention=joint", "adapter.drop_background=true") == [
        "adapter.drop_background needs attention='isolated', got True with 'joint'"
    ]


def test_where_references_stand_is_the_adapters(recipe_file):
    places = ("adapter.attention=isolated", "adapter.reference_frame=-1", "adapter.reference_place=beyond")
    config = load_recipe(recipe_file(), places).adapter_config()
    assert (config.reference_frame, config.reference_place) == (-1, "beyond")
    clean = ("adapter.attention=joint", "adapter.reference_timestep=clean")
    assert load_recipe(recipe_file(), clean).adapter_config().reference_timestep == "clean"
    assert problems(recipe_file(), "adapter.attention=joint", "adapter.reference_place=beyond") == [
        "adapter.reference_place needs attention='isolated', got 'beyond' with 'joint'"
    ]
