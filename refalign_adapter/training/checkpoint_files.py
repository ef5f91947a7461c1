"""A run's checkpoint folders: which are there, which of them are whole, which one to take up.

`training/checksums.json`, written last, holds the SHA-256 of every other file. Checkpoints of versions before 0.2 have
none; what their files themselves say is all that is looked at. The `training` folder beside a finished adapter has
checksums of its own.
"""

from __future__ import annotations

import os
import re
import shutil
import stat
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Annotated, Any

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, TypeAdapter, ValidationError

from ..errors import UserError
from ..hashes import file_digest
from ..json_files import read_json, write_json
from ..leftovers import remove_leftovers, temporary_path

ADAPTER, TRAINING = "adapter", "training"
STATE, ROWS, CHECKSUMS = "state.json", "rows.json", "checksums.json"
MAX_ROWS_BYTES = 2**30
"""Of `rows.json`: some 25 million rows."""
MAX_COUNT = 10**12
"""Steps, batches and passes that a run may count to: far beyond any, and far from where numbers overflow."""
_NAME = re.compile(r"checkpoint-(0|[1-9][0-9]{0,11})")

_Count = Annotated[int, Field(ge=0, le=MAX_COUNT)]
_Number = bool | Annotated[int, Field(ge=-(2**63), lt=2**63)] | Annotated[float, Field(allow_inf_nan=False)] | None


def _counted(numbers: dict[str, Any]) -> dict[str, Any]:
    if "step" in numbers:
        TypeAdapter(_Count).validate_python(numbers["step"], strict=True)
    return numbers


_OptimizerNumbers = Annotated[dict[str, _Number], AfterValidator(_counted)]


class CheckpointState(BaseModel):
    """`state.json`: progress, the run's facts, the optimizer's numbers by parameter, and the schedules of the weights
    of reference alignment and, by name, of the objectives beside it."""

    model_config = ConfigDict(extra="ignore", strict=True)

    step: _Count
    micro_step: _Count
    epoch: _Count
    position: _Count
    skipped: _Count = 0
    run: dict[str, Any]
    schedule: dict[str, _Number | str]
    schedules: dict[str, dict[str, _Number | str]] = {}
    optimizer: dict[str, _OptimizerNumbers]
    ema_steps: _Count | None = None


def read_state(folder: Path) -> CheckpointState:
    """A checkpoint's `state.json`.

    Raises:
        UserError: it is not there, or holds what no run writes.
    """
    try:
        state = CheckpointState.model_validate(read_json(folder / TRAINING / STATE, "state"))
    except ValidationError as error:
        first = error.errors()[0]
        place = ".".join(str(part)[:60] for part in first["loc"][:3])
        raise UserError(f"{STATE}: {place}: {first['msg'].splitlines()[0].lower()}") from None
    named = _NAME.fullmatch(folder.name)
    if named and int(named[1]) != state.step:
        raise UserError(f"{STATE} says step {state.step}, the folder's name {named[1]}")
    return state


def read_rows(folder: Path) -> dict[str, list[str]] | None:
    """Keys of a checkpoint's rows, see `save_checkpoint`; None where it does not say, as those of before 0.2."""
    try:
        rows = read_json(folder / TRAINING / ROWS, "rows", max_bytes=MAX_ROWS_BYTES)
    except UserError:
        return None
    if not isinstance(rows, dict) or set(rows) != {"training", "held_out"}:
        return None
    whole = all(isinstance(keys, list) and all(isinstance(key, str) for key in keys) for keys in rows.values())
    return rows if whole else None


def write_checksums(folder: Path) -> None:
    """Write the SHA-256 of every file of a checkpoint into it."""
    write_json(folder / TRAINING / CHECKSUMS, {"sha256": {name: file_digest(path) for name, path in _files(folder)}})


def write_sidecar_checksums(training: Path) -> None:
    """Write the SHA-256 of what lies beside a finished adapter into that folder."""
    sums = {f"{TRAINING}/{path.name}": file_digest(path) for path in sorted(training.iterdir())}
    write_json(training / CHECKSUMS, {"sha256": sums})


def check_sidecar(path: Path) -> None:
    """Compare a file in a `training` folder with its checksum there. Folders of versions before 0.2 have none.

    Raises:
        UserError: it is another, or has none though others do; a reason, with no field in it.
    """
    if (path.parent / CHECKSUMS).exists():
        name = f"{TRAINING}/{path.name}"
        if (digest := _checksums(path.parent.parent).get(name)) is None:
            raise UserError(f"{CHECKSUMS} does not name {path.name}")
        if file_digest(path) != digest:
            raise UserError(f"{name} is not as it was written")


def check_whole(folder: Path) -> None:
    """Compare a checkpoint's files with its checksums.

    Raises:
        UserError: the first thing that is wrong, as a reason: no field and no folder in it.
    """
    if not folder.is_dir():
        raise UserError("no folder")
    if not (folder / TRAINING / STATE).is_file():
        raise UserError(f"it lacks {TRAINING}/{STATE}")
    if (folder / TRAINING / CHECKSUMS).exists():
        sums = _checksums(folder)
        if f"{TRAINING}/{STATE}" not in sums:
            raise UserError(f"{CHECKSUMS} does not name {STATE}")
        for name, digest in sums.items():
            path = folder / name
            try:
                if not stat.S_ISREG(path.stat().st_mode):
                    raise UserError(f"{name} is no file")
                same = file_digest(path) == digest
            except OSError as error:
                raise UserError(f"{name}: {error.strerror}") from None
            if not same:
                raise UserError(f"{name} is not as it was written")
    read_state(folder)


def _checksums(folder: Path) -> dict[str, str]:
    content = read_json(folder / TRAINING / CHECKSUMS, "checksums")
    sums = content.get("sha256") if isinstance(content, dict) else None
    if not isinstance(sums, dict) or not all(isinstance(digest, str) for digest in sums.values()):
        raise UserError(f"{CHECKSUMS} holds no checksums")
    if outside := [name for name in sums if not re.fullmatch(rf"({ADAPTER}|{TRAINING})/[\w.-]+", name)]:
        raise UserError(f"{CHECKSUMS} names {outside[0][:60]!r}, which is no file of a checkpoint")
    return sums


def _files(folder: Path) -> Iterator[tuple[str, Path]]:
    for part in (ADAPTER, TRAINING):
        for path in sorted((folder / part).iterdir()):
            if path.name != CHECKSUMS:
                yield f"{part}/{path.name}", path


def list_checkpoints(output_dir: str | Path) -> list[Path]:
    """The checkpoints in a run's folder, whole or not, oldest first; stray files and other folders are left out."""
    if not Path(output_dir).is_dir():
        return []
    found = {int(match[1]): path for path in Path(output_dir).iterdir() if (match := _NAME.fullmatch(path.name))}
    return [found[step] for step in sorted(found) if (found[step] / TRAINING).is_dir()]


def step_of(folder: Path) -> int:
    """The step that a checkpoint's name says."""
    return int(folder.name.partition("-")[2])


def newest_whole(output_dir: str | Path, told: Callable[[str], None] = lambda _: None) -> Path | None:
    """The newest checkpoint that is whole, or None where there is no checkpoint at all.

    Args:
        output_dir: the run's folder.
        told: gets one line that names what was passed over and why.

    Raises:
        UserError: there are checkpoints, and none is whole.
    """
    passed = []
    for folder in reversed(list_checkpoints(output_dir)):
        try:
            check_whole(folder)
        except UserError as error:
            passed.append(f"{folder.name} ({error})")
            continue
        if passed:
            told(f"resume_from_checkpoint: passed over {', '.join(passed)}: damaged; {folder.name} is whole")
        return folder
    if passed:
        raise UserError(
            f"resume_from_checkpoint: no checkpoint in {str(output_dir)!r} is whole: {', '.join(passed)}; delete them "
            "to begin anew"
        )
    return None


def find_checkpoint(
    output_dir: str | Path, which: str | None, told: Callable[[str], None] = lambda _: None
) -> Path | None:
    """The checkpoint that `resume_from_checkpoint` means: None for null, and for `latest` where there is none yet.

    Args:
        output_dir: the run's folder.
        which: null, `latest` for the newest whole one, or a folder.
        told: gets a line about damaged ones that were passed over.

    Raises:
        UserError: a folder that is no checkpoint or a damaged one.
    """
    if which is None:
        return None
    if which == "latest":
        return newest_whole(output_dir, told)
    folder = Path(which)
    if not (folder / TRAINING / STATE).is_file():
        raise UserError(f"resume_from_checkpoint: {which!r} is no checkpoint, it lacks {TRAINING}/{STATE}")
    try:
        check_whole(folder)
    except UserError as error:
        raise damaged(folder, error) from None
    return folder


def damaged(folder: Path, reason: object) -> UserError:
    """The line for a checkpoint that cannot be taken up."""
    line = (str(reason).strip().splitlines() or ["empty"])[0]
    return UserError(
        f"resume_from_checkpoint: {str(folder)!r} is damaged ({line}); delete it to resume from the one before"
    )


def make_room(folder: Path) -> None:
    """Set aside a file or link that stands where a checkpoint is to be written; it is not ours to delete."""
    if folder.is_symlink() or (folder.exists() and not folder.is_dir()):
        os.replace(folder, folder.with_name(f"{folder.name}.aside"))


def delete_oldest(output_dir: Path, step: int, limit: int | None) -> None:
    """Delete what killed processes left, and the oldest checkpoints up to `step` beyond the newest `limit`."""
    remove_leftovers(output_dir)
    done = [path for path in list_checkpoints(output_dir) if step_of(path) <= step]
    for path in done[:-limit] if limit else []:
        if path.is_symlink():
            path.unlink()
            continue
        hidden = temporary_path(path, "tmp")  # never half a checkpoint under its own name
        os.replace(path, hidden)
        shutil.rmtree(hidden, ignore_errors=True)
