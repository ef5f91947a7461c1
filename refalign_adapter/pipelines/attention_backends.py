"""diffusers' attention backends: which of them take no mask, and when references need one.

`transformer.set_attention_backend` chooses; references go through the same dispatcher as everything else. A mask is
needed where samples of a batch differ in their references and where references leave tokens out while they are
encoded. diffusers 0.42 raises on it in the first block; 0.35 drops it without a word. The list is of 0.42;
`tests/pipelines/test_attention_backends.py` compares it with the dispatcher.
"""

from __future__ import annotations

from itertools import filterfalse
from typing import Any

from diffusers.models.attention_dispatch import _AttentionBackendRegistry

from ..errors import UserError
from ..families.base import Family

WITHOUT_MASK = frozenset(
    {
        "_flash_3",
        "_flash_3_hub",
        "_native_flash",
        "_native_xla",
        "_sage_qk_int8_pv_fp16_cuda",
        "_sage_qk_int8_pv_fp16_triton",
        "_sage_qk_int8_pv_fp8_cuda",
        "_sage_qk_int8_pv_fp8_cuda_sm90",
        "aiter_fa2_hub",
        "flash",
        "flash_4_hub",
        "flash_hub",
        "sage",
        "sage_blackwell_hub",
        "sage_hub",
    }
)
"""Names of those that take no mask."""

DIFFERENT = "prompts with different numbers of reference tokens"
LEFT_OUT = "leaving out the background of references"


def takes_mask(name: str) -> bool:
    """Whether a backend of this name attends by a mask."""
    arguments = {backend.value: names for backend, names in _AttentionBackendRegistry._supported_arg_names.items()}
    return name not in WITHOUT_MASK and "attn_mask" in arguments.get(name, ("attn_mask",))


def backends_of(transformer: Any, family: Family) -> set[str]:
    """Names of the backends that the blocks' self-attention runs on."""
    processors: list[Any] = [family.self_attention(block).processor for block in family.blocks(transformer)]
    chosen = {getattr(processor, "_attention_backend", None) for processor in processors}
    active = _AttentionBackendRegistry.get_active_backend()[0]
    return {str(getattr(backend or active, "value", backend or active)) for backend in chosen}


def check_mask(transformer: Any, family: Family, reason: str) -> None:
    """Refuse a generation that needs an attention mask on a backend that takes none.

    Args:
        transformer: with the backend set.
        family: its family.
        reason: what needs the mask, `DIFFERENT` or `LEFT_OUT`.

    Raises:
        UserError: which backend, why, and the way out.
    """
    for name in sorted(filterfalse(takes_mask, backends_of(transformer, family))):
        choose = "choose another with pipe.transformer.set_attention_backend('native')"
        if reason == LEFT_OUT:
            choose += " to encode_references, and go back for pipe(prompt, reference_cache=...)"
        raise UserError(f"attention backend {name!r} takes no mask, which {reason} needs; {choose}")
