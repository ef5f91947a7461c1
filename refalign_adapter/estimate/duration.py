"""How long a run takes, and how many samples it sees."""

from __future__ import annotations

from dataclasses import dataclass

from .setting import Setting

PAPER_SAMPLES = 384_000
"""3,000 steps of 128 samples (RefAlign, arXiv 2603.25743)."""


@dataclass(frozen=True)
class Duration:
    """How long training takes and what it sees.

    Attributes:
        steps: optimizer steps.
        step_time: seconds of one; None: not known.
        samples: that are seen, repeats included.
        rows: that are trained on; None: not known.
    """

    steps: int
    step_time: float | None
    samples: int
    rows: int | None

    @property
    def hours(self) -> float | None:
        """Of all steps; None: not known."""
        return None if self.step_time is None else self.steps * self.step_time / 3600

    @property
    def share_of_paper(self) -> float:
        """Samples as a share of those of the paper's run."""
        return self.samples / PAPER_SAMPLES

    @property
    def passes(self) -> float | None:
        """Times that every row is seen; None: not known."""
        return self.samples / self.rows if self.rows else None


def duration_of(setting: Setting, step_time: float | None, rows: int | None) -> Duration:
    """The duration of a run.

    Args:
        setting: the run.
        step_time: seconds of an optimizer step; None: not known.
        rows: of the data, in place of those that were found.
    """
    recipe, found = setting.recipe, setting.found
    steps = recipe.max_train_steps
    batch = recipe.train_batch_size * recipe.gradient_accumulation_steps * setting.processes
    if rows is None and found:
        rows = len(found.rows["train"])
    if rows is not None and not recipe.data.validation_data:
        rows = max(0, rows - recipe.data.validation_rows)
    return Duration(steps, step_time, steps * batch, rows)
