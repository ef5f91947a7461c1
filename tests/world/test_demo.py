"""The demo: its folder, its recipe, its samples and report; and the whole of it, interrupted and taken up again."""

import json
import shlex
import signal
import subprocess
import sys
import time
from pathlib import Path

import av
import numpy as np
import pytest
import torch
from PIL import Image
from rich.console import Console

from refalign_adapter import ConfigError, RefAlignConfig, UserError
from refalign_adapter.analysis.sensitivity import Sensitivity
from refalign_adapter.media.video_file import write_video
from refalign_adapter.recipes.file import load_recipe
from refalign_adapter.signals import Stopped
from refalign_adapter.world import demo
from refalign_adapter.world.demo import DemoOptions, run_demo
from refalign_adapter.world.demo_measure import FeatureViews, Measured
from refalign_adapter.world.demo_report import write_demo_report
from refalign_adapter.world.demo_samples import SCENES, read_jobs, write_jobs
from refalign_adapter.world.subjects import Subject


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Stages that only note that they ran, the last of which writes report.json."""
    noted = []

    def stage(name: str):
        def run(options: DemoOptions) -> None:
            noted.append(name)
            if name == "report":
                summary = {"true": 0.1, "shuffled": 0.2, "none": 0.3, "n": 64, "p_value": 1e-6}
                (options.folder / "report.json").write_text(json.dumps({"reference_sensitivity": summary}))

        return run

    monkeypatch.setattr(demo, "STAGES", {name: (name, stage(name)) for name in demo.STAGES})
    monkeypatch.setattr(demo, "commands", lambda options: ["refalign generate …"])
    return noted


def subject_of(path: Path) -> Subject:
    kind, number = path.stem.split("-")
    return Subject(kind, int(number))


def test_options_report_every_problem():
    with pytest.raises(ConfigError) as error:
        DemoOptions("out", seed=-1, train_clips=0, eval_clips=3, steps=0)
    assert [line.split()[0] for line in error.value.problems] == ["seed", "train_clips", "eval_clips", "steps"]


def test_stages_run_once_in_order(calls: list[str], tmp_path: Path, capsys: pytest.CaptureFixture):
    options = DemoOptions(tmp_path / "out")
    assert run_demo(options, Console()) == tmp_path / "out" / "report.html"
    assert calls == ["world", "cache", "training", "samples", "report"]
    facts = json.loads((tmp_path / "out" / "report.json").read_text())
    assert set(facts["seconds"]) == {*calls, "total"}
    assert "p = 1e-06" in capsys.readouterr().out
    run_demo(options, Console())
    assert len(calls) == 5
    assert "done before" in capsys.readouterr().out


def test_goes_on_after_an_interruption(calls: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    def interrupted(options: DemoOptions) -> None:
        raise Stopped(2)

    whole = dict(demo.STAGES)
    monkeypatch.setitem(demo.STAGES, "training", ("training", interrupted))
    with pytest.raises(Stopped):
        run_demo(DemoOptions(tmp_path), Console(quiet=True))
    monkeypatch.setattr(demo, "STAGES", whole)
    run_demo(DemoOptions(tmp_path), Console(quiet=True))
    assert calls == ["world", "cache", "training", "samples", "report"]


def test_refuses_a_folder_with_something_else(calls: list[str], tmp_path: Path):
    (tmp_path / "notes.txt").write_text("mine")
    with pytest.raises(UserError, match="is not empty; choose a new folder"):
        run_demo(DemoOptions(tmp_path), Console(quiet=True))
    assert sorted(path.name for path in tmp_path.iterdir()) == ["notes.txt"]


def test_refuses_other_options(calls: list[str], tmp_path: Path):
    run_demo(DemoOptions(tmp_path, seed=1), Console(quiet=True))
    with pytest.raises(UserError, match="holds a demo with seed 1; delete it"):
        run_demo(DemoOptions(tmp_path, seed=2), Console(quiet=True))


def test_recipe_points_into_the_folder_whatever_its_name(tmp_path: Path):
    folder = tmp_path / "my demo, [1]: #a"
    folder.mkdir()
    demo.write_recipe(DemoOptions(folder, seed=7, steps=40))
    recipe = load_recipe(folder / "recipe.yaml")
    assert recipe.pretrained_model_name_or_path == str(folder / "base")
    assert recipe.output_dir == str(folder / "training")
    assert recipe.adapter.teachers == [str(folder / "teacher")]
    assert recipe.data.train_data == str(folder / "data" / "train" / "metadata.jsonl")
    assert recipe.data.validation_data == str(folder / "data" / "eval" / "metadata.jsonl")
    assert recipe.data.cache_dir == str(folder / "cache")
    assert (recipe.seed, recipe.max_train_steps, recipe.lr_warmup_steps) == (7, 40, 4)
    assert (folder / "cpu.yaml").is_file()


def test_jobs_show_held_out_subjects_in_colours_of_their_own(tmp_path: Path):
    jobs = write_jobs(tmp_path / "a", height=64, width=48, seed=0)
    assert len(jobs) == sum(scene.casts for scene in SCENES)
    assert sum(len(job.references) == 2 for job in jobs) >= 2
    assert len({job.key for job in jobs}) == len(jobs)
    for job in jobs:
        subjects = [subject_of(path) for path in job.references]
        assert all(subject.split == "eval" for subject in subjects)
        assert all(f"a {subject.kind} " in job.prompt for subject in subjects)
        assert all(Image.open(path).size == (48, 64) for path in job.references)
    same = [job for job in jobs if job.prompt == jobs[0].prompt]
    colours = [subject_of(path).looks[0] for job in same for path in job.references]
    assert len(same) == 2
    assert len(set(colours)) == len(colours)
    again = write_jobs(tmp_path / "b", height=64, width=48, seed=0)
    assert [path.read_bytes() for job in jobs for path in job.references] == [
        path.read_bytes() for job in again for path in job.references
    ]
    assert [job.prompt for job in read_jobs(tmp_path / "a")] == [job.prompt for job in jobs]


def test_report_of_what_was_measured(tmp_path: Path):
    generator = np.random.default_rng(0)
    jobs = write_jobs(tmp_path / "samples", height=32, width=32, seed=0)
    for job in jobs:
        frames = generator.integers(0, 255, (5, 32, 32, 3), dtype=np.uint8)
        write_video(tmp_path / "samples" / f"{job.key}.mp4", frames, fps=8)
    (tmp_path / "training" / "adapter").mkdir(parents=True)
    config = RefAlignConfig(attention="isolated", lora_scope="reference")
    config.save(tmp_path / "training" / "adapter")
    (tmp_path / "training" / "adapter" / "refalign_reference_lora.safetensors").write_bytes(b"0" * 1_500_000)
    names = ("train/flow", "train/positive", "train/negative", "train/cosine/block_0")
    rows = [{"step": step, **dict.fromkeys(names, 0.5)} for step in range(1, 10)]
    (tmp_path / "training" / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    labels = np.repeat(np.arange(4), 4)
    clustered = np.eye(4)[labels] + 0.01 * generator.normal(size=(16, 4))
    features = FeatureViews([f"ball-{i}" for i in range(4)], labels, 1, generator.normal(size=(16, 4)), clustered)
    losses = torch.rand(64, 4, dtype=torch.float64)
    measured = Measured(Sensitivity(0.3, 0.4, 0.3, 0.5, 64, 1e-5, losses), features)
    options = {"seed": 0, "train_clips": 12, "output": None}
    write_demo_report(tmp_path, measured, options, {"world": 1.0}, ["refalign generate --prompt 'x'"])

    facts = json.loads((tmp_path / "report.json").read_text())
    assert facts["reference_sensitivity"] == {
        "true": 0.3,
        "shuffled": 0.4,
        "swapped": 0.3,
        "none": 0.5,
        "n": 64,
        "p_value": 1e-5,
    }
    assert facts["reference_features"]["after"]["retrieval"] == 1.0
    assert (facts["steps"], facts["adapter_bytes"], facts["options"]) == (9, 1_500_000, {"seed": 0, "train_clips": 12})
    text = (tmp_path / "report.html").read_text()
    assert "1.5 MB" in text
    assert text.count("<video") == len(jobs)
    assert "Yes: the adapter uses its references" in text
    assert Image.open(tmp_path / "demo.gif").n_frames == 5


SMALL_DEMO = """
import sys
from refalign_adapter.world.demo import DemoOptions, run_demo
try:
    run_demo(DemoOptions(sys.argv[1], train_clips=16, eval_clips=16, steps=12))
except KeyboardInterrupt:  # of a process that has installed no handlers
    sys.exit(130)
"""


def demo_process(folder: Path) -> subprocess.Popen:
    return subprocess.Popen([sys.executable, "-c", SMALL_DEMO, str(folder)], stdout=subprocess.PIPE, text=True)


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_whole_demo_interrupted_and_taken_up_again(tmp_path: Path):
    folder = tmp_path / "demo"
    first = demo_process(folder)
    metrics = folder / "training" / "metrics.jsonl"
    while not metrics.is_file() or '"train/flow"' not in metrics.read_text():
        assert first.poll() is None
        time.sleep(0.1)
    first.send_signal(signal.SIGINT)
    first.communicate()
    assert first.returncode == 130
    assert set(json.loads((folder / "demo.json").read_text())["seconds"]) == {"world", "cache"}
    assert list((folder / "training").glob("checkpoint-*"))

    second = demo_process(folder)
    output = second.communicate()[0]
    assert second.returncode == 0
    steps = [json.loads(line) for line in metrics.read_text().splitlines()]
    assert [row["step"] for row in steps if "train/flow" in row] == list(range(1, 13))
    facts = json.loads((folder / "report.json").read_text())
    assert set(facts["reference_sensitivity"]) == {"true", "shuffled", "swapped", "none", "n", "p_value"}
    assert facts["reference_sensitivity"]["n"] == 16
    assert (folder / "report.html").stat().st_size > 50_000
    assert len(list((folder / "samples").glob("*.mp4"))) == len(read_jobs(folder / "samples"))

    lines = [line for line in output.splitlines() if " generate --" in line]
    assert len(lines) == 2
    for line in lines:
        subprocess.run(shlex.split(line), check=True)
    for name in ("another_reference", "another_prompt"):
        with av.open(str(folder / f"{name}.mp4")) as container:
            assert sum(1 for _ in container.decode(video=0)) == 9
