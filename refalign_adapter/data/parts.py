"""The cache on disk: one small safetensors file per encoded part, named by a hash of all that went into it.

    cache_dir/video/<key>.safetensors        latents of a clip
    cache_dir/references/<key>.safetensors   latents of a row's references
    cache_dir/text/<key>.safetensors         a caption's embedding
    cache_dir/teacher/<key>.safetensors      one teacher's features of a row's references
    cache_dir/tokens/<key>.safetensors       which tokens of a row's references show more than white padding

A part whose inputs or settings change gets another name, so stale ones are never read and the rest stays valid. The
tensor's checksum stands in the file's metadata.
"""

from __future__ import annotations

import hashlib
import json
import os
import time
import zlib
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from ..errors import UserError
from ..files import atomic_file

PARTS = ("video", "references", "text", "teacher", "tokens")
TENSOR, CHECKSUM = "data", "crc32"
DAMAGED = ".damaged"
"""Ending of a part that was found to be damaged."""
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


@dataclass(frozen=True)
class Expected:
    """What a part's tensor has to be: its shape, with None for any length, and its type; None: bool."""

    shape: tuple[int | None, ...]
    dtype: torch.dtype | None

    def problem(self, tensor: Tensor) -> str | None:
        """What is wrong with a tensor, for people; None when nothing is."""
        dtype = self.dtype or torch.bool
        if tensor.dtype != dtype:
            return f"holds {tensor.dtype}, expected {dtype}"
        fits = len(self.shape) == tensor.ndim and all(
            want in (None, got) for want, got in zip(self.shape, tensor.shape, strict=True)
        )
        if not fits or 0 in tensor.shape:
            wanted = " × ".join("any" if length is None else str(length) for length in self.shape)
            return f"is {' × '.join(map(str, tensor.shape))}, expected {wanted}"
        if not_finite := tensor.numel() - int(tensor.isfinite().sum()):
            return f"holds {not_finite} values that are no finite numbers"
        return None


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
        """Write a part, atomically; returns its size in bytes.

        Raises:
            UserError: numbers that are not finite, which would poison every step that reads them.
        """
        path, tensor = self.path(part, key), tensor.detach().cpu().contiguous()
        if not tensor.isfinite().all():
            hint = "; it overflows in fp16, set data.dtype=bf16" if tensor.dtype == torch.float16 else ""
            raise UserError(f"cache: the encoder made values for {part} that are no finite numbers{hint}")
        with atomic_file(path) as temporary:
            save_file({TENSOR: tensor}, temporary, metadata={CHECKSUM: _checksum(tensor)})
        return path.stat().st_size

    def problem(self, part: str, key: str, expected: Expected) -> str | None:
        """Read all of a part; what is wrong with it, for people, or None. One without a checksum is not held to it."""
        path = self.path(part, key)
        if not path.is_file():
            return "is missing"
        try:
            with safe_open(path, framework="pt") as file:
                tensor, checksum = file.get_tensor(TENSOR), (file.metadata() or {}).get(CHECKSUM)
        except (OSError, SafetensorError) as error:
            return f"cannot be read ({error})"
        if checksum is not None and checksum != _checksum(tensor):
            return "is not what was written: its checksum differs"
        return expected.problem(tensor)

    def set_aside(self, part: str, key: str) -> None:
        """Give a part, if it is there, another ending, so that it counts as missing.

        Raises:
            UserError: the folder cannot be written.
        """
        path = self.path(part, key)
        try:
            if path.is_file():
                os.replace(path, path.with_suffix(DAMAGED))
        except OSError as error:
            raise UserError(f"cache_dir: cannot rename the damaged {str(path)!r} ({error.strerror})") from None

    def size(self, part: str, key: str) -> int:
        """Bytes of a part's file."""
        return self.path(part, key).stat().st_size

    def remove_leftovers(self) -> None:
        """Delete the temporary files of killed runs; those of the last hour stay, as they may be another process's."""
        for part in PARTS:
            for path in (self.folder / part).glob(".*.tmp.safetensors"):
                if time.time() - path.stat().st_mtime > LEFTOVER_AGE:
                    path.unlink(missing_ok=True)


def _checksum(tensor: Tensor) -> str:
    return f"{zlib.crc32(tensor.contiguous().view(torch.uint8).numpy().data):08x}"
