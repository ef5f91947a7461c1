"""An adapter's fingerprint: what, besides the base, decides the keys and values of references."""

from __future__ import annotations

import hashlib
import json
from typing import Any

import torch

from ..config import RefAlignConfig
from .lora import lora_parameters
from .lora_scope import lora_layers

FACTS = ("attention", "lora_scope", "reference_frame", "base")


class Fingerprint:
    """Of one adapter on one transformer. Weights are hashed again only when they have changed.

    They are rounded to bfloat16 first, so that the same adapter loaded in float32 and in bfloat16 has one fingerprint.
    """

    def __init__(self, transformer: Any, adapter_name: str, config: RefAlignConfig):
        self.transformer = transformer
        self.adapter_name = adapter_name
        self.facts = {name: getattr(config, name) for name in FACTS}
        self._versions: list[tuple[int, int]] | None = None
        self._weights = ""

    def __call__(self) -> str:
        """Hexadecimal; the same for the same weights, strength and configuration."""
        strengths = [
            layer.scaling[self.adapter_name]
            for layer in lora_layers(self.transformer)
            if self.adapter_name in getattr(layer, "scaling", ())
        ]
        facts = json.dumps([self.facts, self._hash_weights(), strengths], sort_keys=True)
        return hashlib.sha256(facts.encode()).hexdigest()

    def _hash_weights(self) -> str:
        parameters = dict(lora_parameters(self.transformer, self.adapter_name))
        versions = [(id(parameter), parameter._version) for parameter in parameters.values()]
        if versions != self._versions:
            digest = hashlib.sha256()
            for name in sorted(parameters):
                rounded = parameters[name].detach().to("cpu", torch.bfloat16).contiguous()
                digest.update(name.replace(f".{self.adapter_name}.", ".").encode())
                digest.update(rounded.view(torch.uint8).numpy().tobytes())
            self._versions, self._weights = versions, digest.hexdigest()
        return self._weights
