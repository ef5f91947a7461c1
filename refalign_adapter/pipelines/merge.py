"""`merge_and_unload`: the LoRA becomes part of the base's weights."""

from __future__ import annotations

from typing import Any

from ..branch.reference_branch import branches_of
from ..errors import UserError
from .base import ReferencePipeline
from .fusing import check_fusible

MERGED = "The transformer's weights contain the LoRA, for good."
HOOKED = (
    "The transformer has hooks that let references in; they do nothing without references.",
    "The transformer's parameters are frozen.",
)
CONFIG_KEY = "_refalign_merged"
"""In the transformer's own configuration, which is saved with its weights: digests of the adapters merged into it.
diffusers keeps keys that begin with an underscore and does not take them for arguments of the class."""


def merged_into(transformer: Any) -> list[str]:
    """Digests of the adapters that were merged into a transformer's weights, before they were saved or since."""
    found = transformer.config.get(CONFIG_KEY)
    return [digest for digest in found if isinstance(digest, str)] if isinstance(found, list | tuple) else []


def merge_and_unload(pipe: Any, *, requantize: bool = False) -> Any:
    """Add the LoRA to the base's weights for good and take all PEFT modules off; references go on working.

    As in peft, every LoRA that is switched on is merged and the others are dropped; what `fuse_lora` has fused stays
    as it is. A step then costs what the base takes for as many tokens.

    Args:
        pipe: what `load_adapter` returned; changed in place.
        requantize: accept that a base in 4 or 8 bits is rounded again with the LoRA in it.

    Returns:
        `pipe`.

    Raises:
        UserError: another object, a pipeline whose adapter was unloaded or is switched off, an adapter that acts on
            references alone, or a quantised base without `requantize`.
    """
    if not isinstance(pipe, ReferencePipeline):
        raise UserError(f"pipe: expected what load_adapter returns, got {type(pipe).__name__}")
    transformer: Any = pipe._loaded_branch().transformer
    if not getattr(transformer, "peft_config", None):
        return pipe
    branch = pipe._reference_branch()
    check_fusible(transformer, requantize=requantize)
    for other in list(branches_of(transformer).values()):
        if other is not branch:
            other.detach()
    if not any(getattr(module, "merged_adapters", ()) for module in transformer.modules()):
        transformer.fuse_lora()
    transformer.unload_lora()
    if branch.config.r == 0:  # other LoRAs were merged; this adapter goes on beside the weights
        return pipe
    branch.merged = True
    transformer.register_to_config(**{CONFIG_KEY: [*merged_into(transformer), branch.weights_digest]})
    pipe.changes = (MERGED, *HOOKED)
    return pipe
