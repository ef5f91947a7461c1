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

import os
import re
import zlib
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from ...errors import UserError
from ...files import atomic_file, remove_leftovers
from ...tensor_files import save_tensors

PARTS = ("video", "references", "text", "teacher", "tokens")
TENSOR, CHECKSUM = "data", "crc32"
DAMAGED = ".damaged"
"""Ending of a part that was found to be damaged."""
KEY = re.compile(r"[0-9a-f]{32}")
"""A part's key: what `hash_of` gives. Nothing else is ever made a path of."""


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


class DamagedPartError(UserError):
    """A part that is missing, cannot be read, or is not what was written."""


class PartStore:
    """Reads and writes the parts under one folder.

    Args:
        folder: the cache folder.
    """

    def __init__(self, folder: str | Path):
        self.folder = Path(folder)
        self._checked: set[tuple[str, str]] = set()

    def path(self, part: str, key: str) -> Path:
        """Where a part is or would be."""
        assert part in PARTS
        assert KEY.fullmatch(key), key
        return self.folder / part / f"{key}.safetensors"

    def shape(self, part: str, key: str) -> tuple[int, ...] | None:
        """Shape of a part's tensor; None when it is missing or its file is damaged."""
        try:
            with safe_open(self.path(part, key), framework="pt") as file:
                return tuple(file.get_slice(TENSOR).get_shape())
        except (OSError, SafetensorError):
            return None

    def read(self, part: str, key: str, expected: Expected | None = None) -> Tensor:
        """A part's tensor, mapped from its file. The first time, all of it is checked; later, bytes are read as used.

        One that is damaged is set aside, so that the next cache run makes it anew.

        Args:
            part, key: which one.
            expected: what it has to be; None: anything.

        Raises:
            DamagedPartError: it is missing or damaged.
        """
        path = self.path(part, key)
        try:
            with safe_open(path, framework="pt") as file:
                tensor = file.get_tensor(TENSOR)
                if (part, key) in self._checked:
                    return tensor
                problem = _problem(tensor, file.metadata(), expected)
        except FileNotFoundError:
            raise DamagedPartError(f"{str(path)!r} is missing") from None
        except (OSError, SafetensorError) as error:
            problem = f"cannot be read ({' '.join(str(error).split())[:200]})"
        if problem is not None:
            with suppress(UserError):  # a cache may lie where nothing can be written
                self.set_aside(part, key)
            raise DamagedPartError(f"{str(path)!r} {problem}")
        self._checked.add((part, key))
        return tensor

    def write(self, part: str, key: str, tensor: Tensor) -> int:
        """Write a part, atomically; returns its size in bytes.

        Raises:
            UserError: numbers that are not finite, which would poison every step that reads them.
        """
        path, tensor = self.path(part, key), tensor.detach().cpu().contiguous()
        if not tensor.isfinite().all():
            hint = "; it overflows in fp16, set data.dtype=bf16" if tensor.dtype == torch.float16 else ""
            raise UserError(f"cache: the encoder made values for {part} that are no finite numbers{hint}")
        with atomic_file(path, durable=False) as temporary:  # what a power cut spoils is made again
            save_tensors(temporary, {TENSOR: tensor}, {CHECKSUM: _checksum(tensor)})
        return path.stat().st_size

    def problem(self, part: str, key: str, expected: Expected) -> str | None:
        """Read all of a part; what is wrong with it, for people, or None. One without a checksum is not held to it."""
        path = self.path(part, key)
        if not path.is_file():
            return "is missing"
        try:
            with safe_open(path, framework="pt") as file:
                return _problem(file.get_tensor(TENSOR), file.metadata(), expected)
        except (OSError, SafetensorError) as error:
            return f"cannot be read ({error})"

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
        """Delete what killed runs left half-written; see `files.remove_leftovers`."""
        for folder in (self.folder, *(self.folder / part for part in PARTS)):
            remove_leftovers(folder)


def _problem(tensor: Tensor, metadata: dict[str, str] | None, expected: Expected | None) -> str | None:
    """What is wrong with a tensor that was read; one without a checksum is not held to it."""
    checksum = (metadata or {}).get(CHECKSUM)
    if checksum is not None and checksum != _checksum(tensor):
        return "is not what was written: its checksum differs"
    return expected.problem(tensor) if expected is not None else None


def _checksum(tensor: Tensor) -> str:
    return f"{zlib.crc32(tensor.contiguous().view(torch.uint8).numpy().data):08x}"
