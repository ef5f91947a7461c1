"""How many bytes of tensors live while code runs, on a device that may be torch's "meta", which holds no data."""

from __future__ import annotations

import weakref
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves


class LiveBytes(TorchDispatchMode):
    """Inside this context, every storage that an operation makes counts from then on until it is freed.

    What was there before, such as a model's weights, does not count. What a kernel allocates for itself and frees
    again is not seen, nor is an allocator's rounding. Copies from meta to the host, which cannot be made, are counted
    and stood for by tensors of the same shape that take nothing.

    Args:
        device: type of the device whose tensors are counted.

    Attributes:
        live: bytes now.
        peak: the most that lived at a time.
        host: bytes of all copies from meta to the host, each rounded up to a power of two, as torch pins memory.
    """

    def __init__(self, device: str = "meta"):
        super().__init__()
        self.device = device
        self.live = self.peak = self.host = 0
        self._known: weakref.WeakSet[Any] = weakref.WeakSet()

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple = (), kwargs: dict[str, Any] | None = None) -> Any:
        kwargs = kwargs or {}
        if func is torch.ops.aten._to_copy.default and args[0].is_meta and kwargs.get("device") == torch.device("cpu"):
            return self._to_host(args[0])
        for storage in self._storages((args, kwargs)):
            self._known.add(storage)  # a weight, met first as what an operation reads
        output = func(*args, **kwargs)
        for storage in self._storages(output):
            if storage not in self._known:
                self._count(storage)
        return output

    def _storages(self, values: Any) -> Iterable[Any]:
        return (
            value.untyped_storage()
            for value in tree_leaves(values)
            if isinstance(value, Tensor) and value.device.type == self.device
        )

    def _count(self, storage: Any) -> None:
        size = storage.nbytes()
        self._known.add(storage)
        self.live += size
        self.peak = max(self.peak, self.live)
        weakref.finalize(storage, self._free, size)

    def _to_host(self, tensor: Tensor) -> Tensor:
        size = tensor.numel() * tensor.element_size()
        self.host += 1 << (size - 1).bit_length() if size else 0
        return torch.empty((), dtype=tensor.dtype).expand(tensor.shape)

    def _free(self, size: int) -> None:
        self.live -= size


def bytes_of(tensors: Iterable[Tensor]) -> int:
    """Bytes of the tensors' storages, each once."""
    storages = {id(storage): storage for storage in (tensor.untyped_storage() for tensor in tensors)}
    return sum(storage.nbytes() for storage in storages.values())


def module_bytes(module: torch.nn.Module) -> int:
    """Bytes of a module's parameters and buffers."""
    return bytes_of([*module.parameters(), *module.buffers()])
