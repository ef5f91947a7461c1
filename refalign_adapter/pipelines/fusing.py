"""Fusing a LoRA into the base's weights, and when that cannot be."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from ..branch.attach import branches_of
from ..branch.lora import active_adapters
from ..errors import UserError


def check_fusible(transformer: Any, adapter_names: Sequence[str] | None = None, *, requantize: bool = False) -> None:
    """Refuse to fuse an adapter that acts on references alone, or into weights that are rounded to a few bits.

    Args:
        transformer: with its LoRAs.
        adapter_names: what is to be fused; None: all that are switched on.
        requantize: accept the rounding.

    Raises:
        UserError: with the reason. Nothing is changed.
    """
    names = active_adapters(transformer) if adapter_names is None else adapter_names
    for name, branch in branches_of(transformer).items():
        if name in names and branch.config.lora_scope == "reference":
            raise UserError(
                f"adapter {name!r} acts on reference tokens alone (lora_scope 'reference') and cannot become part of "
                "weights that video tokens use too; leave it as it is, it runs once per video, not in every step"
            )
    if getattr(transformer, "is_quantized", False) and not requantize:
        raise UserError(
            "the transformer is quantised: with the LoRA in them its weights would be rounded again, by about as much "
            "as the LoRA changes them. Leave the LoRA beside them, where it is exact; or load the base without "
            "quantization; or call merge_and_unload(pipe, requantize=True)"
        )


def is_merged(transformer: Any, adapter_name: str) -> bool:
    """Whether the adapter is fused into the base's weights."""
    return any(adapter_name in getattr(module, "merged_adapters", ()) for module in transformer.modules())
