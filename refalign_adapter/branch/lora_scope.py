"""Which LoRAs act in a pass, and which layers a LoRA on reference tokens alone can matter in.

PEFT's own switches change `requires_grad` along with what is active, which is wrong between two passes of one training
step. So the list of active adapters is set on each layer instead, PEFT's private `_active_adapter`;
`tests/branch/test_lora_scope.py` tells when it moves.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any

from torch import nn

from ..errors import UserError
from ..families.base import Family

ATTRIBUTE = "_active_adapter"


def lora_layers(module: nn.Module) -> list[Any]:
    """PEFT's layers inside `module`, itself included."""
    from peft.tuners.tuners_utils import BaseTunerLayer

    return [layer for layer in module.modules() if isinstance(layer, BaseTunerLayer)]


class LoraScope:
    """Switches LoRAs between the passes of one adapter.

    In a reference pass that adapter acts alone, so that what references leave behind depends on no other LoRA. In all
    other passes everything acts that is switched on, but for the adapter itself if it is for references alone.

    Args:
        transformer: the DiT that carries it.
        adapter_name: the adapter's name in PEFT.
        reference_only: whether it acts on reference tokens alone.
    """

    def __init__(self, transformer: Any, adapter_name: str, reference_only: bool):
        self.transformer = transformer
        self.adapter_name = adapter_name
        self.reference_only = reference_only
        self._layers: list[Any] = []

    @property
    def layers(self) -> list[Any]:
        """PEFT's layers that carry the adapter; kept, as a walk over all modules in every pass would show."""
        if not self._layers or self.adapter_name not in self._layers[0].lora_A:
            carrying = (layer for layer in lora_layers(self.transformer) if hasattr(layer, "lora_A"))
            self._layers = [layer for layer in carrying if self.adapter_name in layer.lora_A]
        return self._layers

    def check_switched_on(self) -> None:
        """Refuse references while their adapter does not act.

        Raises:
            UserError: by `set_adapters` or `disable_lora`, or its LoRA was taken off behind its back.
        """
        name = self.adapter_name
        if name not in (getattr(self.transformer, "peft_config", None) or {}):
            raise UserError(
                f"references: the LoRA of adapter {name!r} was taken off its transformer; call unload() on the "
                "pipeline, or detach() on the branch, and load the adapter again"
            )
        off = not any(name in layer.active_adapters for layer in self.layers[:1])
        if off or any(layer.disable_adapters for layer in self.layers):
            how = f"set_adapters({name!r})" if off else "enable_lora()"
            raise UserError(f"references: adapter {name!r} is switched off; call {how}, or leave references out")

    def check_not_fused_over(self) -> None:
        """Refuse references while another LoRA is fused into the adapter's layers: PEFT then passes over this one.

        Raises:
            UserError: with the way out.
        """
        for layer in self.layers:
            if layer.merged and self.adapter_name not in layer.merged_adapters:
                raise UserError(
                    f"references: adapter {self.adapter_name!r} does not act while {list(layer.merged_adapters)} are "
                    "fused into its layers; call unfuse_lora(), or use references that were encoded before"
                )

    @contextmanager
    def passing(self, module: nn.Module, references: bool) -> Iterator[None]:
        """Have the right LoRAs act inside the context.

        Args:
            module: the transformer, or one block of it.
            references: whether this is a reference pass.

        Raises:
            UserError: the adapter is for references alone and was fused into the base's weights.
        """
        if not (references or self.reference_only):
            yield
            return
        whole_video = module is self.transformer and not references
        layers = self.layers if whole_video else lora_layers(module)
        changed = list(self._switch(layers, references))
        try:
            yield
        finally:
            for layer, before in changed:
                setattr(layer, ATTRIBUTE, before)

    def _switch(self, layers: Iterable[Any], references: bool) -> Iterator[tuple[Any, Any]]:
        for layer in layers:
            if self.reference_only and self.adapter_name in layer.merged_adapters:
                raise UserError(
                    f"adapter {self.adapter_name!r} acts on references alone and cannot be fused into weights that "
                    "video tokens use too; call unfuse_lora()"
                )
            before = getattr(layer, ATTRIBUTE)
            mine = [name for name in layer.active_adapters if (name == self.adapter_name) is references]
            if mine != layer.active_adapters:
                setattr(layer, ATTRIBUTE, mine)
                yield layer, before


def dead_layers(transformer: Any, family: Family, align_blocks: tuple[int, ...]) -> list[str]:
    """Linear layers in which a LoRA on reference tokens alone changes nothing that is used.

    References skip cross-attention, and of the last block video tokens read keys and values only, unless the
    alignment reads its output. What is not in a block is not counted on either: it makes text or output.
    """
    blocks = family.blocks(transformer)
    live: set[nn.Module] = set()
    for index, block in enumerate(blocks):
        if index == len(blocks) - 1 and index not in align_blocks:
            live |= {part for layer in family.key_value_layers(block) for part in layer.modules()}
            continue
        live |= set(block.modules()) - {part for other in family.text_modules(block) for part in other.modules()}
    return [
        name.removesuffix(".base_layer")  # of a layer that has another LoRA
        for name, module in transformer.named_modules()
        if isinstance(module, nn.Linear) and module not in live and ".lora_" not in name
    ]
