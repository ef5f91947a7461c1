"""A checkpoint's `state.json` as anyone may have written it: one line each, and nothing of the run is changed."""

import json

import pytest
import torch

from refalign_adapter.errors import UserError
from refalign_adapter.recipes.file import load_recipe
from refalign_adapter.training.checkpoint_files import find_checkpoint
from refalign_adapter.training.loop import train
from refalign_adapter.training.restore import load_checkpoint
from refalign_adapter.training.setup import build_accelerator, build_run

FAST = ("optimizer=adamw8bit", "gradient_accumulation_steps=1", "max_train_steps=2", "checkpointing_steps=1")


@pytest.fixture(scope="module")
def out(tiny_world, tmp_path_factory):
    """The folder of a run with two checkpoints without checksums, so that nothing but their content can be refused."""
    folder = tmp_path_factory.mktemp("run") / "out"
    train(load_recipe(tiny_world / "recipe.yaml", [f"output_dir={folder}", "ema_decay=0.9", *FAST]))
    for checkpoint in folder.glob("checkpoint-*"):
        (checkpoint / "training/checksums.json").unlink()
    return folder


@pytest.fixture(scope="module")
def run(tiny_world, out):
    """A run that takes checkpoints up."""
    recipe = load_recipe(tiny_world / "recipe.yaml", [f"output_dir={out}", "ema_decay=0.9", *FAST])
    return build_run(recipe, build_accelerator(recipe, out), out)


@pytest.fixture
def state(out):
    """The newest checkpoint's file; what a test does to it is undone."""
    path = out / "checkpoint-2/training/state.json"
    content = path.read_bytes()
    yield path
    path.write_bytes(content)


FIELDS = ("step", "micro_step", "epoch", "position", "run", "schedule", "optimizer")
COUNTS = ("step", "micro_step", "epoch", "position", "skipped", "ema_steps")
WRONG = [None, True, "2", 2.0, -1, 10**30, [], {}]
TEXTS = {
    "empty": b"",
    "binary": bytes(range(256)),
    "UTF-16": '{"step": 2}'.encode("utf-16"),
    "a list": b"[]",
    "null": b"null",
    "deep": b'{"run": ' * 100_000,
    "deep and whole": b'{"step": 2, "run": ' + b"[" * 3000 + b"]" * 3000 + b"}",
    "many digits": b'{"step": ' + b"9" * 5000 + b"}",
    "cut off": b'{"step": 2, "micro_st',
}


def refused(folder, run):
    before = [parameter.clone() for _, parameter in run.trained.named_parameters()]
    with pytest.raises(UserError, match=r"^resume_from_checkpoint: .*checkpoint-2'") as told:
        load_checkpoint(folder, run.trained)
    (line,) = str(told.value).splitlines()
    assert len(line) < 1000
    after = [parameter for _, parameter in run.trained.named_parameters()]
    assert all(map(torch.equal, before, after))
    return line


def check_passed_over(out):
    lines = []
    assert find_checkpoint(out, "latest", lines.append) == out / "checkpoint-1"
    (line,) = lines
    assert line.startswith("resume_from_checkpoint: passed over checkpoint-2 (")
    assert len(line.splitlines()) == 1


@pytest.mark.parametrize("text", TEXTS)
def test_what_is_no_state(out, run, state, text):
    state.write_bytes(TEXTS[text])
    assert "is damaged (" in refused(state.parents[1], run)
    check_passed_over(out)


def change(state, **values):
    content = json.loads(state.read_text())
    state.write_text(json.dumps({**content, **values}))


@pytest.mark.parametrize("name", COUNTS)
def test_counts_of_another_kind(out, run, state, name):
    for value in WRONG:
        if name == "ema_steps" and value is None:
            continue  # as where there is no average
        change(state, **{name: value})
        assert f"is damaged (state.json: {name}: " in refused(state.parents[1], run), value
        check_passed_over(out)
    content = state.read_text()
    for value in ("NaN", "-Infinity", "1e400"):
        state.write_text(content.replace(f'"{name}": {{}}', f'"{name}": {value}'))
        assert "is damaged (" in refused(state.parents[1], run), value


@pytest.mark.parametrize("name", ["run", "schedule", "optimizer"])
def test_sections_of_another_kind(run, state, name):
    for value in [None, True, 5, "a", [], [[]], {"a": {"b": {"c": {}}}}, {"a": []}]:
        if name == "run" and isinstance(value, dict):
            continue  # facts of any kind are compared with the recipe's and told
        change(state, **{name: value})
        assert str(state.parents[1]) in refused(state.parents[1], run), value


@pytest.mark.parametrize("name", FIELDS)
def test_a_field_that_is_missing_or_there_twice(run, state, name):
    content = json.loads(state.read_text())
    value = content.pop(name)
    state.write_text(json.dumps(content))
    assert f"is damaged (state.json: {name}: field required)" in refused(state.parents[1], run)
    text = json.dumps({**content, name: value})
    state.write_text(f'{text[:-1]}, "{name}": {json.dumps(value)}}}')
    assert f"key '{name}' is given twice" in refused(state.parents[1], run)


def test_numbers_of_the_optimizer(run, state):
    numbers = json.loads(state.read_text())["optimizer"]
    first = next(iter(numbers))
    for value in [None, True, "1", -1, 0.5, 10**30, [], {}]:
        change(state, optimizer={**numbers, first: {**numbers[first], "step": value}})
        assert "is damaged (state.json: optimizer" in refused(state.parents[1], run), value
    change(state, optimizer={name: value for name, value in numbers.items() if name != first})
    assert "the optimizer's state is of other parameters" in refused(state.parents[1], run)
    change(state, optimizer={**numbers, "another": {}})
    assert "the optimizer's state is of other parameters" in refused(state.parents[1], run)


def test_a_schedule_of_another_kind(run, state):
    """Refused in one line, or one that a recipe could have as well."""
    schedule = json.loads(state.read_text())["schedule"]
    refusals = 0
    for name in schedule:
        for wrong in ("x", -1, 1e300, None):
            change(state, schedule={**schedule, name: wrong})
            try:
                load_checkpoint(state.parents[1], run.trained)
            except UserError:
                refusals += 1
                refused(state.parents[1], run)
            assert 0 <= run.trained.objectives[0].weight_at(5) < float("inf")
    assert refusals >= 2 * len(schedule)
    change(state, schedule={**schedule, "another": 1})
    assert "another is no known field" in refused(state.parents[1], run)


FACTS = {"number": {"optimizer": 5}, "name": {"optimizer": "nosuch"}, "long": {"optimizer": "x" * 10**5}}
FACTS |= {"seed": {"seed": ["x" * 10**4] * 50}, "another": {"a\nb": [{}], "": None}}


@pytest.mark.parametrize("facts", FACTS)
def test_facts_of_another_kind(tiny_world, out, state, facts, capsys):
    """Each is one line, or told as a change, for which the run is none the worse."""
    content = json.loads(state.read_text())
    change(state, run={**content["run"], **FACTS[facts]})
    options = [*FAST, "ema_decay=0.9", f"output_dir={out}", f"resume_from_checkpoint={out / 'checkpoint-2'}"]
    if facts in ("seed", "another"):
        train(load_recipe(tiny_world / "recipe.yaml", options))
        assert all(len(line) < 1000 for line in capsys.readouterr().err.splitlines())
        return
    with pytest.raises(UserError, match="^resume_from_checkpoint: .*checkpoint-2' ") as told:
        train(load_recipe(tiny_world / "recipe.yaml", options))
    assert len(str(told.value).splitlines()) == 1
    assert len(str(told.value)) < 1000


def test_a_position_that_no_pass_has_is_one_line(tiny_world, out, state):
    options = [*FAST, "ema_decay=0.9", f"output_dir={out}", f"resume_from_checkpoint={out / 'checkpoint-2'}"]
    change(state, position=10**9)
    with pytest.raises(UserError, match=r"^resume_from_checkpoint: position 1000000000 of \d batches"):
        train(load_recipe(tiny_world / "recipe.yaml", [*options, "max_train_steps=3"]))
