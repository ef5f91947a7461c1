"""From a recipe to everything a run consists of: accelerator, model, data, optimizer."""

from __future__ import annotations

import os
import re
import warnings
from collections.abc import Sequence
from dataclasses import dataclass, field
from datetime import timedelta
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from accelerate import Accelerator, DistributedType, InitProcessGroupKwargs
from accelerate.utils import ProjectConfiguration
from torch import nn
from torch.optim.lr_scheduler import LambdaLR

from ..alignment.objective import Objective
from ..batch import REFERENCE
from ..branch.attach import attach
from ..branch.reference_branch import ReferenceBranch
from ..errors import ConfigError, UserError
from ..families.base import Family
from ..flow import Shift
from ..recipes.optimizers import build_optimizer, build_scheduler
from ..recipes.schema import Recipe
from .bad_steps import BadSteps
from .base_model import load_transformer, read_base
from .checkpoint import Progress, Trained
from .datasource import TrainingData, open_data
from .interrupt import together
from .objectives import build_objectives
from .offload import offloaded_checkpoint
from .restore import load_initial_weights
from .step import StepOptions, TrainingStep
from .tracking import say

if TYPE_CHECKING:
    from diffusers.training_utils import EMAModel

PATIENCE = timedelta(hours=2)
"""How long processes wait for each other: one may make sample videos while the others have none to make."""
SHARDED = (DistributedType.FSDP, DistributedType.DEEPSPEED, DistributedType.MEGATRON_LM)


@dataclass
class Run:
    """One training run on one process.

    Attributes:
        recipe: what it was told.
        accelerator: devices, processes, precision, trackers.
        output_dir: its folder.
        module: the training step itself.
        model: the training step as accelerate wrapped it.
        trained: what training changes.
        optimizer: as accelerate wrapped it.
        scheduler: of the learning rates.
        data: training and validation batches.
        progress: how far it is.
        saved: step of the newest whole checkpoint of its folder, where it knows of one.
        bad_steps: those in a row whose loss or gradient was no number.
        left_out_told: the held-out rows of which it was told that they cannot be read.
    """

    recipe: Recipe
    accelerator: Accelerator
    output_dir: Path
    module: TrainingStep
    model: nn.Module
    trained: Trained
    optimizer: Any
    scheduler: LambdaLR
    data: TrainingData
    progress: Progress = field(default_factory=Progress)
    saved: int | None = None
    bad_steps: BadSteps = field(init=False)
    left_out_told: tuple[int, ...] = ()

    def __post_init__(self) -> None:
        self.bad_steps = BadSteps(self.recipe.max_bad_steps)

    def facts(self) -> dict[str, Any]:
        """What a checkpoint keeps of the run itself, as JSON."""
        values = self.recipe.model_dump(exclude={"output_dir", "resume_from_checkpoint"})
        return {**values, "num_processes": self.accelerator.num_processes, "rows": self.data.digest}


def step_seed(seed: int, micro_step: int, process: int) -> int:
    """The seed of one batch on one process, so that a run that is taken up again draws what it would have drawn."""
    return int(np.random.SeedSequence([seed, micro_step, process]).generate_state(1, np.uint32)[0])


def build_accelerator(recipe: Recipe, output_dir: Path) -> Accelerator:
    """The accelerator that recipe and launcher agree on.

    Raises:
        UserError: precision or distribution that this training does not do.
    """
    project = ProjectConfiguration(project_dir=str(output_dir), logging_dir=str(output_dir / recipe.logging_dir))
    accelerator = Accelerator(
        mixed_precision=_precision(recipe),
        gradient_accumulation_steps=recipe.gradient_accumulation_steps,
        log_with=recipe.trackers or None,  # type: ignore[arg-type]
        project_config=project,
        kwargs_handlers=[InitProcessGroupKwargs(timeout=PATIENCE)],
    )
    if accelerator.distributed_type in SHARDED:
        raise UserError(
            f"accelerate: {accelerator.distributed_type.value} is not supported: a frozen base with a small adapter "
            "needs no sharding; launch with --multi_gpu or on one GPU"
        )
    torch.backends.cuda.matmul.allow_tf32 = recipe.allow_tf32
    return accelerator


def _precision(recipe: Recipe) -> str:
    launched = os.environ.get("ACCELERATE_MIXED_PRECISION", "no")
    wanted = recipe.mixed_precision or launched
    if launched not in ("no", wanted):  # "no" is also what the launcher says when it was told nothing
        raise UserError(
            f"mixed_precision: the recipe says {wanted!r} and accelerate launch {launched!r}; "
            "make them agree, or leave it out of the recipe"
        )
    if wanted not in ("no", "bf16"):
        raise UserError(f"mixed_precision must be no or bf16, accelerate launch says {wanted!r}; relaunch with bf16")
    return wanted


def build_run(
    recipe: Recipe,
    accelerator: Accelerator,
    output_dir: Path,
    data: TrainingData | None = None,
    objectives: Sequence[Objective] = (),
) -> Run:
    """Load the base, attach the adapter, open the data, and have accelerate wrap what is trained.

    Args:
        recipe: what the run is told.
        accelerator: see `build_accelerator`.
        output_dir: its folder.
        data: what to train on; None opens the recipe's cache.
        objectives: beside those that the recipe asks for; the cache must hold their targets.

    Raises:
        UserError: a base, cache or adapter that does not exist or does not fit.
    """
    with together(accelerator):
        family, shift = read_base(recipe)
        data = data or open_data(recipe, accelerator, objectives)
        branch = _build_branch(recipe, family, accelerator)
        every = [*build_objectives(recipe, branch, data.widths), *objectives]
        module = TrainingStep(branch, every, step_options(recipe, shift))
        _start_from(recipe.init_adapter, branch, every, accelerator)
        lora = [parameter for _, parameter in branch.named_parameters()]
        optimizer = build_optimizer(recipe, lora, module.objectives.parameters())
        module.train()
    model, wrapped = accelerator.prepare(module, optimizer)
    trained = Trained(branch, every, optimizer, _build_average(recipe, lora))
    scheduler = build_scheduler(recipe, optimizer)
    return Run(recipe, accelerator, output_dir, module, model, trained, wrapped, scheduler, data)


def _start_from(
    source: str | None, branch: ReferenceBranch, objectives: Sequence[Objective], accelerator: Accelerator
) -> None:
    if source:
        found = load_initial_weights(source, branch, objectives)
        for name in [objective.name for objective in objectives if objective.name not in found]:
            of_it = "" if name == REFERENCE else f" of objective {name}"
            say(accelerator, f"init_adapter: no projectors{of_it} lie beside {source!r}, new ones are trained")


def step_options(recipe: Recipe, shift: Shift) -> StepOptions:
    """The training step's options that a recipe asks for."""
    dropout = recipe.dropout_shares()
    return StepOptions(
        timestep_sampling=recipe.flow.timestep_sampling,
        logit_mean=recipe.flow.logit_mean,
        logit_std=recipe.flow.logit_std,
        shift=shift,
        text_dropout=dropout.text,
        reference_dropout=dropout.references,
        both_dropout=dropout.both,
    )


def _build_branch(recipe: Recipe, family: Family, accelerator: Accelerator) -> ReferenceBranch:
    dtype = torch.bfloat16 if accelerator.mixed_precision == "bf16" else torch.float32
    transformer = load_transformer(recipe, family, dtype)
    if recipe.gradient_checkpointing:
        transformer.enable_gradient_checkpointing(offloaded_checkpoint if recipe.offload_activations else None)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".* did not match any targeted module", category=RuntimeWarning)
        branch = attach(transformer, recipe.adapter_config(), family=family, seed=recipe.seed)
    _check_patterns(recipe, branch)
    return branch


def _check_patterns(recipe: Recipe, branch: ReferenceBranch) -> None:
    """Refuse patterns that name no layer with LoRA: a typing error, of which PEFT only warns or says nothing."""
    layers = {name.rpartition(".lora_")[0] for name, _ in branch.named_parameters()}
    section, problems = recipe.adapter, []
    for name in ("rank_pattern", "alpha_pattern"):
        for pattern in getattr(section, name):
            if not any(re.match(rf"(.*\.)?({pattern})$", layer) for layer in layers):  # as PEFT matches them
                problems.append(f"adapter.{name}: {pattern!r} {_NO_LAYER}")
    if isinstance(section.target_modules, list):
        for wanted in section.target_modules:
            if not any(layer == wanted or layer.endswith(f".{wanted}") for layer in layers):
                problems.append(f"adapter.target_modules: {wanted!r} {_NO_LAYER}")
    if problems:
        raise ConfigError(problems)


_NO_LAYER = "matches no layer that gets a LoRA; correct it, or leave it out"


def _build_average(recipe: Recipe, parameters: list[nn.Parameter]) -> EMAModel | None:
    if recipe.ema_decay is None:
        return None
    from diffusers.training_utils import EMAModel  # its module takes seconds to import

    return EMAModel(parameters, decay=recipe.ema_decay)
