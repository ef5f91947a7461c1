"""Recipes with anything in them: one line per mistake, at once, without a traceback, a hang or gigabytes."""

import os
import resource
import subprocess
import sys
import time

import pytest

from refalign_adapter.errors import UserError
from refalign_adapter.media.sizes import size_problems
from refalign_adapter.recipes.file import load_recipe

MINIMAL = "pretrained_model_name_or_path: base\noutput_dir: out\ndata: {cache_dir: cache}\n"
LAUGHS = "\n".join(f"a{n}: &a{n} [{', '.join([f'*a{n - 1}'] * 9) if n else '1'}]" for n in range(12))

TEXTS = {
    "billion laughs": (LAUGHS, "aliases"),
    "laughs in a field": (MINIMAL + "seed: &x [1]\ntrain_batch_size: *x", "line 5: aliases"),
    "an alias of itself": (MINIMAL + "seed: &a [*a]", "aliases"),
    "a merge key": (MINIMAL + "alignment: &a {weight: 1}\nflow: {<<: *a}", "aliases"),
    "a merge without alias": (MINIMAL + "flow: {<<: {shift: 1}}", "a key must be a name"),
    "a list as key": (MINIMAL + "? [a]: 1", "a key must be a name"),
    "a mapping as key": (MINIMAL + "? {a: 1}\n: 1", "a key must be a name"),
    "a number as key": (MINIMAL + "5: 1", "a key must be a name"),
    "null as key": (MINIMAL + "~: 1", "a key must be a name"),
    "a key twice": (MINIMAL + "seed: 1\nseed: 2", "line 5: seed is given twice"),
    "a date that is none": (MINIMAL + "seed: 2001-99-99", "seed should be a valid integer, got '2001-99-99'"),
    "a date": (MINIMAL + "seed: 2001-01-01", "seed should be a valid integer, got '2001-01-01'"),
    "an integer that is none": (MINIMAL + "seed: !!int abc", "invalid literal for int"),
    "a float that is none": (MINIMAL + "learning_rate: !!float abc", "could not convert string to float"),
    "a truth that is none": (MINIMAL + "push_to_hub: !!bool abc", "is not valid YAML"),
    "a date by force": (MINIMAL + "seed: !!timestamp abc", "is not valid YAML"),
    "code": (MINIMAL + "seed: !!python/object/apply:os.system ['touch ran']", "could not determine a constructor"),
    "a module": (MINIMAL + "seed: !!python/name:os.system", "could not determine a constructor"),
    "bytes": (MINIMAL + "seed: !!binary aGk=", "seed should be a valid integer"),
    "a set": (MINIMAL + "seed: !!set {a, b}", "seed should be a valid integer"),
    "5,000 digits": (MINIMAL + f"seed: {'1' * 5000}", "is not valid YAML"),
    "4,000 digits": (MINIMAL + f"seed: {'1' * 4000}", "seed should be"),
    "base 60": (MINIMAL + "seed: 9:59:59:59:59:59", "seed should be less than 4294967296"),
    "deep": (MINIMAL + "seed: " + "[" * 5000, "in each other"),
    "deep sections": ("a:\n" + "".join(" " * n + "a:\n" for n in range(1, 40)), "in each other"),
    "two documents": (MINIMAL + "---\n" + MINIMAL, "another document"),
    "a control character": (MINIMAL + "seed: \x07", "special characters are not allowed"),
    "half a surrogate pair": (MINIMAL + 'hub_model_id: "\\ud800"', "hub_model_id should"),
    "a null byte": (MINIMAL.replace("out\n", '"a\\0b"\n'), "output_dir should match pattern"),
    "a list": ("[1, 2]", "must be a mapping of fields, got list"),
    "text": ("hello", "must be a mapping of fields, got str"),
    "tabs": ("seed:\t\n\t- 1", "is not valid YAML"),
    "a huge list": (MINIMAL + "sample_prompts: [" + "1, " * 60_000 + "]", "… and .* more"),
    "a long text": (MINIMAL + "seed: " + "x" * 100_000, "seed should be a valid integer, got 'xxx"),
    "a long key": (MINIMAL + "x" * 900 + ": 1", "x is no known field"),
    "nothing": ("", "is required"),
}


@pytest.mark.parametrize("case", TEXTS)
def test_odd_yaml_is_told_in_lines(tmp_path, monkeypatch, case):
    monkeypatch.chdir(tmp_path)
    text, message = TEXTS[case]
    path = tmp_path / "recipe.yaml"
    path.write_text(text, encoding="utf-8")
    started = time.monotonic()
    with pytest.raises(UserError, match=message) as told:
        load_recipe(path)
    assert time.monotonic() - started < 15
    lines = str(told.value).splitlines()
    assert len(lines) <= 51
    assert max(map(len, lines)) < 600
    assert not (tmp_path / "ran").exists()


NUMBERS = {
    "seed": [-1, 2**32, 10**30, 1.5, True, "x"],
    "learning_rate": [0, -1, 1e300, "1" * 400, ".inf", ".nan", True],
    "projector_learning_rate": [0, 1e300],
    "max_train_steps": [0, 10**12],
    "train_batch_size": [0, 10**9],
    "gradient_accumulation_steps": [0, 10**9],
    "dataloader_num_workers": [-1, 2**32],
    "data.num_workers": [-1, 2**32],
    "data.height": [0, 10**9],
    "data.width": [0, 10**9],
    "data.num_frames": [0, 10**9],
    "data.fps": [0, -1, 1e9, ".inf", ".nan"],
    "data.max_references": [0, 10**9],
    "data.reference_variants": [0, 10**9],
    "data.teacher_layer": [10**9, -(10**9)],
    "data.max_unreadable": [-0.1, 1.1, ".nan"],
    "data.buckets": ["[x]", "[1x1]", f"[{'9' * 5000}x480x832]", "[81x-1x5]", "[]"],
    "adapter.r": [0, 10**9],
    "adapter.lora_alpha": [0, 1e300, ".nan", ".inf"],
    "adapter.align_layers": [-1, 10**9, "[0, 0]"],
    "adapter.max_sequence_length": [0, 10**10],
    "alignment.weight": [-1, 1e300, ".nan"],
    "alignment.warmup_steps": [-1, 10**12, 3001],
    "lr_warmup_steps": [-1, 10**12, 3001],
    "flow.shift": [0, -1, ".inf", 1e300],
    "flow.logit_mean": [".nan", 1e300],
    "sample.num_inference_steps": [0, 10**12],
    "sample.guidance_scale": [0.5, ".nan", ".inf"],
    "sample.height": [0, 10**9],
    "ema_decay": [-1, 1, ".nan"],
    "max_grad_norm": [0, ".inf", ".nan"],
}


@pytest.mark.parametrize("name", NUMBERS)
def test_numbers_have_bounds_that_make_sense(tmp_path, name):
    (tmp_path / "recipe.yaml").write_text(MINIMAL)
    for value in NUMBERS[name]:
        with pytest.raises(UserError, match=name.rpartition(".")[2]) as told:
            load_recipe(tmp_path / "recipe.yaml", [f"{name}={value}", "lr_scheduler=constant_with_warmup"])
        assert all(len(line) < 500 for line in str(told.value).splitlines())


@pytest.mark.parametrize(
    "override",
    [
        "",
        "=",
        "seed",
        "=1",
        "seed=[",
        "seed=&a [*a]",
        "seed=!!int x",
        "a" * 5000,
        "a" * 5000 + "=1",
        "seed=" + "[" * 5000,
    ],
)
def test_odd_overrides_are_one_line(tmp_path, override):
    (tmp_path / "recipe.yaml").write_text(MINIMAL)
    with pytest.raises(UserError) as told:
        load_recipe(tmp_path / "recipe.yaml", [override])
    assert len(str(told.value).splitlines()) == 1
    assert len(str(told.value)) < 700


def test_other_files_than_recipes_are_one_line(tmp_path):
    path = tmp_path / "recipe.yaml"
    os.mkfifo(tmp_path / "pipe")
    cases = {
        tmp_path / "absent": "cannot read .* \\(No such file",
        tmp_path: "cannot read .* \\(Is a directory",
        tmp_path / "pipe": "a pipe or device, not a file",
    }
    for target, message in cases.items():
        with pytest.raises(UserError, match=message):
            load_recipe(target)
    path.write_text(MINIMAL, encoding="utf-16")
    with pytest.raises(UserError, match="UTF-16 text; save it as UTF-8"):
        load_recipe(path)
    path.write_bytes(b"\xef\xbb\xbf" + MINIMAL.encode())
    assert load_recipe(path).output_dir == "out"
    with path.open("wb") as file:
        file.truncate(2**33)
    with pytest.raises(UserError, match="larger than 256 KB"):
        load_recipe(path)


def test_sizes_of_any_length_are_one_line():
    assert len(list(size_problems(["1" * 5000 + "x1x1", "1x1x1"], "data.buckets"))) == 1


def test_the_command_tells_it_too_with_little_memory(tmp_path):
    path = tmp_path / "recipe.yaml"
    path.write_text(LAUGHS)
    code = "import sys; from refalign_adapter.train import main; sys.exit(main(sys.argv[1:]))"
    run = subprocess.run(
        [sys.executable, "-c", code, "--config", str(path)],
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
        preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_CPU, (40, 40)),
    )
    assert (run.returncode, run.stdout) == (2, "")
    assert run.stderr.startswith("error: config: ")
    assert len(run.stderr.splitlines()) == 1
