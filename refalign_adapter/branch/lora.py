"""The LoRA of the reference branch: put on a frozen transformer, take off again without a trace."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn

from ..config import RefAlignConfig
from ..config_checks import expression_problems
from ..errors import ConfigError, UserError


@contextmanager
def _seeded(seed: int | None) -> Iterator[None]:
    if seed is None:
        yield
        return
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        yield


def active_adapters(transformer: Any) -> list[str]:
    """Names of the adapters that are switched on, oldest first; empty without PEFT."""
    return list(transformer.active_adapters()) if getattr(transformer, "peft_config", None) else []


def lora_parameters(transformer: Any, adapter_name: str) -> Iterator[tuple[str, nn.Parameter]]:
    """The adapter's own parameters with their names in the transformer."""
    for name, parameter in transformer.named_parameters():
        if f".{adapter_name}." in name or name.endswith(f".{adapter_name}"):
            yield name, parameter


def add_lora(
    transformer: Any, config: RefAlignConfig, adapter_name: str, seed: int | None, excluded: Sequence[str] = ()
) -> None:
    """Freeze the transformer and add a trainable LoRA in float32, keeping other adapters switched on.

    Args:
        transformer: the DiT.
        config: of the LoRA.
        adapter_name: its name in PEFT.
        seed: of its initial weights; None draws from torch's global generator.
        excluded: names of layers that get none, though `target_modules` match them.

    Raises:
        UserError: the name is taken, a pattern is no regular expression, or `target_modules` match nothing.
    """
    from peft import LoraConfig

    if adapter_name in getattr(transformer, "peft_config", {}):
        raise UserError(
            f"adapter_name: {adapter_name!r} is in use on this transformer; choose another or detach it first"
        )
    if problems := list(expression_problems(vars(config))):
        raise ConfigError(problems)
    modules = config.target_modules
    lora = LoraConfig(
        r=config.r,
        lora_alpha=config.lora_alpha,  # type: ignore[arg-type]  # peft scales by a float just as well
        lora_dropout=config.lora_dropout,
        target_modules=modules if isinstance(modules, str) else list(modules or ()),
        rank_pattern=dict(config.rank_pattern),
        alpha_pattern=dict(config.alpha_pattern),
        exclude_modules=list(excluded) or None,
    )
    others = active_adapters(transformer)
    trainable = trainable_state(transformer)
    try:
        with _seeded(seed):
            transformer.add_adapter(lora, adapter_name=adapter_name)
    except ValueError as error:
        remove_lora(transformer, adapter_name)
        restore_trainable(transformer, trainable)
        raise UserError(f"target_modules: {config.target_modules!r} do not fit this transformer ({error})") from None
    if others:
        transformer.set_adapter([*others, adapter_name])
    own = {name for name, _ in lora_parameters(transformer, adapter_name)}
    for name, parameter in transformer.named_parameters():
        parameter.requires_grad_(name in own)
        if name in own:  # a bf16 base makes bf16 LoRA, too coarse for small updates
            parameter.data = parameter.data.float()


def trainable_state(transformer: Any) -> dict[str, bool]:
    """Which parameters require gradients, by their names without PEFT's wrappers."""
    return {_unwrapped(name): parameter.requires_grad for name, parameter in transformer.named_parameters()}


def restore_trainable(transformer: Any, state: dict[str, bool]) -> None:
    """Undo what has become trainable or frozen since `trainable_state`; parameters that are new stay as they are."""
    for name, parameter in transformer.named_parameters():
        parameter.requires_grad_(state.get(_unwrapped(name), parameter.requires_grad))


def _unwrapped(name: str) -> str:
    return name.replace(".base_layer.", ".")


def remove_lora(transformer: Any, adapter_name: str) -> None:
    """Delete one adapter; layers that carried no other are the original modules again, and others act as before."""
    others = [name for name in active_adapters(transformer) if name != adapter_name]
    known = set(getattr(transformer, "peft_config", ()))
    if not known - {adapter_name}:
        transformer.unload_lora()
        return
    if adapter_name not in known:  # it holds no LoRA
        return
    transformer.set_adapter(others)  # before: PEFT would switch on one that is off in the place of the last that acts
    _unwrap_layers(transformer, adapter_name)  # before: diffusers renews group offloading after its deletion
    transformer.delete_adapters(adapter_name)


def _unwrap_layers(transformer: Any, adapter_name: str) -> None:
    """Put the original modules back where the adapter is the only one."""
    from peft.tuners.tuners_utils import BaseTunerLayer

    for name, layer in list(transformer.named_modules()):
        if not isinstance(layer, BaseTunerLayer):
            continue
        if {key for kind in layer.adapter_layer_names for key in getattr(layer, kind)} <= {adapter_name}:
            parent, _, child = name.rpartition(".")
            setattr(transformer.get_submodule(parent), child, layer.get_base_layer())
