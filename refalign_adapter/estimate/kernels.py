"""What a GPU does otherwise than torch's "meta" device: fused kernels, and autocast, which meta has not.

On meta, attention and RMS norm would be taken apart into steps that keep far more than the kernels of a GPU do. Each
kernel is stood for by what it allocates and what it keeps for backward; nothing is computed.

Shape letters: B batch, H heads, Q and K queries and keys, D width of a head.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_map

LOWER = frozenset(
    "linear conv1d conv2d conv3d conv_transpose1d conv_transpose2d conv_transpose3d matmul __matmul__ mm bmm mv addmm "
    "baddbmm addbmm einsum scaled_dot_product_attention".split()
)
UPPER = frozenset(
    "layer_norm rms_norm group_norm softmax log_softmax softplus exp log reciprocal rsqrt pow __pow__ sum prod cumsum "
    "cosine_similarity mse_loss l1_loss smooth_l1_loss huber_loss logsumexp".split()
)
"""What autocast runs in the lower type and in float32: those of torch's `ATen/autocast_mode.h` that DiTs use."""


class GpuKernels(TorchFunctionMode):
    """Inside this context, functions of meta tensors allocate and keep what they do on a CUDA GPU.

    Torch leaves the context for the time of a backward pass: what that runs again must enter it by `once`.

    Args:
        autocast: autocast's lower type; None: it is off.
    """

    def __init__(self, autocast: torch.dtype | None = None):
        super().__init__()
        self.autocast = autocast
        self._cast: dict[Tensor, Tensor] = {}
        self._entered = False

    @contextmanager
    def once(self) -> Iterator[None]:
        """The context, unless it is entered already; trained weights are cast once in it, as by autocast."""
        if self._entered:
            yield
            return
        self._entered, self._cast = True, {}
        try:
            with self:
                yield
        finally:
            self._entered, self._cast = False, {}

    def __torch_function__(self, func: Any, types: Any, args: tuple = (), kwargs: dict[str, Any] | None = None) -> Any:
        kwargs = kwargs or {}
        name = getattr(func, "__name__", "")
        if self.autocast is not None and name in LOWER | UPPER:
            wanted = self.autocast if name in LOWER else torch.float32
            args = tree_map(lambda value: self._as(value, wanted), args)
            kwargs = {key: self._as(value, wanted) for key, value in kwargs.items()}
        if name in FUSED and any(isinstance(value, Tensor) and value.is_meta for value in (*args, *kwargs.values())):
            return FUSED[name](*args, **kwargs)
        return func(*args, **kwargs)

    def _as(self, value: Any, dtype: torch.dtype) -> Any:
        """A floating point tensor in autocast's type, all else as it is."""
        if not isinstance(value, Tensor) or not value.is_meta or not value.is_floating_point():
            return value
        if value.dtype in (dtype, torch.float64):
            return value
        if not (value.is_leaf and value.requires_grad) or dtype != self.autocast:
            return value.to(dtype)
        if value not in self._cast:
            self._cast[value] = value.to(dtype)
        return self._cast[value]


class _Attention(torch.autograd.Function):
    """Flash attention (arXiv 2307.08691): keeps queries, keys, values, output and a float32 per query and head.

    Its backward adds up the queries' gradient in float32.
    """

    @staticmethod
    def forward(ctx: Any, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        output = torch.empty_like(query)
        ctx.save_for_backward(query, key, value, output, query.new_empty(query.shape[:3], dtype=torch.float32))
        return output

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, ...]:
        query, key, value, _, sums = ctx.saved_tensors
        accumulated = torch.empty_like(query, dtype=torch.float32), torch.empty_like(sums)
        found = torch.empty_like(query), torch.empty_like(key), torch.empty_like(value)
        del accumulated
        return found


def _attention(query: Tensor, key: Tensor, value: Tensor, *_: Any, **__: Any) -> Tensor:
    """(B, H, Q, D) of queries (B, H, Q, D), keys and values (B, H, K, D)."""
    return _Attention.apply(query, key, value)  # type: ignore[return-value]


class _RmsNorm(torch.autograd.Function):
    """Fused RMS norm: keeps its input, its weight and a float32 per token."""

    @staticmethod
    def forward(ctx: Any, states: Tensor, weight: Tensor | None, dims: int) -> Tensor:
        scale = states.new_empty(states.shape[: states.ndim - dims], dtype=torch.float32)
        ctx.save_for_backward(states, weight, scale)
        return torch.empty_like(states)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        states, weight, _ = ctx.saved_tensors
        wanted = ctx.needs_input_grad
        return (
            torch.empty_like(states) if wanted[0] else None,
            torch.empty_like(weight) if wanted[1] else None,
            None,
        )


def _rms_norm(input: Tensor, normalized_shape: Any, weight: Tensor | None = None, eps: float | None = None) -> Tensor:
    return _RmsNorm.apply(input, weight, len(normalized_shape))  # type: ignore[return-value]


FUSED: dict[str, Callable[..., Tensor]] = {"scaled_dot_product_attention": _attention, "rms_norm": _rms_norm}
