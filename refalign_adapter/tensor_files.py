"""safetensors files that are the same bytes for the same content."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING

from .leftovers import temporary_path

if TYPE_CHECKING:
    from torch import Tensor

_METADATA = "__metadata__"


def save_tensors(path: str | Path, tensors: Mapping[str, Tensor], metadata: Mapping[str, str] | None = None) -> None:
    """Write a safetensors file whose bytes follow from its content.

    The library orders tensors by type and name, but metadata as its hash table happens to have them; here they are
    sorted. Not atomic: give it a path of `atomic_file` or in `atomic_folder`.

    Args:
        path: the file.
        tensors: name -> contiguous tensor on the CPU.
        metadata: texts by name.

    Raises:
        SafetensorError, OSError: it cannot be written.
    """
    from safetensors.torch import save_file

    # The library writes to a file of a name of its own first: in a folder that the next run knows for a dead one's.
    path = Path(path)
    beside = temporary_path(path, "tmp")
    beside.mkdir()
    try:
        save_file(dict(tensors), beside / path.name, metadata=dict(metadata) if metadata else None)
        if metadata and len(metadata) > 1:
            _sort_metadata(beside / path.name)
        os.replace(beside / path.name, path)
    finally:
        shutil.rmtree(beside, ignore_errors=True)


def _sort_metadata(path: Path) -> None:
    """Write the header anew, as long as it was: 8 bytes of length, then JSON padded with spaces."""
    with path.open("r+b") as file:
        length = int.from_bytes(file.read(8), "little")
        header = json.loads(file.read(length))
        header[_METADATA] = dict(sorted(header[_METADATA].items()))
        text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
        assert len(text) <= length, "the library escapes more than JSON asks for"
        file.seek(8)
        file.write(text.ljust(length))
