"""How long captions are for the base's text encoder, which cuts what is longer than it was told to read."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

from .options import CacheOptions


def token_counter(options: CacheOptions) -> Callable[[str], int] | None:
    """Counts a caption's tokens with the base's own tokenizer; None where the base is no folder that has one."""
    folder = Path(options.base_model) / "tokenizer"
    if not folder.is_dir():
        return None
    from transformers import AutoTokenizer

    try:
        tokenizer = AutoTokenizer.from_pretrained(folder, local_files_only=True)
    except Exception:  # whatever is wrong with it, the cache tells; here only a note depends on it
        return None
    return lambda caption: count_tokens(tokenizer, caption)


def count_tokens(tokenizer: Any, caption: str) -> int:
    """Tokens of a caption, all of them, with those that the tokenizer adds."""
    return len(tokenizer(caption, truncation=False, verbose=False)["input_ids"])
