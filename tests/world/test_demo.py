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
from refalign_adapter.analysis.attribution import attribution
from refalign_adapter.analysis.confusion import confusion
from refalign_adapter.analysis.estimate import mean, share, void
from refalign_adapter.analysis.identity import looks_right, retrieval
from refalign_adapter.analysis.mixing import mixing
from refalign_adapter.analysis.sensitivity import Sensitivity
from refalign_adapter.media.video_file import write_video
from refalign_adapter.recipes.file import load_recipe
from refalign_adapter.signals import Stopped
from refalign_adapter.world import demo
from refalign_adapter.world.demo import DemoOptions, run_demo
from refalign_adapter.world.demo_first import first_jobs
from refalign_adapter.world.demo_measure import FeatureViews, Measured
from refalign_adapter.world.demo_numbers import MEASURES
from refalign_adapter.world.demo_report import write_demo_report
from refalign_adapter.world.demo_samples import SCENES, draw_jobs, read_jobs, write_jobs
from refalign_adapter.world.demo_videos import ARMS
from refalign_adapter.world.evaluation import Losses
from refalign_adapter.world.subjects import Subject
from refalign_adapter.world.verdict import CopyPaste, Verdict

STAGES = ("first", "world", "cache", "training", "samples", "report")


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Stages that only note that they ran, the last of which writes report.json."""
    noted = []

    def stage(name: str):
        def run(options: DemoOptions) -> None:
            noted.append(name)
            if name == "report":
                losses = {"true": 0.1, "shuffled": 0.2, "none": 0.3, "n": 64, "p_value": 1e-6, "p_value_none": 1e-4}
                facts = {"reference_sensitivity": losses, "identity": {"top1": 0.5, "n": 16, "chance": 0.0625}}
                (options.folder / "report.json").write_text(json.dumps(facts))

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


def test_own_pictures_need_a_prompt_in_the_worlds_words(tmp_path: Path):
    picture = tmp_path / "mine.png"
    Image.new("RGB", (40, 30), (200, 30, 30)).save(picture)
    for given in ({"references": (str(picture),)}, {"prompt": "a cat bounces, in a meadow"}):
        with pytest.raises(ConfigError, match="--reference and --prompt go together"):
            DemoOptions("out", **given)
    with pytest.raises(ConfigError) as error:
        DemoOptions("out", prompt="a dog runs, in a meadow", references=(str(tmp_path / "none.png"),))
    assert len(error.value.problems) == 2
    assert "does not know 'dog'; it knows a subject (ball, box" in str(error.value)
    options = DemoOptions(tmp_path / "out", prompt="A cat bounces, in a meadow", references=(str(picture),))
    jobs = first_jobs(tmp_path / "first", [picture], options.prompt, height=64, width=64, seed=0)
    assert [(job.key, job.references) for job in jobs] == [("yours", (picture,))]
    assert read_jobs(tmp_path / "first")[0].prompt == options.prompt


def test_stages_run_once_in_order(calls: list[str], tmp_path: Path, capsys: pytest.CaptureFixture):
    options = DemoOptions(tmp_path / "out")
    assert run_demo(options, Console()) == tmp_path / "out" / "report.html"
    assert calls == list(STAGES)
    facts = json.loads((tmp_path / "out" / "report.json").read_text())
    assert set(facts["seconds"]) == {*calls, "total"}
    printed = capsys.readouterr().out
    assert "p = 1e-06" in printed
    assert "In 50% of 16 videos the right reference is first among 16 of its kind, by chance in 6%." in printed
    run_demo(options, Console())
    assert len(calls) == len(STAGES)
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
    assert calls == list(STAGES)


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
    jobs = draw_jobs(tmp_path / "a", SCENES, height=64, width=48, seed=0)
    write_jobs(tmp_path / "a", jobs)
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
    again = draw_jobs(tmp_path / "b", SCENES, height=64, width=48, seed=0)
    assert [path.read_bytes() for job in jobs for path in job.references] == [
        path.read_bytes() for job in again for path in job.references
    ]
    assert [job.prompt for job in read_jobs(tmp_path / "a")] == [job.prompt for job in jobs]


def verdict_of(subjects: int) -> Verdict:
    """Of four perfect videos, as far as looks go."""
    truth = np.arange(4 * subjects * 5).reshape(4, subjects, 5) % 2
    likeness = np.tile(-1.0 + np.eye(subjects), (4, 1, 1))
    several = subjects > 1
    return Verdict(
        looks_right(np.repeat(truth.reshape(-1, 1, 5), 9, 1), truth.reshape(-1, 5), np.ones(5, bool)),
        retrieval(np.eye(16)[np.zeros(4 * subjects, int)]),
        confusion(likeness) if several else None,
        mixing(truth, truth) if several else None,
        CopyPaste(mean([0.1, 0.2]), void(0.0), share([True, False], chance=0.5)),
        share([True] * 4, chance=0.2),
    )


def test_report_of_what_was_measured(tmp_path: Path):
    generator = np.random.default_rng(0)
    jobs = draw_jobs(tmp_path / "samples", SCENES, height=32, width=32, seed=0)
    write_jobs(tmp_path / "samples", jobs)
    for arm in ARMS:
        (tmp_path / "samples" / arm).mkdir()
        for job in jobs:
            frames = generator.integers(0, 255, (5, 32, 32, 3), dtype=np.uint8)
            write_video(tmp_path / "samples" / arm / f"{job.key}.mp4", frames, fps=8)
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
    losses = torch.tensor([0.3, 0.4, 0.3, 0.5]).double() + 0.01 * torch.rand(64, 4, dtype=torch.float64)
    sensitivity = Sensitivity(0.3, 0.4, 0.3, 0.5, 64, 1e-5, losses)
    rises = attribution(np.full((3, 2), 0.2), np.full((3, 2, 2), 0.3) - 0.1 * (1 - np.eye(2)))
    verdicts = {"one": verdict_of(1), "two": verdict_of(2)}
    measured = Measured(Losses(sensitivity, {2: rises}), verdicts, features)
    options = {"seed": 0, "train_clips": 12, "output": None}
    write_demo_report(tmp_path, measured, options, {"world": 1.0}, ["refalign generate --prompt 'x'"])

    facts = json.loads((tmp_path / "report.json").read_text())
    assert facts["reference_sensitivity"].pop("p_value_none") < 1e-9
    assert facts["reference_sensitivity"] == {
        "true": 0.3,
        "shuffled": 0.4,
        "swapped": 0.3,
        "none": 0.5,
        "n": 64,
        "p_value": 1e-5,
    }
    assert {name: facts["identity"][name] for name in ("top1", "n", "chance")} == {"top1": 1, "n": 4, "chance": 1 / 16}
    for path in MEASURES:
        found = facts
        for name in path.path:
            found = found[name]
        assert {"low", "high", "n"} <= set(found), path.name
    assert facts["attribution"]["2"]["use"]["value"] == pytest.approx(0.1)
    assert facts["confusion"]["mixing"]["mixed"]["value"] == 0
    assert facts["reference_features"]["after"]["retrieval"] == 1.0
    assert (facts["steps"], facts["adapter_bytes"], facts["options"]) == (9, 1_500_000, {"seed": 0, "train_clips": 12})
    text = (tmp_path / "report.html").read_text()
    assert "1.5 MB" in text
    assert text.count("<video") == len(ARMS) * len(jobs)
    assert "Yes: the adapter uses its references" in text
    assert "100% (51% to 100%, n = 4)" in text
    assert "not measured" in text  # an angle that no subject shows
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
    assert set(json.loads((folder / "demo.json").read_text())["seconds"]) == {"first", "world", "cache"}
    assert list((folder / "training").glob("checkpoint-*"))

    second = demo_process(folder)
    output = second.communicate()[0]
    assert second.returncode == 0
    steps = [json.loads(line) for line in metrics.read_text().splitlines()]
    assert [row["step"] for row in steps if "train/flow" in row] == list(range(1, 13))
    facts = json.loads((folder / "report.json").read_text())
    names = {"true", "shuffled", "swapped", "none", "n", "p_value", "p_value_none"}
    assert set(facts["reference_sensitivity"]) == names
    assert facts["reference_sensitivity"]["n"] == 16
    assert (folder / "report.html").stat().st_size > 50_000
    for arm in ARMS:
        assert len(list((folder / "samples" / arm).glob("*.mp4"))) == len(read_jobs(folder / "samples"))
    assert Image.open(folder / "first" / "first.gif").n_frames == 9

    lines = [line for line in output.splitlines() if " generate --" in line]
    assert len(lines) == 2
    for line in lines:
        subprocess.run(shlex.split(line), check=True)
    for name in ("another_reference", "another_prompt"):
        with av.open(str(folder / f"{name}.mp4")) as container:
            assert sum(1 for _ in container.decode(video=0)) == 9
