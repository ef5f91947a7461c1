"""Checkpoints and adapters back into a run. Everything is read and compared before the first weight is changed."""

from __future__ import annotations

import copy
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from ..alignment.objective import Objective
from ..alignment.schedule import AlignmentSchedule
from ..batch import REFERENCE
from ..branch.reference_branch import ReferenceBranch
from ..config_checks import MAX_NAME
from ..errors import UserError, shorten
from ..export.adapter import adapter_state
from ..export.folder import AdapterFolder, open_adapter
from ..export.layers import layers_of
from ..recipes.optimizers import find_optimizer
from .checkpoint import EMA, LORA, OPTIMIZER, PROJECTORS, Progress, Trained
from .checkpoint_files import ADAPTER, TRAINING, CheckpointState, check_sidecar, damaged, read_state
from .objectives import HEADS, heads_state, load_heads, objective_of

SAME = ("lora_scope", "attention", "r", "lora_alpha")
"""What the same weights mean another adapter without."""
FIELD = "resume_from_checkpoint"
Numbers = dict[str, dict[str, Any]]


def load_checkpoint(folder: Path, trained: Trained) -> tuple[Progress, dict[str, Any]]:
    """Put a checkpoint's state into `trained`; returns how far it was, and its `run`.

    Raises:
        UserError: files missing or damaged, or of a run with another adapter, optimizer or other projectors; nothing
            was changed then.
    """
    with _damage_told(folder):
        state = read_state(folder)
    _check_kinds(trained, state, folder)
    with _damage_told(folder):
        tensors = load_file(folder / TRAINING / OPTIMIZER)
        adapter = open_adapter(folder / ADAPTER)
        lora = adapter.tensors()
        if (raw := folder / TRAINING / LORA).is_file():  # the adapter holds the average
            lora = _with_peft_names(load_file(raw), trained.branch.adapter_name)
        heads = load_file(folder / TRAINING / PROJECTORS) if heads_state(trained.objectives) else {}
        averaged = state.ema_steps is not None and trained.ema is not None
        shadow = load_file(folder / TRAINING / EMA) if averaged else {}
        _check_finite(lora, heads, shadow)
    _check_config(trained.branch, adapter, FIELD, folder)
    _check_lora(trained.branch, lora, FIELD, folder)
    _check_heads(trained.objectives, heads, FIELD, folder)
    optimizer = _optimizer_state(trained, tensors, state, folder)
    with _damage_told(folder):
        schedules = [_schedule(objective, state) for objective in trained.objectives]
    _load_lora(trained.branch, lora)
    load_heads(trained.objectives, heads)
    for objective, schedule in zip(trained.objectives, schedules, strict=True):
        objective.schedule = schedule
    trained.optimizer.load_state_dict(optimizer)
    if trained.ema is not None:  # a run that had none starts its average here
        trained.ema.shadow_params = [
            shadow.get(name, parameter.detach()).to(parameter.device, copy=True)
            for name, parameter in trained.branch.named_parameters()
        ]
        trained.ema.optimization_step = (state.ema_steps or 0) if averaged else 0
    return Progress(state.step, state.micro_step, state.epoch, state.position, state.skipped), state.run


def load_initial_weights(source: str, branch: ReferenceBranch, objectives: Sequence[Objective]) -> set[str]:
    """Start from another run's adapter, and from the objectives' heads that lie beside it.

    Args:
        source: adapter folder or Hub id.
        branch: takes the LoRA's weights.
        objectives: take the heads that were trained for the same objective; those of others are left alone.

    Returns:
        Names of the objectives whose heads were found.

    Raises:
        UserError: no adapter, or one that does not fit.
    """
    try:
        adapter = open_adapter(source)
        sidecar = adapter.path.parent / TRAINING / PROJECTORS
        lora = adapter.tensors()
        heads = _sidecar(sidecar) if objectives and sidecar.is_file() else {}
        _check_finite(lora, heads)
    except (SafetensorError, OSError, UserError) as error:
        raise UserError(f"init_adapter: {source!r} cannot be started from ({_first_line(error)})") from None
    _check_config(branch, adapter, "init_adapter", adapter.path)
    _check_lora(branch, lora, "init_adapter", adapter.path)
    there = {objective_of(name) for name in heads}
    found = [objective for objective in objectives if objective.name in there]
    names = {objective.name for objective in found}
    own = {name: tensor for name, tensor in heads.items() if objective_of(name) in names}
    _check_heads(found, own, "init_adapter", sidecar)
    _load_lora(branch, lora)
    load_heads(found, own)
    return names


def _sidecar(path: Path) -> dict[str, Tensor]:
    """The projectors beside an adapter.

    Raises:
        UserError: they are damaged, with the way out.
    """
    try:
        check_sidecar(path)
        return load_file(path)
    except (SafetensorError, OSError, UserError) as error:
        raise UserError(
            f"its projectors, {str(path)!r}: {_first_line(error)}; copy them again, or delete them to train new ones"
        ) from None


def _first_line(error: BaseException) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0]


@contextmanager
def _damage_told(folder: Path) -> Iterator[None]:
    try:
        yield
    except (SafetensorError, OSError, KeyError, TypeError, ValueError, AttributeError, OverflowError) as error:
        raise damaged(folder, _first_line(error)) from None


def _with_peft_names(state: dict[str, Tensor], adapter_name: str) -> dict[str, Tensor]:
    """Parameters' names in the transformer -> names in an adapter, which lack the adapter's own."""
    return {name.replace(f".{adapter_name}.", ".", 1): tensor for name, tensor in state.items()}


def _check_finite(*states: dict[str, Tensor]) -> None:
    for name, tensor in (item for state in states for item in state.items()):
        if tensor.is_floating_point() and not bool(torch.isfinite(tensor).all()):
            raise UserError(f"{name} holds what is no number")


def check_optimizer(optimizer: type, state: CheckpointState, folder: Path) -> None:
    """Refuse the state of another optimizer.

    Args:
        optimizer: the class that is to go on with it.
        state: a checkpoint's; older ones do not say what they are of.
        folder: where it lies.

    Raises:
        UserError: it is another's; with the way out.
    """
    before = state.run.get("optimizer")
    if not isinstance(before, str | None) or len(before or "") > MAX_NAME:
        raise damaged(folder, f"its optimizer is {shorten(before)}")
    if before is not None and _class_of(before) is not optimizer:
        raise UserError(
            f"{FIELD}: {str(folder)!r} has the state of optimizer {before!r}, this recipe's is {optimizer.__name__}; "
            f"set optimizer={before}, {_anew(folder)}"
        )


def _anew(folder: Path) -> str:
    return f"or start anew from its weights with init_adapter={str(folder / ADAPTER)!r} and another output_dir"


def _check_kinds(trained: Trained, state: CheckpointState, folder: Path) -> None:
    """Refuse the state of another optimizer, or of a run with an objective in one without it and the reverse."""
    check_optimizer(type(trained.optimizer), state, folder)
    there = {objective_of(name.removeprefix(HEADS)) for name in state.optimizer if name.startswith(HEADS)}
    ours = {objective_of(name) for name in heads_state(trained.objectives)}
    for name in sorted(there ^ ours):
        then, here = ("with", "without") if name in there else ("without", "with")
        what, remedy = _told(name)
        raise UserError(
            f"{FIELD}: {str(folder)!r} was trained {then} {what}, this recipe is {here} it; {remedy}, {_anew(folder)}"
        )


def _told(objective: str) -> tuple[str, str]:
    """What an objective is called, and how a run has it again."""
    if objective == REFERENCE:
        fields = "alignment.weight and adapter.align_layers"
        return "alignment", f"make {fields} what they were (cutoff_step ends the alignment at a step)"
    return f"objective {shorten(objective)}", "train with the objectives it was trained with"


def _class_of(optimizer: str) -> type[torch.optim.Optimizer] | None:
    """The optimizer of that name; None where it is not known here, being another library's version's."""
    try:
        return find_optimizer(optimizer)
    except UserError:
        return None


def _schedule(objective: Objective, state: CheckpointState) -> AlignmentSchedule:
    """The schedule that the objective was trained with.

    Raises:
        KeyError, ConfigError: there is none, or one that cannot be.
    """
    schedule = copy.copy(objective.schedule)
    schedule.load_state_dict(state.schedule if objective.name == REFERENCE else state.schedules[objective.name])
    return schedule


def _optimizer_state(
    trained: Trained, tensors: dict[str, Tensor], state: CheckpointState, folder: Path
) -> dict[str, Any]:
    """What `Optimizer.load_state_dict` takes.

    Raises:
        UserError: it is of other parameters.
    """
    names = {parameter: name for name, parameter in trained.named_parameters()}
    ordered = [names[parameter] for group in trained.optimizer.param_groups for parameter in group["params"]]
    states: Numbers = {name: dict(values) for name, values in state.optimizer.items()}
    with _damage_told(folder):
        if set(ordered) != set(states):
            raise UserError("the optimizer's state is of other parameters")
        for path, tensor in tensors.items():
            name, _, key = path.rpartition("/")
            states[name][key] = tensor
    groups = trained.optimizer.state_dict()["param_groups"]
    indexed = {index: states[name] for index, name in enumerate(ordered) if states[name]}
    return {"state": indexed, "param_groups": groups}


def _check_config(branch: ReferenceBranch, adapter: AdapterFolder, field: str, folder: Path) -> None:
    """Refuse a LoRA that was trained as part of another adapter: the same weights do something else there."""
    pairs = {name: (getattr(adapter.config, name), getattr(branch.config, name)) for name in SAME}
    own = layers_of(branch.transformer, branch.adapter_name)
    pairs |= {f"the rank and alpha of {name}": (lora, own.get(name, lora)) for name, lora in adapter.layers.items()}
    for name, (there, here) in pairs.items():
        if there != here:
            raise UserError(
                f"{field}: {str(folder)!r} has {name} {there!r}, this recipe {here!r}; "
                "use the adapter section it was trained with"
            )


def _check_lora(branch: ReferenceBranch, state: dict[str, Tensor], field: str, folder: Path) -> None:
    _check_same(adapter_state(branch.transformer, branch.adapter_name), state, field, folder, "LoRA")


def _load_lora(branch: ReferenceBranch, state: dict[str, Tensor]) -> None:
    from peft import set_peft_model_state_dict

    set_peft_model_state_dict(branch.transformer, state, adapter_name=branch.adapter_name)


def _check_heads(objectives: Sequence[Objective], state: dict[str, Tensor], field: str, folder: Path) -> None:
    _check_same(heads_state(objectives), state, field, folder, "projectors")


def _check_same(wanted: dict[str, Tensor], got: dict[str, Tensor], field: str, folder: Path, what: str) -> None:
    """Refuse weights whose names or shapes are not the recipe's, with the first difference."""
    for name in sorted({*wanted, *got}):
        shapes = [tuple(side[name].shape) if name in side else None for side in (wanted, got)]
        if shapes[0] != shapes[1]:
            raise UserError(
                f"{field}: the {what} in {str(folder)!r} do not fit this recipe: {name} is {shapes[1] or 'missing'}, "
                f"here {shapes[0] or 'not known'}; use the adapter section it was trained with"
            )
