"""Fusing a LoRA into the base's weights, and when that cannot be."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from ..branch.lora import active_adapters
from ..branch.lora_scope import lora_layers
from ..branch.reference_branch import branches_of
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
    _check_company(transformer, list(names))
    if getattr(transformer, "is_quantized", False) and not requantize:
        raise UserError(
            "the transformer is quantised: with the LoRA in them its weights would be rounded again, by about as much "
            "as the LoRA changes them. Leave the LoRA beside them, where it is exact; or load the base without "
            "quantization; or call merge_and_unload(pipe, requantize=True)"
        )


def is_merged(transformer: Any, adapter_name: str) -> bool:
    """Whether the adapter is fused into the base's weights."""
    return any(adapter_name in getattr(module, "merged_adapters", ()) for module in transformer.modules())


def _check_company(transformer: Any, names: list[str]) -> None:
    """Refuse fusing after which references would go another way than before.

    A layer with something fused into it passes over the LoRAs that are not; and what is fused acts in the references'
    own pass too, where other LoRAs otherwise do not.
    """
    active = active_adapters(transformer)
    for name, branch in branches_of(transformer).items():
        bare = branch.config.r == 0  # no LoRA to be silenced, and references that go through the weights all the same
        if branch.merged or (name not in active and not bare):
            continue
        others = [other for other in names if other != name]
        # In reference scope references are refused for as long, see `ReferenceBranch`, and caches of them are not.
        silenced = not bare and name not in names and branch.config.lora_scope == "all"
        if others and (silenced or ((bare or name in names) and branch.config.attention == "isolated")):
            effect = "keep it from acting" if silenced else "act on references too"
            raise UserError(
                f"fuse_lora: {others} fused beside the reference adapter {name!r} would {effect}; leave them unfused, "
                "they stack exactly"
            )


_STRENGTHS = "_refalign_strengths"


def remember_strengths(transformer: Any) -> None:
    """Keep the strengths of all LoRAs, which fusing with a scale changes, for `restore_strengths`."""
    for layer in lora_layers(transformer):
        if not layer.merged:
            setattr(layer, _STRENGTHS, dict(layer.scaling))


def restore_strengths(transformer: Any) -> None:
    """Give LoRAs that are fused no more the strengths they had before."""
    for layer in lora_layers(transformer):
        before = vars(layer).pop(_STRENGTHS, {}) if not layer.merged else {}
        layer.scaling |= {name: value for name, value in before.items() if name in layer.scaling}
