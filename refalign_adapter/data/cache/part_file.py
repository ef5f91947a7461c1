"""One part's file: a safetensors file that holds one tensor, `data`, and its checksum.

Files are read, not mapped into memory as the library does it: where a disk or a network folder fails under a mapped
file, the system kills the process without a word, and a read that fails is an error that can be told. So the header
is read here as well: 8 bytes that say how long it is, then JSON, then the tensor to the file's end.
"""

from __future__ import annotations

import math
import zlib
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

import torch
from torch import Tensor

from ...errors import shorten
from ...files import require_regular
from ...json_files import parse_json
from ...tensor_files import save_tensors

TENSOR, CHECKSUM, METADATA = "data", "crc32", "__metadata__"
MAX_HEADER = 2**16
"""Bytes; a part's own has fewer than 300."""
MAX_DIMENSIONS = 8
MAX_SIDE = 2**40
TYPES = {
    "BOOL": torch.bool,
    "U8": torch.uint8,
    "I8": torch.int8,
    "I16": torch.int16,
    "I32": torch.int32,
    "I64": torch.int64,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F32": torch.float32,
    "F64": torch.float64,
}
"""Names of the format -> types."""


@dataclass(frozen=True)
class Header:
    """What a file says of its tensor.

    Attributes:
        dtype, shape: of the tensor.
        begin, size: where its bytes are.
        checksum: of its bytes; None where the file has none, as the first caches did not.
    """

    dtype: torch.dtype
    shape: tuple[int, ...]
    begin: int
    size: int
    checksum: Any


def read_header(path: str | Path) -> Header:
    """What a file says of its tensor, which has as many bytes as that takes.

    Raises:
        OSError: the system does not give the file.
        ValueError: it is no whole file of a part; a reason in one line.
    """
    require_regular(path)
    with open(path, "rb", buffering=0) as file:
        return _header(file)


def read_tensor(path: str | Path) -> tuple[Header, Tensor]:
    """The tensor, not compared with its checksum, and what the file says of it.

    Raises:
        OSError, ValueError: as `read_header`.
    """
    require_regular(path)
    with open(path, "rb", buffering=0) as file:
        header = _header(file)
        content = torch.empty(header.size, dtype=torch.uint8)
        _fill(file, content)
    return header, content.view(header.dtype).reshape(header.shape)


def write_tensor(path: str | Path, tensor: Tensor) -> None:
    """Write a contiguous tensor of the CPU with its checksum; not atomic, see `save_tensors`.

    Raises:
        SafetensorError, OSError: it cannot be written.
    """
    save_tensors(path, {TENSOR: tensor}, {CHECKSUM: checksum(tensor)})


def checksum(tensor: Tensor) -> str:
    """CRC-32 of a tensor's bytes, eight hexadecimal digits: of what Python brings along it is the fastest, and damage,
    unlike malice, does not get past it.
    """
    return f"{zlib.crc32(tensor.contiguous().flatten().view(torch.uint8).numpy().data):08x}"


def all_finite(tensor: Tensor) -> bool:
    """Whether a tensor holds finite numbers only; tens of times faster than looking at each by `isfinite`."""
    if not tensor.is_floating_point() or not tensor.numel():
        return True
    least, largest = torch.aminmax(tensor)  # NaN if there is any
    return math.isfinite(least) and math.isfinite(largest)


def _header(file: IO[bytes]) -> Header:
    size = file.seek(0, 2)
    file.seek(0)
    length = int.from_bytes(_exactly(file, 8), "little")
    if not 2 <= length <= min(MAX_HEADER, size - 8):
        raise ValueError(f"its header is said to have {length} bytes" if size > 8 + length else "it is cut off")
    content = parse_json(_exactly(file, length))
    if not isinstance(content, dict) or set(content) | {METADATA} != {TENSOR, METADATA}:
        raise ValueError(f"its header does not name {TENSOR!r} alone")
    dtype, shape, count = _description(content[TENSOR])
    begin = 8 + length
    if size - begin != count:
        raise ValueError(f"{size - begin} bytes of values instead of {count}")
    metadata = content.get(METADATA, {})
    if not isinstance(metadata, dict):
        raise ValueError("its header's metadata are no object")
    return Header(dtype, shape, begin, count, metadata.get(CHECKSUM))


def _description(values: Any) -> tuple[torch.dtype, tuple[int, ...], int]:
    """Type, shape and bytes of a tensor.

    Raises:
        ValueError: the header does not tell them, or tells what contradicts itself.
    """
    if not isinstance(values, dict):
        raise ValueError("its header describes no tensor")
    name, shape, offsets = (values.get(key) for key in ("dtype", "shape", "data_offsets"))
    dtype = TYPES.get(name) if isinstance(name, str) else None
    if dtype is None:
        raise ValueError(f"its header gives no type that is known, {shorten(name, 40)}")
    if not isinstance(shape, list) or len(shape) > MAX_DIMENSIONS or not all(_is_side(side) for side in shape):
        raise ValueError("its header gives no shape")
    count = math.prod(shape) * dtype.itemsize
    if offsets != [0, count]:
        raise ValueError(f"its header's shape and type take {count} bytes, not those it says")
    return dtype, tuple(shape), count


def _is_side(value: Any) -> bool:
    return type(value) is int and 0 <= value < MAX_SIDE


def _exactly(file: IO[bytes], count: int) -> bytes:
    content = file.read(count)
    if len(content) < count:
        raise ValueError("it is cut off")
    return content


def _fill(file: Any, content: Tensor) -> None:
    """Read the bytes of a whole tensor."""
    view: memoryview = content.numpy().data
    while len(view):
        count = file.readinto(view)
        if not count:
            raise ValueError("it is cut off")
        view = view[count:]
