"""What a run tells: means of its losses, `metrics.jsonl`, trackers through accelerate, a progress bar."""

from __future__ import annotations

import json
import math
import sys
import time
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import IO, Any

import torch
from accelerate import Accelerator
from tqdm import tqdm

from ..atomic import atomic_file
from ..batch import StepOutput
from ..files import writing
from ..signals import tell, terminal_may_be_gone

METRICS_NAME = "metrics.jsonl"


class LossMeter:
    """Means of losses over batches and processes, by name: `loss`, `flow`, and what the objectives log.

    Args:
        logs: names of these, the same on every process, see `TrainingStep.logs`.
    """

    def __init__(self, logs: Sequence[str]):
        self.names = ["loss", "flow", *logs]
        self.clear()

    def clear(self) -> None:
        """Forget what was added."""
        self.sums = torch.zeros(len(self.names), dtype=torch.float64)
        self.counts = torch.zeros(len(self.names), dtype=torch.float64)

    def add(self, output: StepOutput, samples: int) -> None:
        """Add one batch of `samples` samples."""
        values = {"loss": output.loss, "flow": output.flow, **output.logs}
        places = [self.names.index(name) for name in values]
        row = torch.stack([value.detach().double().cpu() for value in values.values()])
        weights = torch.tensor([output.counts.get(name, samples) for name in values], dtype=torch.float64)
        self.sums[places] += row * weights
        self.counts[places] += weights

    def reduce(self, accelerator: Accelerator) -> dict[str, float]:
        """Means over what was added on all processes, by name, those without a value left out; then forgets it."""
        both = torch.stack([self.sums, self.counts]).to(accelerator.device)
        sums, counts = accelerator.reduce(both, "sum").cpu()  # type: ignore[union-attr]
        self.clear()
        return {
            name: (total / count).item()
            for name, total, count in zip(self.names, sums, counts, strict=True)
            if count > 0
        }


class RunLog:
    """Scalars of a run: one JSON object a line in `metrics.jsonl`, and accelerate's trackers. Main process only.

    Args:
        accelerator: its trackers are told too.
        output_dir: the run's folder.
        step: rows after this step are dropped, being of a run that is taken up before them.

    Raises:
        WriteError: the file cannot be written.
    """

    def __init__(self, accelerator: Accelerator, output_dir: Path, step: int):
        self.accelerator = accelerator
        self.file: IO[str] | None = None
        self.path = path = output_dir / METRICS_NAME
        self.trackers = accelerator.logging_dir or output_dir
        if accelerator.is_main_process:
            kept = [row for row in read_metrics(path) if row["step"] <= step] if step else []
            with atomic_file(path) as temporary:
                temporary.write_text("".join(json.dumps(row) + "\n" for row in kept), encoding="utf-8")
            with writing(path):
                self.file = path.open("a", encoding="utf-8")

    def write(self, step: int, values: dict[str, float]) -> None:
        """Log scalars of a step; those that are no numbers, which JSON has none for, are left out.

        Raises:
            WriteError: the file or a tracker's cannot be written, or its folder is gone.
        """
        told = {name: value for name, value in values.items() if math.isfinite(value)}
        with writing(self.trackers):
            self.accelerator.log(told, step=step)
        if self.file is not None:
            with writing(self.path):
                self.path.stat()  # what is written to a file that was deleted would be lost without an error
                self.file.write(json.dumps({"step": step, **told}) + "\n")
                self.file.flush()

    def close(self) -> None:
        """Close the file and the trackers. What cannot be written has been told, or is of no use any more."""
        if self.file is not None:
            with suppress(OSError):
                self.file.close()
        with suppress(OSError):
            self.accelerator.end_training()


def read_metrics(path: str | Path) -> list[dict[str, Any]]:
    """Rows of a `metrics.jsonl`; none when there is no such file. A last line cut off by a crash is left out."""
    rows = []
    content = Path(path).read_text(encoding="utf-8", errors="replace") if Path(path).is_file() else ""
    for line in content.splitlines():
        try:
            row = json.loads(line)
        except (ValueError, RecursionError):
            break
        if not isinstance(row, dict) or not isinstance(row.get("step"), int):
            break
        rows.append(row)
    return rows


class ProgressBar:
    """Steps done, losses and the time that is left; a bar on a terminal, elsewhere a line every half a minute or so.

    Args:
        accelerator: only its main process shows anything.
        total: steps of the run.
        done: steps that a checkpoint had done.
    """

    def __init__(self, accelerator: Accelerator, total: int, done: int):
        self.shown = accelerator.is_main_process
        self.terminal = sys.stderr.isatty()
        self.total, self.first, self.started, self.last = total, done, time.monotonic(), time.monotonic()
        options = {"desc": "training", "unit": "step", "dynamic_ncols": True}
        self.bar = tqdm(total=total, initial=done, disable=not (self.shown and self.terminal), **options)

    def update(self, step: int, values: dict[str, float]) -> None:
        """Show that `step` steps are done."""
        shown = {name.rpartition("/")[2]: f"{value:.4g}" for name, value in values.items()}
        with terminal_may_be_gone():
            self.bar.set_postfix(shown, refresh=False)
            self.bar.update(1)
        now = time.monotonic()
        if self.shown and not self.terminal and (now - self.last > 30 or step == self.total):
            self.last = now
            left = tqdm.format_interval((now - self.started) / (step - self.first) * (self.total - step))
            losses = " ".join(f"{name} {value}" for name, value in shown.items())
            tell(f"step {step}/{self.total}  {losses}  {left} left")

    def close(self) -> None:
        """Leave the bar as it is."""
        with terminal_may_be_gone():
            self.bar.close()


def say(accelerator: Accelerator, text: str) -> None:
    """Print one line on the main process, above the progress bar."""
    if accelerator.is_main_process:
        with terminal_may_be_gone():
            tqdm.write(text, file=sys.stderr)
