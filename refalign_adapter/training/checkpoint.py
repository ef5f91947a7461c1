"""Checkpoints: everything a run needs to go on exactly, as safetensors and JSON, written whole or not at all.

    checkpoint-N/adapter/                           the adapter folder, usable as it is: what samples and held-out
                                                    losses show, so with a moving average the averaged weights
    checkpoint-N/training/lora.safetensors          with a moving average: the weights themselves, to go on from
    checkpoint-N/training/projectors.safetensors    the heads that stay behind
    checkpoint-N/training/optimizer.safetensors     the optimizer's tensors, `parameter/key`
    checkpoint-N/training/ema.safetensors           with a moving average
    checkpoint-N/training/state.json                progress, schedule, the optimizer's numbers, the recipe
    checkpoint-N/training/rows.json                 keys of the training and held-out rows, in their order
    checkpoint-N/training/checksums.json            SHA-256 of all of them, see `checkpoint_files`

No random state is in them: each step's generators are seeded by (seed, step, process). No learning rates either: they
are functions of the step.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from ..alignment.objective import Objective
from ..atomic import atomic_folder
from ..branch.reference_branch import ReferenceBranch
from ..files import writing
from ..json_files import write_json
from ..tensor_files import save_tensors
from .checkpoint_files import ADAPTER, ROWS, STATE, TRAINING, delete_oldest, make_room, write_checksums
from .objectives import HEADS, heads_state, named_heads, schedules_of

if TYPE_CHECKING:
    from diffusers.training_utils import EMAModel

PROJECTORS, OPTIMIZER, EMA, LORA = (f"{name}.safetensors" for name in ("projectors", "optimizer", "ema", "lora"))


@dataclass
class Progress:
    """How far a run is.

    Attributes:
        step: optimizer steps done.
        micro_step: batches done by each process.
        epoch: passes over the data done.
        position: batches of the current pass done by each process.
        skipped: steps among them whose loss or gradient was no number, so that nothing was trained.
    """

    step: int = 0
    micro_step: int = 0
    epoch: int = 0
    position: int = 0
    skipped: int = 0


@dataclass
class Trained:
    """What training changes.

    Attributes:
        branch: holds the LoRA.
        objectives: what is added to the flow loss, with heads and the schedules of their weights.
        optimizer: not wrapped by accelerate.
        ema: moving average of the LoRA, in the order of `branch.named_parameters()`; None when off.
    """

    branch: ReferenceBranch
    objectives: Sequence[Objective]
    optimizer: torch.optim.Optimizer
    ema: EMAModel | None = None

    def named_parameters(self) -> Iterator[tuple[str, nn.Parameter]]:
        """All trained parameters: the LoRA's, then the objectives'."""
        yield from self.branch.named_parameters()
        yield from ((f"{HEADS}{name}", parameter) for name, parameter in named_heads(self.objectives))


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
    output_dir: Path,
    trained: Trained,
    progress: Progress,
    run: dict[str, Any],
    limit: int | None = None,
    rows: Mapping[str, list[str]] | None = None,
) -> Path:
    """Write `checkpoint-{step}`, then delete the oldest beyond `limit`.

    Args:
        output_dir: the run's folder.
        trained: what training changes.
        progress: how far it is.
        run: JSON facts about the run (recipe, number of processes), for `load_checkpoint`'s caller to compare.
        limit: checkpoints to keep; None keeps all.
        rows: "training" and "held_out" -> keys, by which a resumed run tells what has changed; None: not known.

    Raises:
        WriteError: it cannot be written; those before are as they were.
    """
    folder = output_dir / f"checkpoint-{progress.step}"
    with atomic_folder(_free(folder)) as temporary:
        with averaged_weights(trained):
            trained.branch.save_pretrained(temporary / ADAPTER)
        (temporary / TRAINING).mkdir()
        save_sidecar(temporary / TRAINING, trained)
        tensors, numbers = _optimizer_state(trained)
        save_tensors(temporary / TRAINING / OPTIMIZER, tensors)
        state = {**asdict(progress), "run": run, **schedules_of(trained.objectives), "optimizer": numbers}
        if trained.ema is not None:
            state["ema_steps"] = trained.ema.optimization_step
            lora = dict(trained.branch.named_parameters())
            _save(temporary / TRAINING / LORA, lora)
            _save(temporary / TRAINING / EMA, dict(zip(lora, trained.ema.shadow_params, strict=True)))
        write_json(temporary / TRAINING / STATE, state)
        if rows is not None:
            write_json(temporary / TRAINING / ROWS, rows)
        write_checksums(temporary)
    delete_oldest(output_dir, progress.step, limit)
    return folder


def save_sidecar(folder: Path, trained: Trained) -> None:
    """Write the objectives' heads, which the adapter does not need and a second training stage does, into `folder`."""
    if heads := heads_state(trained.objectives):
        _save(folder / PROJECTORS, heads)


def _free(folder: Path) -> Path:
    with writing(folder):
        make_room(folder)
    return folder


def _save(path: Path, tensors: Mapping[str, Tensor]) -> None:
    save_tensors(path, {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()})


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
