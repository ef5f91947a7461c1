"""What the demo generates: held-out subjects as reference images, and prompts that name their kinds.

Some prompts come twice, with other looks of the same kinds: what differs then comes from the references alone.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image

from ..atomic import atomic_file
from .portraits import draw_reference
from .prepared import prepared
from .scenes import describe
from .subjects import Subject, random_subject

SPLIT = "eval"


@dataclass(frozen=True)
class Scene:
    """A prompt's content, and with how many casts of subjects it is generated."""

    kinds: tuple[str, ...]
    motions: tuple[str, ...]
    place: str
    casts: int = 1

    @property
    def prompt(self) -> str:
        """As the world's captions are written."""
        return describe(list(self.kinds), list(self.motions), self.place)


SCENES = (
    Scene(("cat",), ("bounces",), "in a meadow", casts=2),
    Scene(("fish",), ("slides to the right",), "on a beach", casts=2),
    Scene(("mushroom",), ("sways",), "in the snow", casts=2),
    Scene(("star", "ghost"), ("spins", "floats up"), "in the desert", casts=2),
)


@dataclass(frozen=True)
class Job:
    """One video to generate."""

    key: str
    prompt: str
    references: tuple[Path, ...]


def draw_jobs(folder: Path, scenes: Sequence[Scene], *, height: int, width: int, seed: int) -> list[Job]:
    """Draw the scenes' reference images into `folder/references`; a job for every cast.

    Args:
        folder: created if missing.
        scenes: what is to be seen.
        height, width: of the images, in pixels.
        seed: decides the looks.
    """
    generator = np.random.default_rng([seed, 11])
    (folder / "references").mkdir(parents=True, exist_ok=True)
    jobs = []
    for scene in scenes:
        seen: set[str] = set()
        for _ in range(scene.casts):
            cast = [_new_colour(generator, kind, seen) for kind in scene.kinds]
            paths = tuple(folder / "references" / f"{subject}.png" for subject in cast)
            for subject, path in zip(cast, paths, strict=True):
                draw_prepared(subject, generator, height, width).save(path)
            jobs.append(Job(f"{len(jobs) + 1}-{'-'.join(scene.kinds)}", scene.prompt, paths))
    return jobs


def write_jobs(folder: Path, jobs: Sequence[Job]) -> None:
    """List jobs in `folder/prompts.jsonl`, a prompt file of `refalign generate`; the folder is created if missing."""
    rows = [
        {"key": job.key, "prompt": job.prompt, "references": [str(path.resolve()) for path in job.references]}
        for job in jobs
    ]
    folder.mkdir(parents=True, exist_ok=True)
    with atomic_file(folder / "prompts.jsonl") as temporary:
        temporary.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")


def draw_prepared(subject: Subject, generator: np.random.Generator, height: int, width: int) -> Image.Image:
    """A reference image (height, width) as training prepares them: cut out by its mask, fitted to a white canvas."""
    return prepared(draw_reference(subject, generator, height, width))


def _new_colour(generator: np.random.Generator, kind: str, seen: set[str]) -> Subject:
    """A held-out subject in a body colour that none before it in the scene had, so that casts differ at a glance."""
    while True:
        subject = random_subject(generator, SPLIT, kind)
        if subject.looks[0] not in seen:
            seen.add(subject.looks[0])
            return subject


def read_jobs(folder: Path) -> list[Job]:
    """The jobs that `write_jobs` listed in `folder`."""
    rows = [json.loads(line) for line in (folder / "prompts.jsonl").read_text(encoding="utf-8").splitlines()]
    return [Job(row["key"], row["prompt"], tuple(map(Path, row["references"]))) for row in rows]
