"""The LoRA of the reference branch: put on a frozen transformer, take off again without a trace."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn

from ..config import RefAlignConfig
from ..errors import UserError


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
        UserError: the name is taken, or `target_modules` match nothing.
    """
    from peft import LoraConfig

    if adapter_name in getattr(transformer, "peft_config", {}):
        raise UserError(
            f"adapter_name: {adapter_name!r} is in use on this transformer; choose another or detach it first"
        )
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
    trainable = {name for name, parameter in transformer.named_parameters() if parameter.requires_grad}
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


def restore_trainable(transformer: Any, trainable: set[str]) -> None:
    """Make exactly the parameters named in `trainable` require gradients."""
    for name, parameter in transformer.named_parameters():
        parameter.requires_grad_(name in trainable)


def remove_lora(transformer: Any, adapter_name: str) -> None:
    """Delete one adapter; with the last one gone, the original modules are back in place."""
    others = [name for name in active_adapters(transformer) if name != adapter_name]
    if set(getattr(transformer, "peft_config", ())) - {adapter_name}:
        transformer.delete_adapters(adapter_name)
        if others:
            transformer.set_adapter(others)
    else:
        transformer.unload_lora()
