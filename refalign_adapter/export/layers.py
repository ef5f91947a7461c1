"""Which rank and alpha each layer of a LoRA has, by the plain names in a configuration; no pattern is run as one."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Mapping
from typing import Any, TypeVar

from ..config import RefAlignConfig
from ..config_checks import is_plain

Value = TypeVar("Value")


@dataclasses.dataclass(frozen=True)
class LayerLora:
    """One layer's LoRA: its update is multiplied by alpha / rank."""

    rank: int
    alpha: float


def by_name(patterns: Mapping[str, Value], layer: str, default: Value) -> Value:
    """The value of the first name in `patterns` that is the layer's or its end, as in PEFT."""
    names = (name for name in patterns if layer == name or layer.endswith(f".{name}"))
    found = next(names, None)
    return default if found is None else patterns[found]


def all_plain(config: RefAlignConfig) -> bool:
    """Whether a configuration names layers by their names alone."""
    modules = config.target_modules or ()
    return not isinstance(modules, str) and all(map(is_plain, [*modules, *config.rank_pattern, *config.alpha_pattern]))


def written_out(config: RefAlignConfig, layers: Mapping[str, LayerLora]) -> RefAlignConfig:
    """The configuration with the layers' names in place of regular expressions; the same where there are none.

    Args:
        config: of the LoRA.
        layers: name -> what it has.
    """
    if all_plain(config):
        return config
    modules = config.target_modules or ()
    plain = not isinstance(modules, str) and all(map(is_plain, modules))
    return dataclasses.replace(config, target_modules=modules if plain else sorted(layers), **patterns(config, layers))


def patterns(config: RefAlignConfig, layers: Mapping[str, LayerLora]) -> dict[str, Any]:
    """`rank_pattern` and `alpha_pattern` with the names of the layers that differ from `r` and `lora_alpha`."""
    return {
        "rank_pattern": {name: lora.rank for name, lora in sorted(layers.items()) if lora.rank != config.r},
        "alpha_pattern": {
            name: lora.alpha for name, lora in sorted(layers.items()) if lora.alpha != config.lora_alpha
        },
    }


def layers_of(transformer: Any, adapter_name: str) -> dict[str, LayerLora]:
    """Layer -> its LoRA, of an adapter that is on a transformer."""
    return {
        name: LayerLora(module.r[adapter_name], module.lora_alpha[adapter_name])
        for name, module in transformer.named_modules()
        if adapter_name in getattr(module, "lora_A", ())
    }


def adapted(names: Iterable[str]) -> list[str]:
    """The layers that have weights, sorted.

    Args:
        names: of weights, as PEFT calls them.
    """
    return sorted({name.rpartition(".lora_")[0] for name in names})
