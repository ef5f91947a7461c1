"""A quantised base on the CPU. diffusers' quantiser refuses without a GPU; bitsandbytes itself computes here, too."""

import pytest
from diffusers.quantizers.bitsandbytes import bnb_quantizer

from refalign_adapter.training import base_model

QUANTISABLE = {"num_attention_heads": 2, "attention_head_dim": 64, "ffn_dim": 256, "text_dim": 64, "freq_dim": 64}
"""Fields of a tiny transformer's config with which every layer's inputs are whole blocks of 64."""


def quantise_on_the_cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let recipes with `quantization` load on the CPU, for one test."""
    monkeypatch.setattr(base_model, "check_machine", lambda name: None)
    for name in ("BnB4BitDiffusersQuantizer", "BnB8BitDiffusersQuantizer"):
        quantizer = getattr(bnb_quantizer, name)
        monkeypatch.setattr(quantizer, "validate_environment", lambda self, *args, **kwargs: None)
        monkeypatch.setattr(quantizer, "update_device_map", lambda self, device_map: {"": "cpu"})
