"""The demo's first video, within a minute: the shipped adapter, and drawn reference images or the user's own.

Drawn ones are a cat in two looks, for one prompt and one noise: what differs comes from the reference alone.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from pathlib import Path

from ..analysis.samples import Sample, write_animation
from .backgrounds import BACKGROUNDS
from .demo_samples import Job, Scene, draw_jobs, write_jobs
from .motions import MOTIONS
from .subjects import KINDS

SCENE = Scene(("cat",), ("bounces",), "in a meadow", casts=2)


def first_jobs(folder: Path, references: Sequence[Path], prompt: str | None, **drawing: int) -> list[Job]:
    """List the videos in `folder/prompts.jsonl`: of the user's pictures, or of drawn ones.

    Args:
        folder: created if missing.
        references, prompt: the user's; without a prompt drawn ones are taken.
        drawing: height, width and seed of what is drawn.
    """
    jobs = draw_jobs(folder, (SCENE,), **drawing) if prompt is None else [Job("yours", prompt, tuple(references))]
    write_jobs(folder, jobs)
    return jobs


def show_first(folder: Path, jobs: Sequence[Job]) -> Path:
    """Write `folder/first.gif`: references on the left of their videos."""
    samples = [Sample(job.prompt, job.references, folder / f"{job.key}.mp4") for job in jobs]
    write_animation(folder / "first.gif", samples, columns=1, size=192)
    return folder / "first.gif"


def prompt_problem(prompt: str) -> str | None:
    """Why the world's small model cannot follow a prompt, in one line; None when it knows every word."""
    grammar = " ".join(("a", "an", "while", "and", "on white", *KINDS, *MOTIONS, *BACKGROUNDS)).split()
    unknown = [word for word in prompt.lower().replace(",", " ").split() if word not in grammar]
    if not unknown:
        return None
    return (
        f"prompt: the demo's small model does not know {unknown[0]!r}; it knows a subject ({', '.join(KINDS)}), what "
        f"it does ({', '.join(MOTIONS)}) and where ({', '.join(BACKGROUNDS)}), as in "
        f"'{dataclasses.replace(SCENE, casts=1).prompt}'"
    )
