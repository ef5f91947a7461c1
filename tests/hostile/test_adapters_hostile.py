"""A stranger's adapter folder decides numbers, nothing else. A refusal is one line and leaves the pipe as it was."""

import copy
import json
import os
import re
import sys
import time

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from tiny_adapter import anatomy, save_tiny_adapter, velocity, weights_of
from tiny_models import tiny_pipeline

import refalign_adapter as ra
from refalign_adapter.export.folder import open_adapter
from refalign_adapter.export.formats import FACTS_KEY, FORMATS
from refalign_adapter.json_files import MAX_DEPTH

CONFIG = "refalign_config.json"
SCOPES = {
    "all": {"attention": "joint"},
    "reference": {"attention": "isolated", "lora_scope": "reference", "align_layers": 1},
}


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """A whole adapter of each scope; to be copied."""
    root = tmp_path_factory.mktemp("whole")
    return {scope: save_tiny_adapter(root / scope, **changes) for scope, changes in SCOPES.items()}


@pytest.fixture(scope="module")
def pipe():
    """A pipeline that no refusal may change."""
    return tiny_pipeline()


@pytest.fixture(params=SCOPES)
def folder(request, whole, tmp_path):
    """A copy to be spoilt."""
    target = tmp_path / "adapter"
    target.mkdir()
    for path in whole[request.param].iterdir():
        (target / path.name).write_bytes(path.read_bytes())
    return target


def refused(pipe, folder, **options):
    """The line that refuses the folder; the pipe is as it was, bit for bit, and it took no time."""
    before, output = anatomy(pipe.transformer), velocity(pipe.transformer)
    attributes, config = set(vars(pipe)), copy.deepcopy(dict(pipe.transformer.config))
    started = time.monotonic()
    with pytest.raises(ra.UserError) as caught:
        ra.load_adapter(pipe, folder, **options)
    assert time.monotonic() - started < 10
    assert anatomy(pipe.transformer) == before
    assert torch.equal(velocity(pipe.transformer), output)
    assert (set(vars(pipe)), dict(pipe.transformer.config)) == (attributes, config)
    assert not getattr(pipe.transformer, "peft_config", {})
    line = str(caught.value)
    assert len(line) < 1000
    assert line.isprintable() or isinstance(caught.value, ra.ConfigError)
    return line


def set_config(folder, **values):
    path = folder / CONFIG
    path.write_text(json.dumps(json.loads(path.read_text()) | values))


def rewrite(folder, tensors=None, **metadata):
    """Write the weights file anew with other tensors, or other metadata."""
    path = weights_of(folder)
    with safe_open(path, "pt") as file:
        found = file.metadata() | metadata
    given = load_file(path)
    save_file(
        tensors(given) if tensors else given, path, {key: text for key, text in found.items() if text is not None}
    )


def form_of(folder):
    return FORMATS[json.loads((folder / CONFIG).read_text())["lora_scope"]]


def set_lora(folder, **fields):
    """Fields of the LoraConfig that stock loaders read from the file."""
    key = form_of(folder).metadata_key
    with safe_open(weights_of(folder), "pt") as file:
        values = json.loads(file.metadata()[key])
    rewrite(folder, **{key: json.dumps(values | {f"transformer.{name}": value for name, value in fields.items()})})


DOORS = {
    "megatron_config": {"megatron_config": {"a": 1}, "megatron_core": "evil_module"},
    "megatron": {"megatron_core": "evil_module.megatron"},
    "use_rslora": {"use_rslora": True},
    "lora_dropout": {"lora_dropout": 0.9},
    "alora": {"alora_invocation_tokens": [1, 2]},
    "use_dora": {"use_dora": True},
    "lora_bias": {"lora_bias": True},
    "modules_to_save": {"modules_to_save": ["patch_embedding"]},
    "init_lora_weights": {"init_lora_weights": "pissa"},
    "auto_mapping": {"auto_mapping": {"base_model_class": "x", "parent_library": "evil_module"}},
    "layers_to_transform": {"layers_to_transform": [0], "layers_pattern": "blocks"},
    "unknown": {"no_such_field": 1},
}


@pytest.mark.parametrize("door", DOORS)
def test_fields_that_no_adapter_of_ours_has_are_refused_by_name(pipe, folder, tmp_path, monkeypatch, door):
    for name in ("evil_module.py", "evil.py"):
        (tmp_path / name).write_text(f"import pathlib; pathlib.Path({str(tmp_path / 'ran')!r}).touch()")
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(tmp_path))
    set_lora(folder, **DOORS[door])
    line = refused(pipe, folder)
    assert re.search(rf"has 'transformer\.{next(iter(DOORS[door]))}' in its LoRA metadata, which no adapter", line)
    assert not (tmp_path / "ran").exists()
    assert not {"evil_module", "evil"} & set(sys.modules)


@pytest.mark.parametrize("text", ["[]", "5", "null", '"a"', "{", "", "NaN", "[" * 200_000, '{"a": 1, "a": 2}', "\\"])
@pytest.mark.parametrize("which", ["lora", "facts"])
def test_metadata_of_any_form_are_one_line(pipe, folder, which, text):
    rewrite(folder, **{form_of(folder).metadata_key if which == "lora" else FACTS_KEY: text})
    assert "has unreadable metadata" in refused(pipe, folder)


SLOW = "(([a-z0-9_.]*)*)*X"


@pytest.mark.parametrize("pattern", [SLOW, "((", "(?P<a", ".*" * 500, "blocks.0.attn1.to_q$"])
def test_no_regular_expression_from_a_file_is_run(pipe, folder, pattern):
    for values in ({"rank_pattern": {pattern: 3}}, {"alpha_pattern": {pattern: 3}}):
        set_config(folder, **{"rank_pattern": {}, "alpha_pattern": {}} | values)
        set_lora(folder, **{"rank_pattern": {}, "alpha_pattern": {}} | values)
        if "alpha_pattern" in values:
            assert "are not run; write the names of its layers" in refused(pipe, folder)
        else:  # ranks are those of the weights
            loaded = open_adapter(folder)
            assert loaded.config.rank_pattern == {}
    set_config(folder, alpha_pattern={}, rank_pattern={}, target_modules=pattern)
    set_lora(folder, alpha_pattern={}, rank_pattern={}, target_modules=pattern)
    opened = open_adapter(folder)
    assert opened.config.target_modules == tuple(opened.layers)
    with pytest.raises(ra.UserError, match="holds a regular expression, and those of a file are not run"):
        ra.RefAlignConfig.load(folder)


HUGE = 10**30
CONTAINERS = [[], {}, [None], [[]], {"a": {}}]
NO_NUMBERS = [*CONTAINERS, None, "x", "1"]
WRONG = {
    "attention": [*CONTAINERS, None, "x", "", 1, True, "ä" * 5000],
    "lora_scope": [*CONTAINERS, None, "x", "", 1, True],
    "reference_frame": [*CONTAINERS, "x", -2, 1.5, True, HUGE],
    "reference_place": [*CONTAINERS, None, "x", "", 1, True, "ä" * 5000],
    "reference_size": [*CONTAINERS, "x", 1, True, [32], [32, 0], [32, 32.0], [True, 32], [32, HUGE], [32] * 3, [8, 8]],
    "reference_timestep": [*CONTAINERS, None, "x", 0, True],
    "null_reference": [*CONTAINERS, None, "x", 0, True],
    "reference_scale": [*NO_NUMBERS, 0, -1, 2, HUGE],
    "drop_background": [*NO_NUMBERS, 0, 1],
    "r": [*NO_NUMBERS, 0, -1, 1.5, True, HUGE, 5],
    "lora_alpha": [*NO_NUMBERS, 0, -1, True, HUGE, 1e300, 9],
    "lora_dropout": [*NO_NUMBERS, -1, 1, True, HUGE],
    "target_modules": [{}, [], "", 1, True, [None], [[]], [""], ["x" * 2000], ["x"] * 20_000, {"a": {}}],
    "rank_pattern": [[], None, "x", 1, {"a": {}}, {"a": 0}, {"a": True}, {"a": HUGE}, {"": 1}, {"x" * 2000: 1}],
    "alpha_pattern": [[], None, "x", 1, {"a": []}, {"a": 0}, {"a": "1"}, {"a": HUGE}, {"": 1}],
    "align_layers": [{}, None, "x", -1, 1.5, True, HUGE, [None], [[]], [0, 0], [-1], [True], [HUGE], ["0"]],
    "teachers": [{}, None, "x", 1, [None], [[]], [""], ["a", "a"], ["x" * 2000], [], ["x"] * 20_000],
    "max_sequence_length": [*NO_NUMBERS, 0, -1, 1.5, True, HUGE],
    "base_model": [*CONTAINERS, 1, True, "", "x" * 5000],
    "base": [[], None, "x", 1, {}, {"a": {}}, {"family": []}, {"a": [[1]]}],
}


@pytest.mark.parametrize("name", WRONG)
def test_wrong_types_and_ranges_of_every_field_are_one_line(pipe, folder, name):
    for value in WRONG[name]:
        set_config(folder, **{name: value})
        line = refused(pipe, folder)
        assert 1 <= len(line.splitlines()) <= 2, value  # a scope is told with the attention that it needs


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"max_sequence_length": 10**10}, r"max_sequence_length must be an integer in \[1, 8192\]"),
        ({"max_sequence_length": 513}, "max_sequence_length must be at most 512, the longest prompt of the base"),
        ({"align_layers": 10**9}, "align_layers must be a count or a list"),
        ({"align_layers": 1000}, "align_layers reaches block 999, but the model has 3 blocks"),
        ({"align_layers": [0, 999]}, "align_layers reaches block 999"),
        ({"r": 10**30}, r"r must be an integer in \[0, 16384\]"),
        ({"r": 0}, "target_modules must be left out with r 0, which is an adapter without LoRA"),
        ({"r": 0, "target_modules": None}, "says r 0, an adapter without weights; delete what does not belong to it"),
        ({"base": None}, "base must be a mapping"),
        ({"base": {}}, "base must say which base the adapter fits, got nothing"),
        (
            {"format_version": 2, "refalign_adapter_version": None},
            r"has format 2, newer than what .* reads; pip install -U refalign-adapter",
        ),
        (
            {"format_version": 2, "refalign_adapter_version": "0.9.1", "new_field": 1},
            r"reads; pip install 'refalign-adapter>=0.9.1'$",
        ),
        ({"format_version": 2, "refalign_adapter_version": "0.9; rm -r /"}, "pip install -U refalign-adapter$"),
        ({"format_version": 0}, "format_version must be a positive integer, got 0"),
        ({"format_version": "1"}, "format_version must be a positive integer, got '1'"),
        ({"lora_alhpa": 1}, "lora_alhpa is no known field; did you mean lora_alpha"),
        ({"a" * 10_000: 1}, "a{100} is no known field"),
    ],
)
def test_limits_follow_from_the_base_and_newer_formats_say_what_to_install(pipe, folder, values, message):
    set_config(folder, **values)
    assert re.search(message, refused(pipe, folder))


def test_a_rank_wider_than_the_base_is_refused(pipe, folder):
    set_config(folder, r=289)
    set_lora(folder, r=289)
    assert "r must be at most 288, the width of the base's widest layer, got 289" in refused(pipe, folder)


FILES = {
    "deep": "[" * 200_000,
    "deep and closed": "[" * (MAX_DEPTH + 1) + "]" * (MAX_DEPTH + 1),
    "twice": '{"r": 4, "r": 64}',
    "a list": "[]",
    "text": '"a"',
    "cut": '{"r": ',
    "NaN": '{"r": NaN}',
    "nothing": "",
}


@pytest.mark.parametrize("case", FILES)
def test_a_configuration_that_is_no_object_of_fields_is_one_line(pipe, folder, case):
    (folder / CONFIG).write_text(FILES[case])
    assert CONFIG in refused(pipe, folder)


def test_encodings_pipes_and_huge_files_are_one_line(pipe, folder):
    path = folder / CONFIG
    text = path.read_text()
    path.write_bytes(b"\xef\xbb\xbf" + text.encode())
    ra.load_adapter(pipe, folder).unload()
    path.write_text(text, encoding="utf-16")
    assert "UTF-16 text; save it as UTF-8" in refused(pipe, folder)
    with path.open("wb") as file:
        file.truncate(2**33)
    assert "larger than 1,024 KB" in refused(pipe, folder)
    path.unlink()
    os.mkfifo(path)
    assert "it lacks refalign_config.json" in refused(pipe, folder)


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
def test_one_number_that_is_not_finite_is_refused(pipe, folder, value):
    def spoil(tensors):
        name = sorted(tensors)[-1]
        tensors[name].view(-1)[-1] = value
        return tensors

    rewrite(folder, spoil)
    assert "holds numbers that are not finite, in transformer.blocks" in refused(pipe, folder)


@pytest.mark.parametrize(
    ("scope", "changes", "message"),
    [
        (
            "all",
            {"attention": "isolated"},
            "was trained with attention 'joint', but refalign_config.json says 'isolated'",
        ),
        (
            "reference",
            {"lora_scope": "all"},
            "holds refalign_reference_lora.safetensors, but .* says lora_scope 'all'",
        ),
    ],
)
def test_the_weights_say_what_they_were_trained_for(pipe, whole, tmp_path, scope, changes, message):
    folder = tmp_path / "a"
    folder.mkdir()
    for path in whole[scope].iterdir():
        (folder / path.name).write_bytes(path.read_bytes())
    set_config(folder, **changes)
    assert re.search(message, refused(pipe, folder))


TENSORS = {
    "one more layer": lambda t, key: t | {key.replace("blocks.0", "blocks.3"): t[key].clone()},
    "a plain weight": lambda t, key: t | {"transformer.proj_out.weight": torch.zeros(64, 48)},
    "a path": lambda t, key: t | {"transformer.../../x.lora_A.weight": torch.zeros(4, 48)},
    "no matrix": lambda t, key: t | {key: torch.zeros(4)},
    "a number": lambda t, key: t | {key: torch.tensor(1.0)},
    "integers": lambda t, key: t | {key: t[key].to(torch.int32)},
    "eight bits": lambda t, key: t | {key: t[key].to(torch.float8_e4m3fn)},
    "empty": lambda t, key: t | {key: torch.zeros(0, 48)},
    "another rank": lambda t, key: t | {key: torch.zeros(5, 48)},
    "one is missing": lambda t, key: {name: tensor for name, tensor in t.items() if name != key},
    "none": lambda t, key: {},
    "dora": lambda t, key: t | {key.replace("weight", "magnitude"): torch.ones(4)},
    "bias": lambda t, key: t | {key.replace("weight", "bias"): torch.ones(4, 1)},
    "an attribute": lambda t, key: t | {"transformer.__class__.lora_A.weight": torch.zeros(4, 48)},
}


@pytest.mark.parametrize("case", TENSORS)
def test_weights_that_are_not_the_bases_are_refused_before_it_is_touched(pipe, folder, case):
    rewrite(folder, lambda tensors: TENSORS[case](tensors, sorted(tensors)[0]))
    assert refused(pipe, folder)


@pytest.mark.parametrize("name", [None, "", "a.b", "lora_A", "lora_B", "blocks", "attn1", 5, "ä", "a" * 65, "a b"])
def test_names_that_cannot_be_told_from_the_bases_are_refused(pipe, whole, name):
    for folder in whole.values():
        assert refused(pipe, folder, adapter_name=name).startswith("adapter_name")


def test_training_reads_an_adapter_as_strictly(folder):
    from refalign_adapter.training.restore import load_initial_weights

    set_lora(folder, use_dora=True)
    branch = ra.attach(
        tiny_pipeline().transformer, ra.RefAlignConfig(attention="joint", r=4, lora_alpha=8, align_layers=1)
    )
    with pytest.raises(ra.UserError, match=r"init_adapter.*use_dora|use_dora"):
        load_initial_weights(str(folder), branch, None)
