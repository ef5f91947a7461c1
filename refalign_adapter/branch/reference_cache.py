"""`ReferenceCache`: the keys and values that references leave behind in every block, for any number of passes.

Shape letters: B batch, T reference tokens of a sample (padded to the batch's largest number).
"""

from __future__ import annotations

import dataclasses
import json
import math
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..atomic import atomic_file
from ..config_checks import MAX_NAME
from ..errors import UserError, one_line, shorten
from ..json_files import parse_json
from ..tensor_files import save_tensors

FORMAT = "refalign_reference_cache"
_FIELDS = ("frames", "adapter", "adapter_name")
_SIZES = ("grid", "canvas")
_PARTS = ("keys", "values")
_MOST = 10**6
_TYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)


@dataclass(frozen=True)
class ReferenceCache:
    """Keys and values of one or several samples' references (isolated attention).

    `pipe.encode_references` makes one; it serves any prompt, seed, number of steps and guidance. It depends on the
    adapter, its weight and the base; unless the adapter has a `reference_frame`, on the video's length; and with
    `reference_place` "beyond" on its height and width.

    Attributes:
        keys, values: per block, (B, T, heads, head_dim), rotated to their positions.
        mask: (B, T) bool, True where a token is real; None: all are.
        frames: latent frames of the video they are placed after; None: they have a place of their own.
        adapter: fingerprint of the adapter they were made with.
        adapter_name: its name, for messages.
        grid: rows and columns in tokens of the video whose end they are placed beyond; None: they begin at 0.
        null: what a pass without references reads in their place, of an adapter with `null_reference` "zeros"; None:
            nothing.
        canvas: latent rows and columns of the references, which follow from the video's size unless the adapter has a
            `reference_size`; None: not known, as in caches of before 0.2.
    """

    keys: tuple[Tensor, ...]
    values: tuple[Tensor, ...]
    mask: Tensor | None = None
    frames: int | None = None
    adapter: str = ""
    adapter_name: str = ""
    grid: tuple[int, int] | None = None
    null: ReferenceCache | None = None
    canvas: tuple[int, int] | None = None

    def __len__(self) -> int:
        """B, the samples it is for."""
        return self.keys[0].shape[0]

    @property
    def tokens(self) -> int:
        """T."""
        return self.keys[0].shape[1]

    @property
    def nbytes(self) -> int:
        """Bytes of keys and values, those of `null` included."""
        own = sum(tensor.numel() * tensor.element_size() for tensor in (*self.keys, *self.values))
        return own + (0 if self.null is None else self.null.nbytes)

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
        return self._map(lambda tensor: tensor.to(device, dtype), lambda mask: mask.to(device))

    def repeat(self, times: int) -> ReferenceCache:
        """The samples `times` times over, one after the other: B · times of them. A single one takes no memory."""

        def again(tensor: Tensor) -> Tensor:
            return tensor.expand(times, *tensor.shape[1:]) if len(self) == 1 else torch.cat([tensor] * times)

        return self._map(again, again)

    def repeat_interleave(self, times: int) -> ReferenceCache:
        """Every sample `times` times, each next to its own copies."""
        if len(self) == 1:
            return self.repeat(times)

        def beside(tensor: Tensor) -> Tensor:
            return tensor.repeat_interleave(times, 0)

        return self._map(beside, beside)

    def _map(self, change: Callable[[Tensor], Tensor], change_mask: Callable[[Tensor], Tensor]) -> ReferenceCache:
        return dataclasses.replace(
            self,
            keys=tuple(map(change, self.keys)),
            values=tuple(map(change, self.values)),
            mask=None if self.mask is None else change_mask(self.mask),
            null=None if self.null is None else self.null._map(change, change_mask),
        )

    def save(self, path: str | Path) -> Path:
        """Write one safetensors file, atomically; an existing one is replaced.

        Raises:
            UserError: a name that does not end in .safetensors.
        """
        path = Path(path)
        if path.suffix != ".safetensors":
            raise UserError(f"path must end in .safetensors, got {str(path)!r}")
        tensors = {f"{part}.{index}": item for part in _PARTS for index, item in enumerate(getattr(self, part))}
        if self.null is not None:
            tensors |= {f"null_{part}.{i}": item for part in _PARTS for i, item in enumerate(getattr(self.null, part))}
        if self.mask is not None:
            tensors["mask"] = self.mask
        tensors = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
        facts = {name: getattr(self, name) for name in _FIELDS}
        facts |= {name: size for name in _SIZES if (size := getattr(self, name)) is not None}
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
            blocks = sum(name.startswith("keys.") for name in tensors)
            named: dict[str, Any] = {name: facts[name] for name in _FIELDS}
            named |= {name: tuple(facts[name]) for name in _SIZES if name in facts}
            _check_tensors(tensors, blocks)
            cache = cls(*_parts(tensors, blocks), tensors.get("mask"), **named)
            if "null_keys.0" not in tensors:
                return cache
            keys, values = _parts(tensors, blocks, "null_")
            return dataclasses.replace(cache, null=dataclasses.replace(cache, keys=keys, values=values))
        except FileNotFoundError:
            raise UserError(f"path: {str(path)!r} does not exist") from None
        except (SafetensorError, OSError, KeyError, ValueError, TypeError) as error:
            reason = one_line(error)
            raise UserError(f"path: {str(path)!r} holds no cached references ({reason})") from None


def _parts(tensors: dict[str, Tensor], blocks: int, prefix: str = "") -> tuple[tuple[Tensor, ...], tuple[Tensor, ...]]:
    """Keys and values of every block.

    Raises:
        KeyError: one is missing.
    """
    keys, values = (tuple(tensors[f"{prefix}{part}.{index}"] for index in range(blocks)) for part in _PARTS)
    return keys, values


def _check_tensors(tensors: dict[str, Tensor], blocks: int) -> None:
    """Refuse what attention would read wrongly or beyond its end.

    Raises:
        ValueError: other tensors than `save` writes, of other types or shapes, or that are not finite.
    """
    own = {f"{part}.{index}" for part in _PARTS for index in range(blocks)}
    null = {f"null_{name}" for name in own}
    names = tensors.keys() - {"mask"}
    if not blocks or names not in (own, own | null):
        raise ValueError("other tensors than keys and values of every block")
    shape, dtype = tensors["keys.0"].shape, tensors["keys.0"].dtype
    if len(shape) != 4 or 0 in shape or dtype not in _TYPES:
        raise ValueError(f"keys of shape {tuple(shape)} and type {dtype}")
    for name in sorted(names):
        tensor = tensors[name]
        if tensor.shape != shape or tensor.dtype != dtype:
            raise ValueError(f"{name} of another shape or type than keys.0")
        if not all(map(math.isfinite, torch.aminmax(tensor))):
            raise ValueError(f"{name} holds what is no number")
    mask = tensors.get("mask")
    if mask is not None and (mask.dtype != torch.bool or mask.shape != shape[:2] or not mask.any(1).all()):
        raise ValueError("a mask that does not say of each token whether it is real")


def _checked(facts: Any) -> dict[str, Any]:
    """What a file says of its keys and values, by type and range.

    Raises:
        TypeError, ValueError: anything else.
    """
    if not isinstance(facts, dict) or not (facts.get("frames", 0) is None or _is_size(facts.get("frames"))):
        raise ValueError("no number of frames")
    if unknown := sorted(facts.keys() - {*_FIELDS, *_SIZES}):
        raise ValueError(f"{shorten(unknown[0])} is no fact of such a file")
    if not all(isinstance(facts.get(name), str) and len(facts[name]) <= MAX_NAME for name in _FIELDS[1:]):
        raise ValueError("no name of the adapter that they were made with")
    for size in (facts.get(name, [1, 1]) for name in _SIZES):
        if not isinstance(size, list) or len(size) != 2 or not all(map(_is_size, size)):
            raise ValueError("no rows and columns")
    return facts


def _is_size(value: Any) -> bool:
    return type(value) is int and 0 < value < _MOST
