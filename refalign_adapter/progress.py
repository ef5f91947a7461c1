"""A progress bar on standard error."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager


@contextmanager
def progress_bar(title: str) -> Iterator[Callable[..., None]]:
    """A bar that appears with the first call of (done, in all), or of (done, in all, what is done)."""
    from rich.console import Console
    from rich.progress import (
        BarColumn,
        MofNCompleteColumn,
        Progress,
        TaskID,
        TextColumn,
        TimeElapsedColumn,
        TimeRemainingColumn,
    )

    columns = (BarColumn(), MofNCompleteColumn(), TimeElapsedColumn(), TimeRemainingColumn())
    bar = Progress(TextColumn(title + "{task.description}"), *columns, console=Console(stderr=True))
    tasks: dict[str, TaskID] = {}

    def show(done: int, total: int, what: str = "") -> None:
        bar.start()
        if what not in tasks:
            tasks[what] = bar.add_task(f" {what}" if what else "", total=total)
        bar.update(tasks[what], completed=done)

    try:
        yield show
    finally:
        if bar.live.is_started:
            bar.stop()
