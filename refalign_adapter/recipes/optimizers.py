"""Optimizers by name (torch's and bitsandbytes'), parameter groups, learning-rate schedules.

The 8-bit optimizers are bitsandbytes' (arXiv 2110.02861); the schedules are diffusers'.
"""

from __future__ import annotations

import difflib
import inspect
from collections.abc import Iterable
from importlib.util import find_spec
from typing import TYPE_CHECKING, Any

import torch
from torch import nn
from torch.optim.lr_scheduler import LambdaLR

from ..errors import UserError

if TYPE_CHECKING:
    from .schema import Recipe

UNSUITABLE = {"lbfgs", "sparseadam"}
"""LBFGS evaluates the loss itself, SparseAdam takes sparse gradients only."""


def find_optimizer(name: str) -> type[torch.optim.Optimizer]:
    """The optimizer class of a name, looked up in torch.optim, then in bitsandbytes.optim.

    Case, hyphens and underscores do not matter: adamw8bit, adamw_8bit and AdamW8bit are one.

    Raises:
        UserError: no such class, or one of bitsandbytes while that is not installed.
    """
    wanted = _plain(name)
    if wanted in UNSUITABLE:
        raise UserError(f"optimizer: {name!r} does not fit this training loop; use adamw8bit or adamw")
    if found := _classes(torch.optim).get(wanted):
        return found
    if find_spec("bitsandbytes") is None:
        raise UserError(
            f"optimizer: {name!r} is none of torch's, and bitsandbytes is not installed; "
            "pip install 'refalign-adapter[train]', or use adamw"
        )
    import bitsandbytes

    classes = _classes(torch.optim) | _classes(bitsandbytes.optim)
    if wanted not in classes:
        close = difflib.get_close_matches(wanted, classes, n=1)
        hint = f"; did you mean {close[0]}?" if close else ""
        raise UserError(f"optimizer: {name!r} is in neither torch.optim nor bitsandbytes.optim{hint}")
    return classes[wanted]


def _plain(name: str) -> str:
    return name.lower().replace("_", "").replace("-", "")


def _classes(module: Any) -> dict[str, type[torch.optim.Optimizer]]:
    members = inspect.getmembers(module, lambda value: isinstance(value, type))
    return {
        _plain(name): cls
        for name, cls in members
        if issubclass(cls, torch.optim.Optimizer)
        and cls is not torch.optim.Optimizer
        and _plain(name) not in UNSUITABLE
    }


def build_optimizer(
    recipe: Recipe, lora: Iterable[nn.Parameter], projectors: Iterable[nn.Parameter]
) -> torch.optim.Optimizer:
    """The recipe's optimizer with a group for the LoRA and, where there are projectors, one for them.

    Betas, epsilon, weight decay and `min_8bit_size` are given to optimizers that take them.

    Raises:
        UserError: no such optimizer, or one that refuses the recipe's numbers.
    """
    cls = find_optimizer(recipe.optimizer)
    groups: list[dict[str, Any]] = [{"params": list(lora), "lr": recipe.learning_rate}]
    if heads := list(projectors):
        groups.append({"params": heads, "lr": recipe.projector_learning_rate or recipe.learning_rate})
    wanted = {
        "betas": (recipe.adam_beta1, recipe.adam_beta2),
        "eps": recipe.adam_epsilon,
        "weight_decay": recipe.adam_weight_decay,
        "min_8bit_size": recipe.min_8bit_size,
    }
    defaults = {name: item.default for name, item in inspect.signature(cls.__init__).parameters.items()}
    taken = {name: value for name, value in wanted.items() if name in defaults and _alike(defaults[name], value)}
    try:
        return cls(groups, lr=recipe.learning_rate, **taken)  # type: ignore[call-arg]
    except (TypeError, ValueError) as error:
        raise UserError(f"optimizer: {recipe.optimizer!r} cannot be made ({error})") from None


def _alike(default: Any, value: Any) -> bool:
    """Whether a value is of its argument's kind: Adafactor's eps is a pair, AdEMAMix's betas are three."""
    numbers, given = (item if isinstance(item, tuple) else (item,) for item in (default, value))
    return len(numbers) == len(given)


def build_scheduler(recipe: Recipe, optimizer: torch.optim.Optimizer, step: int = 0) -> LambdaLR:
    """The learning rates' schedule, at `step` optimizer steps done; to be stepped once per optimizer step.

    Every schedule is a function of the step, so that none of its state needs to be saved.
    """
    from diffusers.optimization import get_scheduler

    rates = [recipe.learning_rate, recipe.projector_learning_rate or recipe.learning_rate]
    for group, rate in zip(optimizer.param_groups, rates, strict=False):
        group["initial_lr"] = group["lr"] = rate
    return get_scheduler(
        recipe.lr_scheduler,
        optimizer,
        num_warmup_steps=recipe.lr_warmup_steps,
        num_training_steps=recipe.max_train_steps,
        num_cycles=recipe.lr_num_cycles,
        power=recipe.lr_power,
        last_epoch=step - 1,
    )
