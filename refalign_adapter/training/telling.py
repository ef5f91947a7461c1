"""What a run tells when something is wrong that it can live with, or that ends it: which rows, what is kept."""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from accelerate.utils import gather_object

from ..data.cache.dataset import UnreadableRowError
from ..errors import UserError, WriteError
from ..signals import tell
from .bad_steps import listed, names_of, not_finite
from .checkpoint_files import newest_whole
from .setup import Run
from .tracking import say


@contextmanager
def with_what_is_kept(run: Run, kinds: tuple[type[UserError], ...] = (WriteError,)) -> Iterator[None]:
    """A line about what cannot be written or read goes on with what is kept and how to go on.

    Args:
        run: whose checkpoints.
        kinds: of errors.

    Raises:
        UserError: the one that was raised, with that at its end.
    """
    try:
        yield
    except kinds as error:
        raise type(error)(f"{error}; stopped at step {run.progress.step}, {_what_is_kept(run)}") from error


def _what_is_kept(run: Run) -> str:
    if newest := newest_checkpoint(run.output_dir):
        return f"{newest} is whole: then run the same command with resume_from_checkpoint=latest"
    if run.saved:
        return f"checkpoint-{run.saved} was whole and is out of reach now: once it is back, resume from it"
    return "no checkpoint was written yet"


def newest_checkpoint(output_dir: Path) -> str | None:
    """The name of the newest checkpoint, or None."""
    try:
        folder = newest_whole(output_dir)
    except (UserError, OSError):
        return None
    return folder.name if folder else None


def tell_unreadable(run: Run) -> None:
    """List at the end what went by in the middle."""
    if found := run.data.unreadable:
        tell(
            f"{len(found)} of {len(run.data.training)} rows could not be read and others were taken instead: "
            f"{', '.join(found)}; run `refalign cache` with this recipe to make them anew"
        )


def tell_left_out(run: Run) -> str:
    """Tell which held-out rows could not be read, when they are others than before; returns a note on their number.

    Raises:
        UnreadableRowError: none could.
    """
    dataset, accelerator = run.data.validation, run.accelerator
    if dataset is None:
        return ""
    mine = [run.data.left_out]
    gathered: list[dict[int, str]] = gather_object(mine) if accelerator.num_processes > 1 else mine
    left_out = {row: reason for each in gathered for row, reason in sorted(each.items())}
    count = sum(len(group) for group in run.data.groups)
    if not left_out:
        run.left_out_told = ()
        return ""
    named = listed(dataset.entries[row].place(dataset.split) for row in left_out)
    first = next(iter(left_out.values()))
    line = f"{len(left_out)} of {count} held-out rows cannot be read ({named}); the first: {first}"
    if len(left_out) == count:
        raise UnreadableRowError(f"validation: {line}")
    if run.left_out_told != tuple(left_out):
        run.left_out_told = tuple(left_out)
        say(accelerator, f"validation: {line}; the held-out loss is that of the others")
    return f", of {count - len(left_out)} of {count} rows"


def why_not(run: Run, loss: float) -> str:
    """The rows behind a held-out loss that is no number; nothing when it is one."""
    dataset = run.data.validation
    if math.isfinite(loss) or dataset is None:
        return ""
    keys = [dataset.keys[row] for group in run.data.groups for row in group if row not in run.data.left_out]
    if found := not_finite(dataset, keys):
        return f": no numbers are in the cache for row {listed(names_of(dataset, found))}; run refalign cache --verify"
    return f": rows {listed(names_of(dataset, keys))} are fine in the cache; lower learning_rate"
