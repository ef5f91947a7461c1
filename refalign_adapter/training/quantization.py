"""The frozen base in 4 or 8 bits by bitsandbytes: less memory, and some time for taking the weights apart again."""

from __future__ import annotations

from importlib.util import find_spec
from typing import Any

import torch

from ..errors import UserError


def quantization_config(name: str, dtype: torch.dtype) -> Any:
    """What diffusers is told.

    Args:
        name: "nf4": 4 bits in the normal float format, its scales in 8 bits (QLoRA, arXiv 2305.14314); "int8": 8 bits
            with outliers in 16 (LLM.int8(), arXiv 2208.07339).
        dtype: what is computed in.
    """
    from diffusers import BitsAndBytesConfig

    if name == "int8":
        return BitsAndBytesConfig(load_in_8bit=True)
    return BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=dtype,
    )


def check_machine(name: str) -> None:
    """Refuse a quantised base where it cannot be made.

    Raises:
        UserError: no GPU, or no bitsandbytes.
    """
    if find_spec("bitsandbytes") is None:
        raise UserError(f"quantization: {name!r} needs bitsandbytes; pip install 'refalign-adapter[train]'")
    if not (torch.cuda.is_available() or torch.xpu.is_available()):
        raise UserError(f"quantization: {name!r} needs a GPU and there is none here; set quantization=null")
