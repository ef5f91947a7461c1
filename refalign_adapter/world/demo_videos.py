"""The demo's sample videos, in a process of their own: `python -m refalign_adapter.world.demo_videos DIR …`.

    DIR/samples/base       the prompts without references: the base model's own videos
    DIR/samples/trained    with their references and the adapter that was just trained
    DIR/samples/shipped    with the one that came along

Videos of one scene start from the same noise, whatever the adapter and the reference images.
"""

from __future__ import annotations

import json
import logging
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from ..library_output import quiet_libraries
from ..media.image_files import read_images
from ..media.video_file import write_video
from .demo_samples import Job, read_jobs
from .sampling import Sampling, sample_videos
from .shipped import demo_adapter
from .watching import SPREAD

ARMS = ("base", "trained", "shipped")
SAVING = {"guidance_refresh": 3}
"""Two fifths fewer passes, at no cost that could be measured (docs/performance.md)."""


def generate_samples(folder: Path, size: dict[str, Any], seed: int) -> None:
    """Generate the jobs of `folder/samples` three ways.

    Args:
        folder: the demo's, its training done.
        size: height, width, num_frames and fps.
        seed: of the noise.
    """
    from diffusers import WanPipeline

    from ..pipelines.load import load_adapter

    jobs = read_jobs(folder / "samples")
    with quiet_libraries():
        base = WanPipeline.from_pretrained(folder / "base")
    trained = load_adapter(base, folder / "training" / "adapter", "trained")
    _generate(trained, jobs, folder / "samples" / "base", size, seed, Sampling(references=False))
    _generate(trained, jobs, folder / "samples" / "trained", size, seed, Sampling(arguments=SAVING))
    trained.unload()
    shipped = load_adapter(base, demo_adapter(), "shipped")
    _generate(shipped, jobs, folder / "samples" / "shipped", size, seed, Sampling(arguments=SAVING))


def _generate(
    pipe: Any, jobs: Sequence[Job], folder: Path, size: dict[str, Any], seed: int, sampling: Sampling
) -> None:
    folder.mkdir(exist_ok=True)
    scenes = [job.prompt for job in jobs]
    for count in sorted({len(job.references) for job in jobs}):
        some = [job for job in jobs if len(job.references) == count]
        videos = sample_videos(
            pipe,
            [job.prompt for job in some],
            [read_images(job.references) for job in some],
            sampling,
            seeds=[seed * SPREAD + scenes.index(job.prompt) for job in some],
            size=size,
        )
        for job, video in zip(some, videos, strict=True):
            write_video(folder / f"{job.key}.mp4", video, fps=size["fps"])


def main() -> None:
    """The process that the demo starts: folder, seed, and the size as JSON."""
    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)  # it warns of CPU kernels that nothing here uses
    folder, seed, size = sys.argv[1:]
    generate_samples(Path(folder), json.loads(size), int(seed))


if __name__ == "__main__":
    main()
