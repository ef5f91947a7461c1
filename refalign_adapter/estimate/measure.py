"""Real optimizer steps on this machine with random batches: their time and, on a GPU, their memory."""

from __future__ import annotations

import statistics
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

import torch

from ..training.datasource import TrainingData
from ..training.interrupt import SignalWatch
from ..training.loop import optimizer_step
from ..training.setup import build_accelerator, build_run
from ..training.tracking import LossMeter
from .setting import Setting
from .shapes import SampleShapes


@dataclass(frozen=True)
class Measured:
    """What steps on this machine took.

    Attributes:
        seconds: of an optimizer step, the median.
        steps: that were measured, after one that is not counted.
        device: what they ran on.
        peak: most bytes that torch held on the GPU at a time; None on the CPU.
    """

    seconds: float
    steps: int
    device: str
    peak: int | None


class RandomData(TrainingData):
    """In place of a cache, for steps with batches that come from elsewhere.

    Args:
        shapes: of the samples.
        device: of the process.
    """

    def __init__(self, shapes: SampleShapes, device: torch.device):
        self.empty_text = {name: tensor[0] for name, tensor in shapes.captions(1, device).items()}
        self._widths = shapes.widths

    @property
    def widths(self) -> dict[str, dict[str, int]]:
        return self._widths


def measure_steps(setting: Setting, steps: int) -> Measured:
    """Load the base and run optimizer steps as training does; nothing is kept.

    Args:
        setting: the run; its batches are of its largest samples.
        steps: how many to measure, at least 1.

    Raises:
        UserError: a base that cannot be loaded, or an adapter that does not fit it.
    """
    recipe, shapes = setting.recipe, setting.shapes
    signals = SignalWatch()  # not entered: Ctrl-C ends this as it ends any command
    with tempfile.TemporaryDirectory() as folder:
        quiet = recipe.model_copy(update={"report_to": None, "output_dir": folder, "resume_from_checkpoint": None})
        accelerator = build_accelerator(quiet, Path(folder))
        run = build_run(quiet, accelerator, Path(folder), RandomData(shapes, accelerator.device))
        batch = shapes.batch(recipe.train_batch_size, setting.references, "cpu")
        seconds = []
        for _ in range(steps + 1):
            started = time.perf_counter()
            batches = iter([batch] * recipe.gradient_accumulation_steps)
            optimizer_step(run, batches, LossMeter(run.module.logs), signals)
            seconds.append(time.perf_counter() - started)
        device = accelerator.device
        on_gpu = device.type == "cuda"
        name = torch.cuda.get_device_name(device) if on_gpu else "the CPU"
        peak = torch.cuda.max_memory_allocated(device) if on_gpu else None
        return Measured(statistics.median(seconds[1:]), steps, name, peak)
