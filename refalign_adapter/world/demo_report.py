"""The demo's report: what each picture shows, in one plain sentence each."""

from __future__ import annotations

import dataclasses
import platform
from collections.abc import Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

from ..analysis import pictures
from ..analysis.features import project
from ..analysis.report import (
    Comparison,
    Report,
    Section,
    code,
    comparison_table,
    explained_table,
    plot,
    sensitivity_answer,
    value_table,
    write_report,
)
from ..analysis.samples import Sample, write_animation
from ..json_files import read_json, write_json
from ..training.tracking import METRICS_NAME, read_metrics
from .demo_measure import FeatureViews, Measured
from .demo_numbers import number_rows
from .demo_samples import read_jobs
from .demo_videos import ARMS
from .evaluation import facts as facts_of
from .reading import Judge
from .shipped import FIGURES, demo_adapter

LIBRARIES = ("torch", "diffusers", "transformers", "peft", "accelerate", "bitsandbytes")


def write_demo_report(
    folder: Path, measured: Measured, options: dict[str, Any], seconds: dict[str, float], commands: Sequence[str]
) -> None:
    """Write `report.html`, `report.json` and `demo.gif` into the demo's folder.

    Args:
        folder: the demo's folder, its training and samples done.
        measured: see `measure`.
        options: what the demo was told, for report.json.
        seconds: of the stages that are done.
        commands: to generate again.
    """
    rows = read_metrics(folder / "training" / METRICS_NAME)
    jobs, videos = read_jobs(folder / "samples"), folder / "samples"
    shown = [Sample(job.prompt, job.references, videos / "shipped" / f"{job.key}.mp4") for job in jobs]
    write_animation(folder / "demo.gif", shown)
    compared = [
        Comparison(job.prompt, job.references, tuple(videos / arm / f"{job.key}.mp4" for arm in ARMS)) for job in jobs
    ]
    facts = _facts(folder, measured, options, rows)
    write_json(folder / "report.json", facts)
    page = Report("A reference adapter, trained in minutes", _introduction(facts), footer=_footer())
    page.sections = [
        *_evidence(facts, measured, compared),
        *_training(rows, measured.features),
        Section(
            "Generate again",
            "Copy, and change the prompt or the reference images; the kinds, motions and places of the demo's "
            "prompts are all that this small model knows.",
            code(commands),
        ),
        Section("Time", "Where the time went, in seconds.", value_table(["stage", "seconds"], seconds.items())),
    ]
    write_report(folder / "report.html", page)


def _evidence(facts: dict[str, Any], measured: Measured, compared: Sequence[Comparison]) -> list[Section]:
    """Videos side by side, the judge's numbers, and losses."""
    columns = ["base, without references", f"your adapter, {facts['steps']} steps", "shipped adapter, trained long"]
    sensitivity = measured.losses.sensitivity
    return [
        Section(
            "Whose subject is this?",
            "The prompt names kinds and motions, never looks: colours can come from the reference images only. Every "
            "prompt comes twice, with other references and the same noise; what differs then, the references did. "
            "These subjects were never trained on.",
            comparison_table(columns, compared),
        ),
        Section(
            "In numbers",
            "A small judge, which took no part in training, reads in the videos where subjects are and how they "
            f"look. Only looks count that it reads right in 95 of 100 drawn frames: {_words(Judge.load().counted)}. "
            "In brackets the interval of 95 %. The shipped adapter's figures were measured beforehand, on more "
            "videos with five seeds.",
            explained_table(
                ["", "your adapter", "shipped adapter", "by chance", "what it is"],
                number_rows(facts, read_json(demo_adapter() / FIGURES)),
            ),
        ),
        Section(
            "Does it use its references?",
            "Noise is taken off held-out clips with the right reference images, with another clip's and with none; "
            "subjects that training never saw. Only if the right ones give the lowest loss, the adapter reads them.",
            sensitivity_answer(sensitivity) + plot(pictures.sensitivity_picture(sensitivity), "reference sensitivity"),
        ),
    ]


def _training(rows: Sequence[dict[str, Any]], features: FeatureViews) -> list[Section]:
    """What the run's curves and the references' features say."""
    return [
        Section(
            "Losses",
            "Left, how well the model removes noise, where lower is better; right, how far reference tokens are "
            "from their teacher features (positive) and how much they resemble those of other subjects (negative).",
            plot(pictures.loss_picture(rows), "loss curves"),
        ),
        Section(
            "Agreement with the teacher",
            "After a small projector, how well the reference tokens of each aligned block point where the frozen "
            "vision teacher's features do; 1 is perfect.",
            plot(pictures.cosine_picture(rows), "cosine per block"),
        ),
        _features_section(features),
    ]


def _features_section(features: FeatureViews) -> Section:
    scores = features.separability
    points = {
        f"{name} training: silhouette {score.silhouette:.2f}": project(getattr(features, name))
        for name, score in scores.items()
    }
    sentence = (
        f"Each dot is one view of one held-out subject, as the model sees it after block {features.block}, two "
        "subjects at a time; views of one subject should lie together, whatever the pose, the light and the other "
        "subject. The two axes are the directions of largest variation. The silhouette score compares distances "
        "within a subject and to the nearest other one, at best 1; the nearest neighbour is of the same subject for "
        f"{scores['before'].retrieval:.0%} of the dots before and {scores['after'].retrieval:.0%} after."
    )
    picture = pictures.features_picture(points, features.labels, features.subjects)
    return Section("What the model makes of reference images", sentence, plot(picture, "reference features"))


def _facts(
    folder: Path, measured: Measured, options: dict[str, Any], rows: Sequence[dict[str, Any]]
) -> dict[str, Any]:
    """What report.json holds; the stages' times are added at the very end."""
    last = next(row for row in reversed(rows) if "train/flow" in row)
    return {
        **facts_of(measured.verdicts, measured.losses),
        "reference_features": {
            "block": measured.features.block,
            **{name: dataclasses.asdict(score) for name, score in measured.features.separability.items()},
        },
        "options": {name: value for name, value in options.items() if name != "output"},
        "steps": last["step"],
        "adapter_bytes": _weights_bytes(folder / "training" / "adapter"),
        "versions": {name: version(name) for name in LIBRARIES} | {"python": platform.python_version()},
    }


def _introduction(facts: dict[str, Any]) -> str:
    return (
        f"A tiny Wan video model that knew no reference images got an adapter of {facts['adapter_bytes'] / 1e6:.1f} "
        f"MB, trained for {facts['steps']} steps on {facts['options']['train_clips']} drawn clips. The base model "
        "stayed as it was; the teacher that helped in training is not needed for the videos below. Another adapter, "
        "trained for hours, came along: what more training gives."
    )


def _words(names: Sequence[str]) -> str:
    return ", ".join(names) or "none, so that the verdict is void"


def _footer() -> str:
    return "Written by refalign demo with " + ", ".join(f"{name} {version(name)}" for name in LIBRARIES) + "."


def _weights_bytes(adapter: Path) -> int:
    return sum(path.stat().st_size for path in adapter.glob("*.safetensors"))
