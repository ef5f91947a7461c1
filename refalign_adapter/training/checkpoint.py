"""Checkpoints: everything a run needs to go on exactly, as safetensors and JSON, written whole or not at all.

    checkpoint-N/adapter/                           the adapter folder, usable as it is
    checkpoint-N/training/projectors.safetensors    the heads that stay behind
    checkpoint-N/training/optimizer.safetensors     the optimizer's tensors, `parameter/key`
    checkpoint-N/training/ema.safetensors           with a moving average
    checkpoint-N/training/state.json                progress, schedule, the optimizer's numbers, the recipe

No random state is in them: each step's generators are seeded by (seed, step, process). No learning rates either: they
are functions of the step.
"""

from __future__ import annotations

import os
import re
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from ..alignment.schedule import AlignmentSchedule
from ..branch.attach import ReferenceBranch
from ..errors import UserError
from ..export.adapter import adapter_state
from ..export.folder import open_adapter
from ..files import atomic_folder
from ..json_files import read_json, write_json

if TYPE_CHECKING:
    from diffusers.training_utils import EMAModel

ADAPTER, TRAINING = "adapter", "training"
PROJECTORS, OPTIMIZER, EMA, STATE = "projectors.safetensors", "optimizer.safetensors", "ema.safetensors", "state.json"
_NAME = re.compile(r"checkpoint-(\d+)")


@dataclass
class Progress:
    """How far a run is.

    Attributes:
        step: optimizer steps done.
        micro_step: batches done by each process.
        epoch: passes over the data done.
        position: batches of the current pass done by each process.
    """

    step: int = 0
    micro_step: int = 0
    epoch: int = 0
    position: int = 0


@dataclass
class Trained:
    """What training changes.

    Attributes:
        branch: holds the LoRA.
        projectors: None without alignment.
        optimizer: not wrapped by accelerate.
        schedule: of the alignment weight.
        ema: moving average of the LoRA, in the order of `branch.named_parameters()`; None when off.
    """

    branch: ReferenceBranch
    projectors: nn.Module | None
    optimizer: torch.optim.Optimizer
    schedule: AlignmentSchedule
    ema: EMAModel | None = None

    def named_parameters(self) -> Iterator[tuple[str, nn.Parameter]]:
        """All trained parameters: the LoRA's, then the projectors'."""
        yield from self.branch.named_parameters()
        if self.projectors is not None:
            yield from ((f"projectors.{name}", parameter) for name, parameter in self.projectors.named_parameters())


@contextmanager
def averaged_weights(trained: Trained) -> Iterator[None]:
    """The moving average in place of the LoRA's weights inside the context; nothing changes without one."""
    if trained.ema is None:
        yield
        return
    parameters = [parameter for _, parameter in trained.branch.named_parameters()]
    trained.ema.store(parameters)
    trained.ema.copy_to(parameters)
    try:
        yield
    finally:
        trained.ema.restore(parameters)


def save_checkpoint(
    output_dir: Path, trained: Trained, progress: Progress, run: dict[str, Any], limit: int | None = None
) -> Path:
    """Write `checkpoint-{step}`, then delete the oldest beyond `limit`.

    Args:
        output_dir: the run's folder.
        trained: what training changes.
        progress: how far it is.
        run: JSON facts about the run (recipe, number of processes), for `load_checkpoint`'s caller to compare.
        limit: checkpoints to keep; None keeps all.
    """
    folder = output_dir / f"checkpoint-{progress.step}"
    with atomic_folder(folder) as temporary:
        trained.branch.save_pretrained(temporary / ADAPTER)
        (temporary / TRAINING).mkdir()
        save_sidecar(temporary / TRAINING, trained)
        tensors, numbers = _optimizer_state(trained)
        save_file(tensors, temporary / TRAINING / OPTIMIZER)
        state = {**asdict(progress), "run": run, "schedule": trained.schedule.state_dict(), "optimizer": numbers}
        if trained.ema is not None:
            state["ema_steps"] = trained.ema.optimization_step
            names = [name for name, _ in trained.branch.named_parameters()]
            shadow = zip(names, trained.ema.shadow_params, strict=True)
            save_file({name: tensor.contiguous() for name, tensor in shadow}, temporary / TRAINING / EMA)
        write_json(temporary / TRAINING / STATE, state)
    _delete_oldest(output_dir, limit)
    return folder


def save_sidecar(folder: Path, trained: Trained) -> None:
    """Write the projectors, which the adapter does not need and a second training stage does, into `folder`."""
    if trained.projectors is not None:
        state = trained.projectors.state_dict()
        save_file({name: tensor.detach().cpu().contiguous() for name, tensor in state.items()}, folder / PROJECTORS)


def list_checkpoints(output_dir: str | Path) -> list[Path]:
    """The checkpoints in a run's folder, oldest first."""
    if not Path(output_dir).is_dir():
        return []
    found = {int(match[1]): path for path in Path(output_dir).iterdir() if (match := _NAME.fullmatch(path.name))}
    return [found[step] for step in sorted(found)]


def checkpoint_step(folder: Path) -> int:
    """Optimizer steps done at a checkpoint.

    Raises:
        UserError: a damaged one.
    """
    with _damage_told(folder):
        return int(read_json(folder / TRAINING / STATE, "state")["step"])


def find_checkpoint(output_dir: str | Path, which: str | None) -> Path | None:
    """The checkpoint that `resume_from_checkpoint` means: None for null, and for `latest` where there is none yet.

    Raises:
        UserError: a folder that is no checkpoint.
    """
    if which is None:
        return None
    if which == "latest":
        checkpoints = list_checkpoints(output_dir)
        return checkpoints[-1] if checkpoints else None
    if not (Path(which) / TRAINING / STATE).is_file():
        raise UserError(f"resume_from_checkpoint: {which!r} is no checkpoint, it lacks {TRAINING}/{STATE}")
    return Path(which)


def load_checkpoint(folder: Path, trained: Trained) -> tuple[Progress, dict[str, Any]]:
    """Put a checkpoint's state into `trained`; returns how far it was, and its `run`.

    Raises:
        UserError: files missing or damaged, or of a run with another adapter, optimizer or other projectors.
    """
    with _damage_told(folder):
        state = read_json(folder / TRAINING / STATE, "resume_from_checkpoint")
        progress = Progress(**{name: int(state[name]) for name in asdict(Progress())})
        numbers, run, schedule = state["optimizer"], state["run"], state["schedule"]
        tensors = load_file(folder / TRAINING / OPTIMIZER)
        scope, weights = _read_adapter(folder / ADAPTER)
        heads = load_file(folder / TRAINING / PROJECTORS) if trained.projectors is not None else {}
        averaged = "ema_steps" in state and trained.ema is not None
        shadow = load_file(folder / TRAINING / EMA) if averaged else {}
        ema_steps = int(state["ema_steps"]) if averaged else 0
    _check_scope(trained.branch, scope, "resume_from_checkpoint", folder)
    _load_lora(trained.branch, weights, "resume_from_checkpoint", folder)
    _load_projectors(trained.projectors, heads, "resume_from_checkpoint", folder)
    _load_optimizer(trained, tensors, numbers, folder)
    trained.schedule.load_state_dict(schedule)
    if trained.ema is not None:  # a run that had none starts its average here
        trained.ema.shadow_params = [
            shadow.get(name, parameter.detach()).to(parameter.device, copy=True)
            for name, parameter in trained.branch.named_parameters()
        ]
        trained.ema.optimization_step = ema_steps
    return progress, run


def load_initial_weights(source: str, branch: ReferenceBranch, projectors: nn.Module | None) -> bool:
    """Start from another run's adapter, and from its projectors where its sidecar lies beside it.

    Args:
        source: adapter folder or Hub id.
        branch: takes the LoRA's weights.
        projectors: take the sidecar's.

    Returns:
        Whether the projectors were found.

    Raises:
        UserError: no adapter, or one that does not fit.
    """
    folder = open_adapter(source).path
    sidecar = folder.parent / TRAINING / PROJECTORS
    try:
        scope, weights = _read_adapter(folder)
        heads = load_file(sidecar) if projectors is not None and sidecar.is_file() else {}
    except (SafetensorError, OSError, UserError) as error:
        raise UserError(f"init_adapter: {source!r} is damaged ({error})") from None
    _check_scope(branch, scope, "init_adapter", folder)
    _load_lora(branch, weights, "init_adapter", folder)
    if heads:
        _load_projectors(projectors, heads, "init_adapter", sidecar)
    return bool(heads)


@contextmanager
def _damage_told(folder: Path) -> Iterator[None]:
    try:
        yield
    except (SafetensorError, OSError, KeyError, TypeError, ValueError) as error:
        reason = str(error).strip().splitlines()[0]
        raise UserError(
            f"resume_from_checkpoint: {str(folder)!r} is damaged ({reason}); delete it to resume from the one before"
        ) from None


def _delete_oldest(output_dir: Path, limit: int | None) -> None:
    for leftover in [*output_dir.glob(".checkpoint-*.tmp"), *output_dir.glob(".checkpoint-*.old")]:
        shutil.rmtree(leftover, ignore_errors=True)  # of a process that was killed
    for path in list_checkpoints(output_dir)[:-limit] if limit else []:
        hidden = path.with_name(f".{path.name}.{os.getpid()}.old")  # never half a checkpoint under its own name
        os.replace(path, hidden)
        shutil.rmtree(hidden)


def _optimizer_state(trained: Trained) -> tuple[dict[str, Tensor], dict[str, dict[str, Any]]]:
    """The optimizer's state as flat tensors, `parameter/key`, and as numbers by parameter.

    Tensors are cloned: 8-bit optimizers share their quantisation maps, which safetensors refuses.
    """
    tensors, numbers = {}, {}
    for name, parameter in trained.named_parameters():
        state = trained.optimizer.state.get(parameter, {})
        numbers[name] = {key: value for key, value in state.items() if not isinstance(value, Tensor)}
        for key, value in state.items():
            if isinstance(value, Tensor):
                tensors[f"{name}/{key}"] = value.detach().cpu().contiguous().clone()
    return tensors, numbers


def _load_optimizer(
    trained: Trained, tensors: dict[str, Tensor], numbers: dict[str, dict[str, Any]], folder: Path
) -> None:
    names = {parameter: name for name, parameter in trained.named_parameters()}
    ordered = [names[parameter] for group in trained.optimizer.param_groups for parameter in group["params"]]
    if set(ordered) != set(numbers):
        raise UserError(f"resume_from_checkpoint: {str(folder)!r} has the optimizer state of other parameters")
    states: dict[str, dict[str, Any]] = {name: dict(values) for name, values in numbers.items()}
    for path, tensor in tensors.items():
        name, _, key = path.rpartition("/")
        states[name][key] = tensor
    groups = trained.optimizer.state_dict()["param_groups"]
    indexed = {index: states[name] for index, name in enumerate(ordered) if states[name]}
    trained.optimizer.load_state_dict({"state": indexed, "param_groups": groups})


def _read_adapter(folder: Path) -> tuple[str, dict[str, Tensor]]:
    """An adapter folder's LoRA scope, and its weights under PEFT's names."""
    opened = open_adapter(folder)
    return opened.config.lora_scope, opened.tensors()


def _check_scope(branch: ReferenceBranch, scope: str, field: str, folder: Path) -> None:
    """Refuse a LoRA that was trained on other tokens: the same weights do something else there."""
    if scope != branch.config.lora_scope:
        raise UserError(
            f"{field}: {str(folder)!r} has lora_scope {scope!r}, this recipe {branch.config.lora_scope!r}; "
            "use the adapter section it was trained with"
        )


def _load_lora(branch: ReferenceBranch, state: dict[str, Tensor], field: str, folder: Path) -> None:
    from peft import set_peft_model_state_dict

    _check_same(adapter_state(branch.transformer, branch.adapter_name), state, field, folder, "LoRA")
    set_peft_model_state_dict(branch.transformer, state, adapter_name=branch.adapter_name)


def _load_projectors(projectors: nn.Module | None, state: dict[str, Tensor], field: str, folder: Path) -> None:
    if projectors is not None:
        _check_same(projectors.state_dict(), state, field, folder, "projectors")
        projectors.load_state_dict(state)


def _check_same(wanted: dict[str, Tensor], got: dict[str, Tensor], field: str, folder: Path, what: str) -> None:
    """Refuse weights whose names or shapes are not the recipe's, with the first difference."""
    for name in sorted({*wanted, *got}):
        shapes = [tuple(side[name].shape) if name in side else None for side in (wanted, got)]
        if shapes[0] != shapes[1]:
            raise UserError(
                f"{field}: the {what} in {str(folder)!r} do not fit this recipe: {name} is {shapes[1] or 'missing'}, "
                f"here {shapes[0] or 'not known'}; use the adapter section it was trained with"
            )
