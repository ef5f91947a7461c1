"""A reference pipeline on its way to a folder: one that stock classes read back, its adapters beside it."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from torch import nn

from ..branch.lora_scope import lora_layers
from ..branch.reference_branch import branches_of
from ..errors import UserError

logger = logging.getLogger(__name__)

FOLDER = "reference_adapters"
"""In a saved pipeline's folder: an adapter folder for each."""


def save_stock(pipe: Any, stock: Any, folder: str | Path, *args: Any, **kwargs: Any) -> None:
    """Write `stock.save_pretrained(folder)` with the weights as they are without LoRAs, and the adapters beside it.

    Args:
        pipe: the reference pipeline.
        stock: a stock pipeline with the same components.
        folder: where to; an adapter goes into `folder/reference_adapters/NAME`, from where `load_adapter` takes it.
        args, kwargs: of diffusers' own method.

    Raises:
        UserError: a LoRA is fused, or there is one that the folder cannot hold. Nothing is written then.
    """
    transformer = pipe.transformer
    _check(transformer)
    for name, branch in branches_of(transformer).items():
        if not branch.merged:
            saved = branch.save_pretrained(Path(folder) / FOLDER / name)
            logger.info("adapter %r is in %r; load_adapter takes it from there", name, str(saved))
    with _without_lora(transformer):
        stock.save_pretrained(folder, *args, **kwargs)


def _check(transformer: Any) -> None:
    branches = branches_of(transformer)
    if any(getattr(layer, "merged", False) for layer in lora_layers(transformer)):
        raise UserError("save_pretrained: a LoRA is fused into the transformer's weights; call unfuse_lora() first")
    others = [name for name in getattr(transformer, "peft_config", {}) if name not in branches]
    if others:
        raise UserError(
            f"save_pretrained: the transformer has other LoRAs, {others}, which a pipeline's folder cannot hold; save "
            "them with save_lora_weights, take them off with delete_adapters, and load them again afterwards"
        )


@contextmanager
def _without_lora(transformer: Any) -> Iterator[None]:
    """Have the transformer's state show the base's own layers under their own names."""

    def rename(module: nn.Module, state: dict[str, Any], prefix: str, metadata: Any) -> None:
        for name in list(state):
            if ".lora_" in name:
                del state[name]
            elif ".base_layer." in name:
                state[name.replace(".base_layer.", ".")] = state.pop(name)

    handle = transformer.register_state_dict_post_hook(rename)
    try:
        yield
    finally:
        handle.remove()
