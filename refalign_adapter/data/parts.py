"""The cache on disk: one small safetensors file per encoded part, named by a hash of all that went into it.

    cache_dir/video/<key>.safetensors        latents of a clip
    cache_dir/references/<key>.safetensors   latents of a row's references
    cache_dir/text/<key>.safetensors         a caption's embedding
    cache_dir/teacher/<key>.safetensors      one teacher's features of a row's references
    cache_dir/tokens/<key>.safetensors       which tokens of a row's references show more than white padding

A part whose inputs or settings change gets another name, so stale ones are never read and the rest stays valid.
"""

from __future__ import annotations

import hashlib
import json
import time
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from ..errors import UserError
from ..files import atomic_file

PARTS = ("video", "references", "text", "teacher", "tokens")
TENSOR = "data"
LEFTOVER_AGE = 3600.0
"""Seconds after which a temporary file is taken to be a killed run's."""


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
        with open(path, "rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()
    except OSError as error:
        raise UserError(f"cannot read {str(path)!r} ({error.strerror})") from None


class PartStore:
    """Reads and writes the parts under one folder.

    Args:
        folder: the cache folder.
    """

    def __init__(self, folder: str | Path):
        self.folder = Path(folder)

    def path(self, part: str, key: str) -> Path:
        """Where a part is or would be."""
        assert part in PARTS
        return self.folder / part / f"{key}.safetensors"

    def shape(self, part: str, key: str) -> tuple[int, ...] | None:
        """Shape of a part's tensor; None when it is missing or its file is damaged."""
        try:
            with safe_open(self.path(part, key), framework="pt") as file:
                return tuple(file.get_slice(TENSOR).get_shape())
        except (OSError, SafetensorError):
            return None

    def read(self, part: str, key: str) -> Tensor:
        """A part's tensor, mapped from its file: bytes are read when they are used.

        Raises:
            UserError: it is missing or damaged.
        """
        path = self.path(part, key)
        try:
            with safe_open(path, framework="pt") as file:
                return file.get_tensor(TENSOR)
        except (OSError, SafetensorError):
            raise UserError(
                f"cache: {str(path)!r} is missing or damaged; run `refalign cache --config …` to make it again"
            ) from None

    def write(self, part: str, key: str, tensor: Tensor) -> int:
        """Write a part, atomically; returns its size in bytes."""
        path = self.path(part, key)
        with atomic_file(path) as temporary:
            save_file({TENSOR: tensor.detach().cpu().contiguous()}, temporary)
        return path.stat().st_size

    def size(self, part: str, key: str) -> int:
        """Bytes of a part's file."""
        return self.path(part, key).stat().st_size

    def remove_leftovers(self) -> None:
        """Delete the temporary files of killed runs; those of the last hour stay, as they may be another process's."""
        for part in PARTS:
            for path in (self.folder / part).glob(".*.tmp.safetensors"):
                if time.time() - path.stat().st_mtime > LEFTOVER_AGE:
                    path.unlink(missing_ok=True)
