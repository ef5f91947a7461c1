"""`refalign data check` as it is typed: exit codes, what is printed, what is written."""

import json
import os

import pytest
import tiny_data
import yaml

from refalign_adapter.commands import data_check
from refalign_adapter.commands.app import main
from refalign_adapter.data.check import inspection
from refalign_adapter.signals import Stopped


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """The working directory, with `recipe.yaml` and `data`; neither base nor teacher is there."""
    tiny_data.write_data(tmp_path / "data", 4, height=32, width=48)
    values = {"cache_dir": "cache", "train_data": "data", "height": 32, "width": 48, "num_frames": 5, "fps": 8.0}
    recipe = {"pretrained_model_name_or_path": "nowhere/at-all", "output_dir": "out", "data": values}
    (tmp_path / "recipe.yaml").write_text(yaml.safe_dump(recipe))
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("COLUMNS", "200")
    return tmp_path


@pytest.fixture
def run(folder, capsys):
    """Run the command with more arguments; returns (exit code, stdout, error lines)."""

    def call(*arguments: str, config: str = "recipe.yaml") -> tuple[int, str, list[str]]:
        with pytest.raises(SystemExit) as stop:
            main(["data", "check", "--config", config, *arguments])
        captured = capsys.readouterr()
        assert "Traceback" not in captured.err
        return int(stop.value.code or 0), captured.out, [line for line in captured.err.splitlines() if ": " in line]

    return call


def test_a_clean_set_exits_with_0_and_writes_a_report(run, folder):
    code, out, errors = run()
    assert (code, errors) == (0, [])
    assert (
        out.splitlines()[-1] == f"no problems and no notes in 4 rows; open {os.path.join('data_check', 'index.html')}"
    )
    assert "train  data/metadata.jsonl  folder" in out
    assert sorted(path.name for path in folder.iterdir()) == ["data", "data_check", "recipe.yaml"]
    assert len(list((folder / "data_check/images").glob("*_frames.jpg"))) == 4


def test_problems_exit_with_2_a_line_each_and_the_report_is_written(run, folder):
    (folder / "data/clips/0.mp4").write_text("")
    (folder / "data/references/1_0.png").write_text("")
    with (folder / "data/metadata.jsonl").open("a") as file:
        file.write('{"file_name": "no.mp4", "references": 3}\n')
    code, out, errors = run("--sheets", "0", "--output", "report", "--workers", "1")
    assert code == 2
    assert [line.split(": ")[1] for line in errors] == [f"data/metadata.jsonl line {line}" for line in (5, 5, 5, 1, 2)]
    assert all(line.startswith("error: ") for line in errors)
    assert "5 problems and no notes in 4 rows; open" in out
    assert len(json.loads((folder / "report/report.json").read_text())["problems"]) == 5


def test_long_lists_are_cut_on_the_terminal(run, folder, monkeypatch):
    monkeypatch.setattr(data_check, "LISTED_PROBLEMS", 2)
    monkeypatch.setattr(data_check, "LISTED_NOTES", 1)
    rows = [json.loads(line) for line in (folder / "data/metadata.jsonl").read_text().splitlines()]
    for row in rows:
        row.update(caption=f"[bold]{row['file_name']}")
        (folder / "data" / row["references"][0]["image"]).write_text("")
    tiny_data.write_manifest(folder / "data", [{**row, "caption": f"[b]{index}"} for index, row in enumerate(rows)])
    code, out, errors = run()
    assert code == 2
    assert len([line for line in errors if "references.0" in line]) == 2
    notes = out[out.index("note: short captions (4)") :].splitlines()
    assert notes[1] == "  data/metadata.jsonl line 1: clips/0.mp4: caption: '[b]0'"
    assert notes[2] == "  … and 3 more, see the report"


def test_mistakes_in_the_command_write_nothing(run, folder):
    def told(*arguments, **options):
        code, _, errors = run(*arguments, **options)
        assert code == 2
        assert sorted(path.name for path in folder.iterdir()) == ["data", "recipe.yaml"]
        return [line.removeprefix("error: ") for line in errors]

    assert told(config="no.yaml") == ["config: cannot read 'no.yaml' (No such file or directory)"]
    assert told("data.train_data=no") == ["data.train_data: cannot read 'no' (No such file or directory)"]
    assert told("data.train_data=null") == ["data.train_data must name the rows to check, got null"]
    assert len(told("data.hieght=3", "data.width=wide")) == 2
    assert told("--sheets", "-1", "--workers", "-2") == [
        "sheets must be at least 0, got -1",
        "workers must be at least 0, got -2",
    ]
    assert told("--output", "data") == [
        "output: 'data' holds files that are no report of a check; choose another folder"
    ]


def test_ctrl_c_is_one_line_and_no_report(run, folder, monkeypatch, capsys):
    inspect_row = inspection.inspect_row

    def interrupted(row, options):
        if row.line == 3:
            raise Stopped(2)
        return inspect_row(row, options)

    monkeypatch.setattr(inspection, "inspect_row", interrupted)
    with pytest.raises(SystemExit) as stop:
        main(["data", "check", "--config", "recipe.yaml"])
    assert stop.value.code == 130
    assert capsys.readouterr().err.splitlines()[-1] == "interrupted; no report was written"
    assert sorted(path.name for path in folder.iterdir()) == ["data", "recipe.yaml"]


def test_rows_that_training_holds_out_are_told(run):
    _, out, _ = run("data.validation_rows=1", "--sheets", "0")
    assert "validation  data/metadata.jsonl  folder" in out
