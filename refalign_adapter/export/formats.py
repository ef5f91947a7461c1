"""How an adapter's LoRA is written to a file: one format that every stock loader reads, one that all of them refuse.

A stock loader knows nothing of scopes: it has a LoRA act on all tokens. So only a LoRA that was trained on all tokens
gets the file name and the keys that stock loaders look for. One for references alone gets others: diffusers'
`load_lora_weights` and `load_lora_adapter` raise on them. Told to look for another prefix, `load_lora_adapter` warns
and loads nothing; PEFT's `set_peft_model_state_dict` returns them as unexpected and loads nothing.
"""

from __future__ import annotations

import re
from dataclasses import dataclass

from ..config import FORMAT, FORMAT_KEY, RefAlignConfig
from ..errors import UserError, shorten

PREFIX = "transformer."
FACTS_KEY = "refalign_adapter"
"""Metadata under which a weights file says by itself what it was trained for; stock loaders do not look there."""
_NAME = re.compile(r"(?P<layer>[A-Za-z0-9_]+(\.[A-Za-z0-9_]+)*)\.(?P<part>[A-Za-z0-9_]+)\.weight")


@dataclass(frozen=True)
class WeightsFormat:
    """A safetensors file of one LoRA, `{PREFIX}{module}.{down or up}.weight`, and its LoraConfig in the metadata.

    Attributes:
        file_name: in the adapter folder.
        metadata_key: whose value is a JSON mapping of `{PREFIX}{field}` to the LoraConfig's fields.
        down, up: what stands for PEFT's lora_A and lora_B.
    """

    file_name: str
    metadata_key: str
    down: str = "lora_A"
    up: str = "lora_B"

    def key(self, name: str) -> str:
        """The key in the file of a weight that PEFT calls `name`, such as `blocks.0.attn1.to_q.lora_A.weight`."""
        return PREFIX + name.replace(".lora_A.", f".{self.down}.").replace(".lora_B.", f".{self.up}.")

    def name(self, key: str) -> str:
        """What PEFT calls the weight under `key`.

        Raises:
            UserError: a key of another format.
        """
        found = _NAME.fullmatch(key.removeprefix(PREFIX)) if key.startswith(PREFIX) else None
        part = {self.down: "lora_A", self.up: "lora_B"}.get(found["part"]) if found else None
        if found is None or part is None:
            raise UserError(f"adapter: {shorten(key)} is no weight of a {self.file_name}")
        return f"{found['layer']}.{part}.weight"


STOCK = WeightsFormat("pytorch_lora_weights.safetensors", "lora_adapter_metadata")
REFERENCE = WeightsFormat(
    "refalign_reference_lora.safetensors", "refalign_reference_adapter", "reference_down", "reference_up"
)
FORMATS = {"all": STOCK, "reference": REFERENCE}
"""LoRA scope -> the format that can hold it."""


def format_of(config: RefAlignConfig) -> WeightsFormat:
    """The format of an adapter's weights file."""
    return FORMATS[config.lora_scope]


def require_scope_all(config: RefAlignConfig, target: str) -> None:
    """Refuse to write an adapter in a format whose readers apply it to all tokens, if that is not its scope.

    Args:
        config: of the adapter.
        target: what the user asked for, such as `save_lora_weights`; it opens the message.

    Raises:
        UserError: the adapter acts on references alone.
    """
    if config.lora_scope != "all":
        raise UserError(
            f"{target}: this adapter acts on reference tokens alone (lora_scope {config.lora_scope!r}), and whatever "
            "reads such a file would apply it to video tokens too; save it with branch.save_pretrained(folder), load "
            "it with load_adapter"
        )


def stated_facts(config: RefAlignConfig) -> dict[str, object]:
    """What a weights file says of itself, so that a configuration that was changed beside it is found out."""
    return {FORMAT_KEY: FORMAT, "attention": config.attention, "lora_scope": config.lora_scope}
