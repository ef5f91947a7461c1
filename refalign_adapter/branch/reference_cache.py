"""`ReferenceCache`: the keys and values that references leave behind in every block, for any number of passes.

Shape letters: B batch, T reference tokens of a sample (padded to the batch's largest number).
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..errors import UserError
from ..files import atomic_file
from ..json_files import parse_json
from ..tensor_files import save_tensors

FORMAT = "refalign_reference_cache"
_FIELDS = ("frames", "adapter", "adapter_name")


@dataclass(frozen=True)
class ReferenceCache:
    """Keys and values of one or several samples' references (isolated attention).

    `pipe.encode_references` makes one; it serves any prompt, seed, number of steps and guidance. It depends on the
    adapter, its weight and the base, and, unless the adapter has a `reference_frame`, on the video's length.

    Attributes:
        keys, values: per block, (B, T, heads, head_dim), rotated to their positions.
        mask: (B, T) bool, True where a token is real; None: all are.
        frames: latent frames of the video they are placed after; None: they have a place of their own.
        adapter: fingerprint of the adapter they were made with.
        adapter_name: its name, for messages.
    """

    keys: tuple[Tensor, ...]
    values: tuple[Tensor, ...]
    mask: Tensor | None = None
    frames: int | None = None
    adapter: str = ""
    adapter_name: str = ""

    def __len__(self) -> int:
        """B, the samples it is for."""
        return self.keys[0].shape[0]

    @property
    def tokens(self) -> int:
        """T."""
        return self.keys[0].shape[1]

    @property
    def nbytes(self) -> int:
        """Bytes of keys and values."""
        return sum(tensor.numel() * tensor.element_size() for tensor in (*self.keys, *self.values))

    @property
    def device(self) -> torch.device:
        """Where it lies."""
        return self.keys[0].device

    def to(
        self, device: torch.device | str | torch.dtype | None = None, dtype: torch.dtype | None = None
    ) -> ReferenceCache:
        """A copy elsewhere or in another type, itself where nothing changes.

        On the CPU it takes no GPU memory, and every block of every pass fetches its share.

        Args:
            device: where to, or, as with tensors, the type in its place.
            dtype: of keys and values.

        Raises:
            UserError: two types.
        """
        if isinstance(device, torch.dtype):
            if dtype is not None:
                raise UserError(f"dtype: given twice, {device} and {dtype}; give a device and a dtype")
            device, dtype = None, device
        mask = None if self.mask is None else self.mask.to(device)
        return dataclasses.replace(self._map(lambda tensor: tensor.to(device, dtype)), mask=mask)

    def repeat(self, times: int) -> ReferenceCache:
        """The samples `times` times over, one after the other: B · times of them. A single one takes no memory."""

        def again(tensor: Tensor) -> Tensor:
            return tensor.expand(times, *tensor.shape[1:]) if len(self) == 1 else torch.cat([tensor] * times)

        return dataclasses.replace(self._map(again), mask=None if self.mask is None else again(self.mask))

    def repeat_interleave(self, times: int) -> ReferenceCache:
        """Every sample `times` times, each next to its own copies."""
        if len(self) == 1:
            return self.repeat(times)
        mask = None if self.mask is None else self.mask.repeat_interleave(times, 0)
        return dataclasses.replace(self._map(lambda tensor: tensor.repeat_interleave(times, 0)), mask=mask)

    def _map(self, change: Callable[[Tensor], Tensor]) -> ReferenceCache:
        return dataclasses.replace(self, keys=tuple(map(change, self.keys)), values=tuple(map(change, self.values)))

    def save(self, path: str | Path) -> Path:
        """Write one safetensors file, atomically; an existing one is replaced.

        Raises:
            UserError: a name that does not end in .safetensors.
        """
        path = Path(path)
        if path.suffix != ".safetensors":
            raise UserError(f"path must end in .safetensors, got {str(path)!r}")
        tensors = {f"keys.{index}": tensor for index, tensor in enumerate(self.keys)}
        tensors |= {f"values.{index}": tensor for index, tensor in enumerate(self.values)}
        if self.mask is not None:
            tensors["mask"] = self.mask
        tensors = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
        facts = {name: getattr(self, name) for name in _FIELDS}
        with atomic_file(path) as temporary:
            save_tensors(temporary, tensors, {"format": "pt", FORMAT: json.dumps(facts)})
        return path

    @classmethod
    def load(cls, path: str | Path, device: torch.device | str = "cpu") -> ReferenceCache:
        """Read what `save` wrote.

        Raises:
            UserError: no such file, or another one.
        """
        from safetensors import SafetensorError, safe_open

        try:
            with safe_open(path, "pt", device=str(device)) as file:
                facts = _checked(parse_json((file.metadata() or {})[FORMAT]))
                tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118  # no dict
            blocks = (len(tensors) - ("mask" in tensors)) // 2
            keys, values = (
                tuple(tensors[f"{part}.{index}"] for index in range(blocks)) for part in ("keys", "values")
            )
            return cls(keys, values, tensors.get("mask"), **{name: facts[name] for name in _FIELDS})
        except FileNotFoundError:
            raise UserError(f"path: {str(path)!r} does not exist") from None
        except (SafetensorError, OSError, KeyError, ValueError, TypeError) as error:
            reason = " ".join(str(error).split())[:200]
            raise UserError(f"path: {str(path)!r} holds no cached references ({reason})") from None


def _checked(facts: Any) -> dict[str, Any]:
    """What a file says of its keys and values, by type and range.

    Raises:
        TypeError, ValueError: anything else.
    """
    if not isinstance(facts, dict) or not isinstance(facts.get("frames"), int) or not 0 < facts["frames"] < 10**6:
        raise ValueError("no number of frames")
    if not all(isinstance(value, str | int | None) for value in facts.values()):
        raise ValueError("other facts than it was written with")
    return facts
