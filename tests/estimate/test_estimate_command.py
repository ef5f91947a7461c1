"""`refalign estimate` as a user runs it."""

import json
import shutil

import pytest
import torch
from tiny_data import write_data

from refalign_adapter.commands.app import main

RECIPE = "recipe.yaml"


@pytest.fixture
def run(tiny, capsys, monkeypatch):
    """Run `refalign estimate` on the tiny recipe; returns (exit code, stdout, error lines)."""
    monkeypatch.setenv("COLUMNS", "160")

    def call(*arguments, config=tiny / RECIPE):
        with pytest.raises(SystemExit) as stop:
            main(["estimate", "--config", str(config), *map(str, arguments)])
        captured = capsys.readouterr()
        errors = [line for line in captured.err.splitlines() if line.startswith("error: ")]
        assert "Traceback" not in captured.err
        return stop.value.code or 0, captured.out, errors

    return call


def test_help_tells_of_every_option(capsys):
    with pytest.raises(SystemExit) as stop:
        main(["estimate", "--help"])
    assert not stop.value.code
    out = capsys.readouterr().out
    for option in ("gpu-memory", "processes", "rows", "step-time", "measure", "json"):
        assert f"--{option}" in out


def test_without_a_gpu_it_says_what_it_lacks(run):
    status, out, _ = run()
    assert status == 0
    for words in ("optimizer state (adamw8bit)", "activations at the peak", "allowance", "text encoder", "teacher"):
        assert words in out
    assert "--step-time SECONDS" in out
    assert "--rows N" in out
    assert "an estimate" in out
    if not torch.cuda.is_available():
        assert "give --gpu-memory GB" in out


def test_a_verdict_with_ways_out(run):
    status, out, _ = run("--gpu-memory", "80")
    assert status == 0
    assert "fits into 80.0 GB" in out
    status, out, _ = run("--gpu-memory", "1.0", "data.num_frames=1", "gradient_checkpointing=true")
    assert status == 1
    assert "does not fit into 1.00 GB" in out
    assert "offload_activations=true" in out
    assert "quantization=nf4" in out


def test_json_holds_the_same_facts(run, tmp_path):
    data = write_data(tmp_path / "data", 4)
    arguments = (f"data.train_data={data}", "data.validation_rows=1", "train_batch_size=2", "max_train_steps=1800")
    status, out, _ = run("--json", "--step-time", "2", "--processes", "3", "--gpu-memory", "10", *arguments)
    found = json.loads(out)
    assert status == 0
    assert found["gpu_training"]["total"] == sum(found["gpu_training"]["parts"].values())
    assert (found["fits"], found["gpu_memory"], found["ways_out"]) == (True, 10_000_000_000, [])
    assert found["training"] == {
        "steps": 1800,
        "step_time": 2.0,
        "hours": 1.0,
        "samples": 1800 * 2 * 3,
        "share_of_paper": 1800 * 2 * 3 / 384_000,
        "rows": 3,
        "passes": 3600.0,
    }
    assert found["disk"]["sources"] == {f"train: {data}": 4}
    assert found["disk"]["rows"] == 4
    assert found["references"] == 3  # the most that a row has
    assert found["disk"]["free"] == pytest.approx(shutil.disk_usage(tmp_path).free, rel=0.2)
    assert found["measured"] is None
    _, table, _ = run("--step-time", "2", *arguments)
    assert f"train: {data}: 4 rows" in table
    assert "1.0 hours at 2.00 s" in table


def test_rows_are_believed(run, tmp_path):
    status, out, _ = run("--json", "--rows", "1000")
    found = json.loads(out)
    assert status == 0
    assert (found["disk"]["rows"], found["training"]["rows"], found["references"]) == (1000, 1000, 4)
    assert found["disk"]["total"] == 1000 * found["disk"]["per_row"]


def test_a_disk_that_is_too_small_is_told(run):
    status, out, _ = run("--rows", str(10**12))
    assert status == 0
    assert "too little" in out


def test_broken_records_do_not_count_and_are_told(run, tmp_path):
    data = write_data(tmp_path / "data", 4)
    (tmp_path / "data/clips/2.mp4").unlink()
    status, out, _ = run(f"data.train_data={data}")
    assert status == 0
    assert "1 records are no rows" in out


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["learning_rat=1", "data.height=tall"], ["did you mean learning_rate?", "'tall'"]),
        (
            ["--gpu-memory", "-1", "--measure", "0"],
            ["--gpu-memory must be positive", "--measure must be positive, got 0"],
        ),
        (["--measure", "1", "--step-time", "2"], ["give one of them"]),
        (["pretrained_model_name_or_path=no/where/at/all"], ["no/where/at/all"]),
        (["adapter.teachers=[nowhere]"], ["nowhere"]),
        (
            ["data.height=36", "data.num_frames=6"],
            ["num_frames must be a multiple of 4 plus 1", "height must be a multiple"],
        ),
        (["adapter.align_layers=9"], ["align_layers"]),
        (["adapter.target_modules=[nothing]"], ["target_modules"]),
        (["optimizer=adamw9bit"], ["adamw9bit"]),
    ],
)
def test_mistakes_are_lines(run, arguments, words):
    status, _, errors = run(*arguments)
    assert status == 2
    assert len(errors) == len(words)
    for line, word in zip(sorted(errors), sorted(words), strict=True):
        assert any(word in each for each in errors), (line, word)


def test_a_missing_recipe_and_a_base_without_a_part(run, tiny, tmp_path):
    status, _, (line,) = run(config="nothing.yaml")
    assert status == 2
    assert "nothing.yaml" in line
    base = shutil.copytree(tiny / "base", tmp_path / "base")
    shutil.rmtree(base / "vae")
    status, _, (line,) = run(f"pretrained_model_name_or_path={base}")
    assert status == 2
    assert "vae/config.json' does not exist" in line


def test_weights_are_not_read(run, tiny, tmp_path):
    base = shutil.copytree(tiny / "base", tmp_path / "base")
    teacher = shutil.copytree(tiny / "teacher", tmp_path / "teacher")
    _, expected, _ = run("--json")
    for path in [*base.rglob("*.safetensors"), *teacher.rglob("*.safetensors")]:
        path.unlink()
    status, out, _ = run("--json", f"pretrained_model_name_or_path={base}", f"adapter.teachers=[{teacher}]")
    assert status == 0
    assert json.loads(out)["gpu_training"] == json.loads(expected)["gpu_training"]


def test_measured_steps(run):
    status, out, _ = run("--json", "--measure", "2", "gradient_accumulation_steps=2", "max_train_steps=3600")
    assert status == 0
    found = json.loads(out)
    measured = found["measured"]
    assert measured["steps"] == 2
    assert 0 < measured["seconds"] < 30
    assert (measured["peak"] is None) is not torch.cuda.is_available()
    assert found["training"]["hours"] == pytest.approx(measured["seconds"])
