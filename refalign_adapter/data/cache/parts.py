"""The cache on disk: one small safetensors file per encoded part, named by a hash of all that went into it.

    cache_dir/video/<key>.safetensors        latents of a clip
    cache_dir/references/<key>.safetensors   latents of a row's references
    cache_dir/text/<key>.safetensors         a caption's embedding
    cache_dir/teacher/<key>.safetensors      one teacher's features of a row's references
    cache_dir/tokens/<key>.safetensors       which tokens of a row's references show more than white padding
    cache_dir/target_<objective>/<key>.safetensors    one teacher's target of another objective, see `targets`

A part whose inputs or settings change gets another name, so stale ones are never read and the rest stays valid. The
tensor's checksum stands in the file's metadata.
"""

from __future__ import annotations

import errno
import os
import re
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from ...alignment.objective import NAME
from ...atomic import atomic_file
from ...batch import REFERENCE
from ...errors import ReadError, UserError
from ...files import require_regular
from ...leftovers import remove_leftovers
from .part_file import Header, all_finite, checksum, read_header, read_tensor, write_tensor

PARTS = ("video", "references", "text", "teacher", "tokens")
TARGETS = "target_"
"""What the parts of objectives beside reference alignment begin with."""
META_NAME = "meta.json"
DAMAGED = ".damaged"
"""Ending of a part that was found to be damaged."""
KEY = re.compile(r"[0-9a-f]{32}")
"""A part's key: what `hash_of` gives. Nothing else is ever made a path of."""
_TARGET = re.compile(rf"{TARGETS}{NAME.pattern}")
MISSING = (errno.ENOENT, errno.ENOTDIR)
NO_FILE = (errno.ELOOP, errno.EISDIR, errno.ENXIO)
"""What the system says of what stands where a part should be; of all else it says, the part is not to blame."""


def target_part(objective: str) -> str:
    """Which part an objective's targets are."""
    return "teacher" if objective == REFERENCE else f"{TARGETS}{objective}"


@dataclass(frozen=True)
class Expected:
    """What a part's tensor has to be: its shape, with None for any length, and its type; None: bool."""

    shape: tuple[int | None, ...]
    dtype: torch.dtype | None

    def misfit(self, dtype: torch.dtype, shape: tuple[int, ...]) -> str | None:
        """What is wrong with a tensor's type or shape, for people; None when nothing is."""
        wanted_type = self.dtype or torch.bool
        if dtype != wanted_type:
            return f"holds {dtype}, expected {wanted_type}"
        fits = len(self.shape) == len(shape) and all(
            want in (None, got) for want, got in zip(self.shape, shape, strict=True)
        )
        if not fits or 0 in shape:
            wanted = " × ".join("any" if length is None else str(length) for length in self.shape)
            return f"is {' × '.join(map(str, shape))}, expected {wanted}"
        return None

    def problem(self, tensor: Tensor) -> str | None:
        """What is wrong with a tensor, its values included."""
        return self.misfit(tensor.dtype, tuple(tensor.shape)) or _wrong_values(tensor)


def _wrong_values(tensor: Tensor) -> str | None:
    if tensor.dtype == torch.bool and tensor.numel() and int(tensor.view(torch.uint8).max()) > 1:
        return "holds values that are neither true nor false"
    if not all_finite(tensor):
        return f"holds {tensor.numel() - int(tensor.isfinite().sum())} values that are no finite numbers"
    return None


class DamagedPartError(UserError):
    """A part that is missing, or is not what was written."""


class CacheGoneError(ReadError):
    """The system gives nothing of a cache that it gave before."""


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
        assert part in PARTS or _TARGET.fullmatch(part), part
        assert KEY.fullmatch(key), key
        return self.folder / part / f"{key}.safetensors"

    def shape(self, part: str, key: str) -> tuple[int, ...] | None:
        """Shape of a part's tensor; None when it is missing or its file is damaged.

        Raises:
            ReadError: the system does not give the file.
        """
        path = self.path(part, key)
        try:
            return read_header(path).shape
        except ValueError:
            return None
        except OSError as error:
            if error.errno in (*MISSING, *NO_FILE):
                return None
            raise withheld(path, error) from None

    def read(self, part: str, key: str, expected: Expected | None = None) -> Tensor:
        """A part's tensor. The first time, it is compared with its checksum, and its values are looked at.

        One that is damaged is set aside, so that the next cache run makes it anew. One that the system does not give
        is left as it is.

        Args:
            part, key: which one.
            expected: what it has to be; None: anything.

        Raises:
            DamagedPartError: it is missing or damaged.
            CacheGoneError: the system gives nothing of the cache any more.
            ReadError: it does not give this part.
        """
        path, again = self.path(part, key), (part, key) in self._checked
        try:
            tensor, problem = _read(path, expected, again=again)
        except OSError as error:
            self._require_there()
            if error.errno not in MISSING:
                raise withheld(path, error) from None
            raise DamagedPartError(f"{str(path)!r} is missing") from None
        if problem is not None:
            with suppress(UserError):  # a cache may lie where nothing can be written
                self.set_aside(part, key)
            raise DamagedPartError(f"{str(path)!r} {problem}")
        self._checked.add((part, key))
        return tensor

    def _require_there(self) -> None:
        """After a part could not be read: is it that part, or all of them?

        Raises:
            CacheGoneError: `meta.json`, which every finished cache has, cannot be read either.
        """
        try:
            require_regular(self.folder / META_NAME)
            with (self.folder / META_NAME).open("rb") as file:
                file.read(1)
        except (OSError, ValueError) as error:
            reason = getattr(error, "strerror", None) or error
            raise CacheGoneError(
                f"cache_dir: {str(self.folder)!r} cannot be read any more ({META_NAME}: {reason}); look after that "
                "folder or disk"
            ) from None

    def write(self, part: str, key: str, tensor: Tensor) -> int:
        """Write a part, atomically; returns its size in bytes.

        Raises:
            UserError: numbers that are not finite, which would poison every step that reads them.
        """
        path, tensor = self.path(part, key), tensor.detach().cpu().contiguous()
        if not all_finite(tensor):
            hint = "; it overflows in fp16, set data.dtype=bf16" if tensor.dtype == torch.float16 else ""
            raise UserError(f"cache: the encoder made values for {part} that are no finite numbers{hint}")
        if os.path.isdir(path):  # nothing can take a folder's place
            self.set_aside(part, key)
        with atomic_file(path, durable=False) as temporary:  # what a power cut spoils is made again
            write_tensor(temporary, tensor)
        return path.stat().st_size

    def problem(self, part: str, key: str, expected: Expected) -> str | None:
        """Read all of a part; what is wrong with it, for people, or None. One without a checksum is not held to it.

        Raises:
            CacheGoneError: the system gives nothing of the cache any more.
            ReadError: it does not give this part.
        """
        path = self.path(part, key)
        try:
            return _read(path, expected, again=False)[1]
        except OSError as error:
            self._require_there()
            if error.errno not in MISSING:
                raise withheld(path, error) from None
            return "is missing"

    def set_aside(self, part: str, key: str) -> None:
        """Give a part, or whatever stands in its place, another ending, so that it counts as missing.

        Raises:
            UserError: the folder cannot be written.
        """
        path = self.path(part, key)
        aside = path.with_suffix(DAMAGED)
        try:
            if aside.is_dir() and not aside.is_symlink():
                aside = path.with_suffix(f"{DAMAGED}-{os.getpid()}")
            if os.path.lexists(path):
                os.replace(path, aside)
        except OSError as error:
            raise UserError(f"cache_dir: cannot rename the damaged {str(path)!r} ({error.strerror})") from None

    def size(self, part: str, key: str) -> int:
        """Bytes of a part's file."""
        return self.path(part, key).stat().st_size

    def part_names(self) -> list[str]:
        """Parts that there may be files of."""
        found = [path.name for path in self.folder.glob(f"{TARGETS}*") if _TARGET.fullmatch(path.name)]
        return [*PARTS, *sorted(found)]

    def remove_leftovers(self) -> None:
        """Delete what killed runs left half-written; see `leftovers.remove_leftovers`."""
        for folder in (self.folder, *(self.folder / part for part in self.part_names())):
            remove_leftovers(folder)


def withheld(path: str | Path, error: OSError) -> ReadError:
    """The line for a part that may well be whole."""
    return ReadError(
        f"{str(path)!r} cannot be read ({error.strerror or error}), which is the system's word and not the file's: it "
        "was left as it is; look after that disk or its rights"
    )


def _read(path: Path, expected: Expected | None, *, again: bool) -> tuple[Tensor, str | None]:
    """A part's tensor, and what is wrong with it; one without a checksum is not held to it.

    Args:
        path: its file.
        expected: what it has to be; None: anything.
        again: it was whole when it was read before.

    Raises:
        OSError: it is missing, or the system does not give it.
    """
    try:
        header, tensor = read_tensor(path)
    except ValueError as error:
        return torch.empty(0), f"cannot be read ({' '.join(str(error).split())[:200]})"
    except OSError as error:
        if error.errno not in NO_FILE:
            raise
        return torch.empty(0), f"cannot be read ({error.strerror})"
    problem = expected.misfit(header.dtype, header.shape) if expected is not None else None
    return tensor, problem or (None if again else _damage(header, tensor, check_values=expected is not None))


def _damage(header: Header, tensor: Tensor, *, check_values: bool) -> str | None:
    if header.checksum is not None and header.checksum != checksum(tensor):
        return "is not what was written: its checksum differs"
    return _wrong_values(tensor) if check_values else None
