"""Digests of files and of values."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

from .errors import UserError
from .files import require_regular


def hash_of(value: Any) -> str:
    """32 hexadecimal digits that stand for a value of JSON types; the order of a mapping's keys does not matter."""
    text = json.dumps(value, sort_keys=True, ensure_ascii=False)
    return hashlib.sha256(text.encode("utf-8", "surrogatepass")).hexdigest()[:32]


def file_digest(path: str | Path) -> str:
    """sha256 of a file's bytes.

    Raises:
        UserError: the file cannot be read.
    """
    try:
        require_regular(path)
        with open(path, "rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()
    except (OSError, ValueError) as error:
        raise UserError(f"cannot read {str(path)!r} ({getattr(error, 'strerror', None) or error})") from None
