"""diffusers' own saving refuses adapters that it cannot hold."""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from typing import Any

from ..config import RefAlignConfig
from ..export.formats import require_scope_all


def guard_saving(transformer: Any, configs: Mapping[str, RefAlignConfig]) -> None:
    """While an adapter for references alone is there, its `save_lora_adapter` refuses to write that one.

    It is diffusers' own, and what it writes is applied to all tokens by whoever reads it.

    Args:
        transformer: the DiT.
        configs: of the reference adapters that are on it, by their names; none takes the guard off.
    """
    transformer.__dict__.pop("save_lora_adapter", None)
    if any(config.lora_scope != "all" for config in configs.values()):
        transformer.save_lora_adapter = partial(_save_lora_adapter, transformer, configs)


def _save_lora_adapter(
    transformer: Any,
    configs: Mapping[str, RefAlignConfig],
    save_directory: Any,
    adapter_name: str = "default",
    **options: Any,
) -> None:
    if adapter_name in configs:
        require_scope_all(configs[adapter_name], "save_lora_adapter")
    type(transformer).save_lora_adapter(transformer, save_directory, adapter_name, **options)
