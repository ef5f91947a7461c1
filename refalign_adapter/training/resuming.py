"""Where a run begins: anew, or at a checkpoint, with a word on what has changed since."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from ..errors import UserError
from ..recipes.file import changes
from ..recipes.optimizers import build_scheduler, find_optimizer
from ..recipes.schema import Recipe
from .checkpoint_files import check_whole, find_checkpoint, list_checkpoints, read_state, step_of
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
    run.progress, before = load_checkpoint(folder, run.trained)
    if folder.parent.resolve() == run.output_dir.resolve():
        run.saved = run.progress.step
    before.setdefault("rows", run.data.digest)  # older checkpoints do not say
    run.scheduler = build_scheduler(run.recipe, run.trained.optimizer, run.progress.step)
    say(run.accelerator, f"resumed from {folder} at step {run.progress.step}")
    if changed := changes(before, run.facts()):
        listed = ", ".join(f"{name} {old!r} → {new!r}" for name, old, new in changed)
        say(run.accelerator, f"changed since then: {listed}")
    if any(name.startswith("alignment.") for name, _, _ in changed):
        run.trained.schedule = run.recipe.alignment_schedule()
    if any(name in ORDER_FIELDS for name, _, _ in changed):
        run.progress.position = 0
        say(run.accelerator, "so the order of the samples is another one: the pass over the data starts again")
