"""A diffusers attention processor's own code, with another function in the place of its attention.

Everything else that a model does to queries, keys and values (norms, rotary positions, gates, text beside the video)
stays diffusers' own; only the call that attends is ours.
"""

from __future__ import annotations

import inspect
from functools import cache
from types import FunctionType
from typing import Any

import torch.nn.functional as F
from torch import Tensor

from ..errors import UserError

ATTENTION, FUNCTIONAL = "dispatch_attention_fn", "F"
"""Names by which processors call attention: diffusers' dispatcher, or `F.scaled_dot_product_attention`."""


class Rewired:
    """A processor class's `__call__` that attends by `slot.attend`.

    One for all blocks of a transformer, so that torch.compile makes one graph of them; one per transformer, so that
    threads with a transformer each do not meet.

    Args:
        kind: the processor's class.

    Raises:
        UserError: its code calls no attention function that is known.
    """

    def __init__(self, kind: type):
        call: Any = kind.__call__
        self.kind = kind
        self.slot: Any = None
        if not {ATTENTION, FUNCTIONAL} & set(call.__code__.co_names):
            raise UserError(
                f"references: {kind.__name__} calls no attention function that is known; set the stock one"
            )
        # Without its module's name torch.compile reads these globals, not the module's.
        names = {name: value for name, value in call.__globals__.items() if name != "__name__"}
        names |= {ATTENTION: self.attend, FUNCTIONAL: _Functional(self)}
        self.call = FunctionType(call.__code__, names, call.__name__, call.__defaults__, call.__closure__)
        self.call.__kwdefaults__ = call.__kwdefaults__

    def __reduce__(self) -> Any:  # its function cannot be found by name
        return Rewired, (self.kind,)

    def attend(self, *args: Any, **kwargs: Any) -> Tensor:
        """In place of `dispatch_attention_fn`."""
        return self.slot.attend(*args, **kwargs)


class _Functional:
    """`torch.nn.functional` as processors see it."""

    def __init__(self, rewired: Rewired):
        self._rewired = rewired

    def __getattr__(self, name: str) -> Any:
        return getattr(F, name)

    def scaled_dot_product_attention(
        self, query: Tensor, key: Tensor, value: Tensor, attn_mask: Tensor | None = None, **options: Any
    ) -> Tensor:
        """Heads stand before tokens here, and behind them in the dispatcher."""
        given = (part.transpose(1, 2) for part in (query, key, value))
        return self._rewired.slot.attend(*given, attn_mask=attn_mask, **options).transpose(1, 2)


@cache
def in_front_of(kind: type, original: type) -> type:
    """A subclass of `kind` whose call has the signature of the processor class it stands in front of: diffusers'
    `Attention` hands on the keyword arguments that its processor names, and no others."""

    def __call__(self: Any, *args: Any, **kwargs: Any) -> Any:
        return kind.__call__(self, *args, **kwargs)

    __call__.__signature__ = inspect.signature(original.__call__)  # type: ignore[attr-defined]
    return type(kind.__name__, (kind,), {"__call__": __call__, "made_of": (kind, original)})


def revive(kind: type, original: type) -> Any:
    """An empty processor, for copies and pickles: its class is made at run time."""
    made = in_front_of(kind, original)
    return object.__new__(made)
