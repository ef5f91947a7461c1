"""RefAlignConfig: all problems at once, JSON round trip."""

import dataclasses
import json

import pytest

import refalign_adapter as ra


def test_every_problem_is_told_at_once():
    with pytest.raises(ra.ConfigError) as caught:
        ra.RefAlignConfig(
            attention="jiont", r=-1, lora_alpha=-1, lora_dropout=1.0, align_layers=[1, 1], teachers=["a", "a"]
        )
    assert len(caught.value.problems) == 6
    assert "attention must be one of ['isolated', 'joint'], got 'jiont'" in caught.value.problems


@pytest.mark.parametrize(
    ("fields", "expected"),
    [
        ({}, ("isolated", "reference")),
        ({"lora_scope": "all"}, ("isolated", "all")),
        ({"attention": "isolated"}, ("isolated", "reference")),
        ({"attention": "joint"}, ("joint", "all")),
    ],
)
def test_an_adapter_is_isolated_and_its_scope_follows_its_attention_unless_it_says_otherwise(fields, expected):
    config = ra.RefAlignConfig(**fields)
    assert (config.attention, config.lora_scope) == expected
    assert ra.RefAlignConfig.from_dict(config.to_dict()) == config == dataclasses.replace(config)


@pytest.mark.parametrize(
    ("said", "meant"),
    [
        ({}, ("joint", "all")),
        ({"attention": "isolated"}, ("isolated", "all")),
        ({"attention": "isolated", "lora_scope": "reference"}, ("isolated", "reference")),
    ],
)
def test_a_file_that_does_not_say_them_means_the_first_versions_defaults(tmp_path, said, meant):
    (tmp_path / "refalign_config.json").write_text(json.dumps({"r": 4, **said}))
    config = ra.RefAlignConfig.load(tmp_path)
    assert (config.attention, config.lora_scope, config.r) == (*meant, 4)
    config.save(tmp_path)
    assert ra.RefAlignConfig.load(tmp_path) == config


def test_what_only_isolated_attention_has_is_refused_with_joint():
    with pytest.raises(ra.ConfigError) as caught:
        ra.RefAlignConfig(
            attention="joint",
            reference_frame=-1,
            reference_place="beyond",
            reference_scale=0.5,
            drop_background=True,
            r=4,
            align_layers=1,
        )
    names = ("reference_frame", "reference_place", "reference_scale", "drop_background")
    assert [problem.split(" needs attention='isolated'")[0] for problem in caught.value.problems] == list(names)
    with pytest.raises(ra.ConfigError, match=r"lora_scope must be one of \['all'\] with attention='joint'"):
        ra.RefAlignConfig(attention="joint", lora_scope="reference")
    with pytest.raises(ra.ConfigError) as caught:
        ra.RefAlignConfig(attention="isolated", reference_frame=-2, reference_scale=0, drop_background=1)
    assert len(caught.value.problems) == 3
    for frame in (-1, 0, 999):
        config = ra.RefAlignConfig(attention="isolated", lora_scope="reference", reference_frame=frame)
        assert config.reference_frame == frame


LATER = {
    "reference_place": "beyond",
    "reference_size": [512, 384],
    "null_reference": "zeros",
    "reference_frame": -1,
    "lora_scope": "all",
}


def test_fields_that_came_later_are_read_back_and_written_only_where_they_say_something(tmp_path):
    ra.RefAlignConfig().save(tmp_path)
    values = json.loads((tmp_path / "refalign_config.json").read_text())
    later = ("reference_place", "reference_size", "reference_timestep", "null_reference")
    assert not set(later) & set(values)
    for fields in (LATER, {"attention": "joint", "reference_timestep": "clean"}, {"r": 0}):
        config = ra.RefAlignConfig(**fields)
        config.save(tmp_path)
        assert ra.RefAlignConfig.load(tmp_path) == config
        written = json.loads((tmp_path / "refalign_config.json").read_text())
        assert {name: written[name] for name in fields} == fields
        assert {name for name in later if name in written} == {name for name in later if name in fields}


@pytest.mark.parametrize(
    ("fields", "problem"),
    [
        ({"reference_place": "behind"}, "reference_place must be one of ['origin', 'beyond'], got 'behind'"),
        ({"reference_place": []}, "reference_place must be one of ['origin', 'beyond'], got []"),
        ({"null_reference": True}, "null_reference must be one of ['absent', 'zeros'], got True"),
        (
            {"reference_size": [512]},
            "reference_size must be [height, width] in pixels, each in [1, 4096], or null, got [512]",
        ),
        (
            {"reference_size": [512, 512.0]},
            "reference_size must be [height, width] in pixels, each in [1, 4096], or null, got [512, 512.0]",
        ),
        (
            {"reference_size": [512, 10**9]},
            "reference_size must be [height, width] in pixels, each in [1, 4096], or null, got [512, 1000000000]",
        ),
        (
            {"reference_size": "512x512"},
            "reference_size must be [height, width] in pixels, each in [1, 4096], or null, got '512x512'",
        ),
        (
            {"reference_size": [512, 512], "reference_scale": 0.5},
            "reference_size says how large a reference's canvas is, got [512, 512] beside reference_scale 0.5, which "
            "says it too; leave one of them out",
        ),
        (
            {"reference_size": [512, 512], "attention": "joint"},
            "reference_size needs attention='isolated', got (512, 512) with 'joint'",
        ),
        (
            {"reference_timestep": "clean"},
            "reference_timestep needs attention='joint', got 'clean' with 'isolated', which always is; leave it out",
        ),
        (
            {"r": 0, "rank_pattern": {"to_q": 4}},
            "rank_pattern must be left out with r 0, which is an adapter without LoRA, got {'to_q': 4}",
        ),
        (
            {"r": 0, "target_modules": ["to_q"]},
            "target_modules must be left out with r 0, which is an adapter without LoRA, got ('to_q',)",
        ),
    ],
)
def test_what_those_fields_cannot_be_is_one_line(fields, problem):
    with pytest.raises(ra.ConfigError) as caught:
        ra.RefAlignConfig(**fields)
    assert caught.value.problems == [problem]


def test_a_misspelt_key_is_told_with_the_nearest_one():
    with pytest.raises(ra.ConfigError, match="file: lora_alhpa is no known field; did you mean lora_alpha?"):
        ra.RefAlignConfig.from_dict({"lora_alhpa": 3}, source="file")


def test_what_is_saved_is_read_back(tmp_path):
    config = ra.RefAlignConfig(
        r=8, align_layers=[0, 4], target_modules=["to_q"], teachers=["a", "b"], base={"family": "wan"}
    )
    config.save(tmp_path)
    assert ra.RefAlignConfig.load(tmp_path) == config


def test_a_missing_or_broken_file_is_one_line(tmp_path):
    with pytest.raises(ra.UserError, match="does not exist"):
        ra.RefAlignConfig.load(tmp_path)
    (tmp_path / "refalign_config.json").write_text("{")
    with pytest.raises(ra.UserError, match="not readable JSON"):
        ra.RefAlignConfig.load(tmp_path)


@pytest.mark.parametrize(("layers", "blocks"), [(0, ()), (2, (0, 1)), ([3, 1], (1, 3))])
def test_align_blocks(layers, blocks):
    assert ra.RefAlignConfig(align_layers=layers).align_blocks(4) == blocks


def test_align_blocks_beyond_the_model():
    with pytest.raises(ra.ConfigError, match="reaches block 8, but the model has 4 blocks"):
        ra.RefAlignConfig().align_blocks(4)
