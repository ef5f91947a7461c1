"""An adapter's fingerprint: what, besides the base, decides the keys and values of references."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from ..config import RefAlignConfig
from ..errors import UserError
from .lora import lora_parameters
from .lora_scope import LoraScope

FACTS = ("attention", "lora_scope", "reference_frame", "base")
LATER_FACTS = ("reference_place", "null_reference")
"""Told only where they are not the default, so that what was cached before they were there stays valid."""
SAMPLE = 64
"""Values of a layer by which a base is recognised."""


class Fingerprint:
    """Of one adapter on one transformer. Weights are hashed again only when they have changed.

    They are rounded to bfloat16 first, so that the same adapter loaded in float32 and in bfloat16 has one fingerprint.

    Args:
        scope: of the adapter.
        config: of the adapter.
        layers: the transformer's own that make keys and values; of an adapter without LoRA, a few of their weights
            tell one base from another.
    """

    def __init__(self, scope: LoraScope, config: RefAlignConfig, layers: Sequence[Any]):
        self.scope = scope
        self.layers = [] if config.r else [getattr(layer, "base_layer", layer) for layer in layers]
        self.facts = {name: getattr(config, name) for name in FACTS}
        self.facts |= {name: value for name, value in config.to_dict().items() if name in LATER_FACTS}
        self._versions: list[tuple[int, int]] | None = None
        self._weights = ""

    def __call__(self) -> str:
        """Hexadecimal; the same for the same weights, strength and configuration.

        Raises:
            UserError: the weights are not there to be read, see `_hash_weights`.
        """
        strengths = [layer.scaling[self.scope.adapter_name] for layer in self.scope.layers]
        facts = json.dumps([self.facts, self._hash_weights(), strengths], sort_keys=True)
        return hashlib.sha256(facts.encode()).hexdigest()

    def _hash_weights(self) -> str:
        weights = self._parameters()
        if any(weight.is_meta for weight in weights):  # accelerate's sequential offloading keeps them elsewhere
            if not self._weights:
                raise UserError(
                    "references: the adapter's weights are offloaded; attach it before sequential offloading begins"
                )
            return self._weights
        versions = [(id(weight), weight._version) for weight in weights]
        if versions != self._versions:
            self._versions, self._weights = versions, self._digest()
        return self._weights

    def _parameters(self) -> list[nn.Parameter]:
        if self.layers:
            return [layer.weight for layer in self.layers]
        name = self.scope.adapter_name
        parts = (part for layer in self.scope.layers for part in (layer.lora_A[name], layer.lora_B[name]))
        return [weight for part in parts for weight in part.parameters()]

    def _digest(self) -> str:
        name = self.scope.adapter_name
        digest = hashlib.sha256()
        for path, weight in sorted(lora_parameters(self.scope.transformer, name)):
            digest.update(path.replace(f".{name}.", ".").encode())
            digest.update(_rounded(weight))
        for layer in self.layers:
            digest.update(_rounded(layer.weight.flatten()[:SAMPLE]))
        return digest.hexdigest()


def _rounded(weight: Tensor) -> bytes:
    return weight.detach().to("cpu", torch.bfloat16).contiguous().view(torch.uint8).numpy().tobytes()
