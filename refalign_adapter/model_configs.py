"""`config.json` of a model from outside: read as data, with sizes that a model can have and no code named in it."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from .errors import UserError
from .json_files import read_json

MOST = 2**24
"""Of any whole number in a config; the largest in use are vocabularies of some 260,000 words."""
MOST_LAYERS = 1024
ATTENTIONS = (None, "eager", "sdpa", "flash_attention_2", "flash_attention_3", "flex_attention")
"""What transformers brings itself. Any other name is that of code on the Hub, which it would fetch and run."""

_SIZES = (
    "_size",
    "_dim",
    "_heads",
    "channels",
    "_len",
    "d_model",
    "d_ff",
    "d_kv",
    "_embeddings",
    "_tokens",
    "_blocks",
)
"""Ends of the names of fields that are sizes."""


def read_model_config(path: Path, field: str) -> dict[str, Any]:
    """A model's configuration.

    Args:
        path: of the JSON file.
        field: what the user called the model; it opens the line of every error.

    Raises:
        UserError: it is missing, is no object of JSON, has sizes that no model has, or names an attention kernel.
    """
    config = read_json(path, field)
    if not isinstance(config, dict):
        raise UserError(f"{field}: {str(path)!r} must be an object of fields, got {type(config).__name__}")
    if problem := next(_problems(config), None):
        raise UserError(f"{field}: {str(path)!r}: {problem}; download the model again from who made it")
    return config


def _problems(config: dict[str, Any]) -> Iterator[str]:
    for name, value in config.items():
        if isinstance(value, dict):
            yield from _problems(value)
        elif "attn_implementation" in name and value not in ATTENTIONS:
            yield f"{name} must be one that transformers brings itself, got {str(value)[:60]!r}"
        elif any(part in name for part in ("num_layers", "num_hidden_layers")):
            if type(value) is not int or not 0 <= value <= MOST_LAYERS:
                yield f"{name} must be a whole number from 0 to {MOST_LAYERS}, got {str(value)[:60]}"
        elif isinstance(value, int | float) and name.endswith(_SIZES) and not -MOST <= value <= MOST:
            yield f"{name} must be at most {MOST}, got {str(value)[:60]}"
