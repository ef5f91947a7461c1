"""Where a run begins: anew, or at a checkpoint, with a word on what has changed since."""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path

from ..errors import UserError, shorten
from ..recipes.file import changes
from ..recipes.optimizers import build_scheduler, find_optimizer
from ..recipes.schema import Recipe
from .checkpoint_files import check_whole, find_checkpoint, list_checkpoints, read_rows, read_state, step_of
from .restore import check_optimizer, load_checkpoint
from .setup import Run
from .tracking import say

ORDER_FIELDS = {
    "num_processes",
    "seed",
    "train_batch_size",
    "data.train_data",
    "data.cache_dir",
    "data.validation_rows",
    "rows",
}
"""What decides in which order samples come."""


def starting_point(recipe: Recipe, output_dir: Path, told: Callable[[str], None]) -> Path | None:
    """The checkpoint to take up, or None.

    Args:
        recipe: says which.
        output_dir: the run's folder.
        told: gets a line about damaged checkpoints that are passed over.

    Raises:
        UserError: no such checkpoint, one with the state of another optimizer, or checkpoints of another run in the
            way, which would be taken for this one's.
    """
    which = recipe.resume_from_checkpoint
    folder = find_checkpoint(output_dir, which, told)
    if folder is not None:  # before the base is loaded, which takes minutes
        check_optimizer(find_optimizer(recipe.optimizer), read_state(folder), folder)
    if which == "latest":  # what is later is damaged
        return folder
    step = read_state(folder).step if folder is not None else 0
    later = [path.name for path in list_checkpoints(output_dir) if step_of(path) > step and _is_whole(path)]
    if later:
        raise UserError(
            f"output_dir: {str(output_dir)!r} holds {later[-1]} of an earlier run; set resume_from_checkpoint=latest "
            "to go on with it, choose another folder, or delete it"
        )
    return folder


def _is_whole(folder: Path) -> bool:
    try:
        check_whole(folder)
    except UserError:
        return False
    return True


def resume(run: Run, folder: Path) -> None:
    """Take up a checkpoint, and tell what has changed since.

    Raises:
        UserError: a damaged checkpoint or one that does not fit.
    """
    recipes = [copy.copy(objective.schedule) for objective in run.trained.objectives]
    run.progress, before = load_checkpoint(folder, run.trained)
    if folder.parent.resolve() == run.output_dir.resolve():
        run.saved = run.progress.step
    before.setdefault("rows", run.data.digest)  # older checkpoints do not say
    run.scheduler = build_scheduler(run.recipe, run.trained.optimizer, run.progress.step)
    say(run.accelerator, f"resumed from {folder} at step {run.progress.step}")
    changed = changes(before, run.facts())
    if line := _rows_changed(read_rows(folder), run, known=all(name != "rows" for name, _, _ in changed)):
        say(run.accelerator, f"resume_from_checkpoint: {line}")
    if others := [change for change in changed if change[0] != "rows"]:
        listed = ", ".join(f"{name} {shorten(old)} → {shorten(new)}" for name, old, new in others)
        say(run.accelerator, f"changed since then: {listed}")
    sections = {name.partition(".")[0] for name, _, _ in changed}
    for objective, schedule in zip(run.trained.objectives, recipes, strict=True):
        if objective.section in sections:
            objective.schedule = schedule
    if order := ORDER_FIELDS.intersection(name for name, _, _ in changed):
        run.progress.position = 0
        if "rows" not in order:  # else it has been told
            say(run.accelerator, "so the order of the samples is another one: the pass over the data starts again")


def _rows_changed(before: dict[str, list[str]] | None, run: Run, *, known: bool) -> str | None:
    """What has happened to a run's rows since a checkpoint, and what that means; None when nothing has.

    It is no mistake to go on with more data; but what a resumed run promises does not hold then.

    Args:
        before: see `read_rows`.
        run: with its rows of now.
        known: whether the training rows are known to be the same.
    """
    meaning = "their order is another one, the pass over the data starts again, and the run is no longer bit for bit "
    meaning += "what it would have been"
    if before is None:
        return None if known else f"training rows are others than then, or in another order: {meaning}"
    now, parts = run.data.rows, []
    if before["training"] != now["training"]:
        parts.append(f"training rows: {_difference(before['training'], now['training'])}: {meaning}")
    if before["held_out"] != now["held_out"]:
        line = f"held-out rows: {_difference(before['held_out'], now['held_out'])}: their losses do not compare with "
        line += "earlier ones"
        if seen := set(now["held_out"]) & set(before["training"]):
            line += f", and {len(seen)} of these rows have been trained on"
        parts.append(line)
    return "the rows have changed since; " + "; ".join(parts) if parts else None


def _difference(before: list[str], now: list[str]) -> str:
    removed, added = len(set(before) - set(now)), len(set(now) - set(before))
    if not removed and not added:
        return f"the same {len(now)} in another order"
    kept = [[key for key in keys if key in other] for keys, other in ((before, set(now)), (now, set(before)))]
    reordered = "" if kept[0] == kept[1] else ", the others in another order"
    return f"{removed} removed, {added} added, {len(now)} now{reordered}"
