"""Attention processors that keep references' keys and values, and that let video tokens read them.

They are installed in front of the block's own processors, to which they leave every pass without references; in others
that one's code runs with `attend` in the place of diffusers' attention function, see `rewired`. Attention goes through
diffusers' dispatcher, so that its attention backends work. Each has its own slot instead of a block number, so that
torch.compile makes one graph for all blocks.

Where text tokens share an attention with video tokens, both are in queries, keys and values; `Family.text_first` says
which come first. References have no text: theirs is neither kept nor attended to.

Shape letters: B batch, R real references of the batch, N tokens, T reference tokens of a sample, S text tokens.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from diffusers.models.attention_dispatch import dispatch_attention_fn
from torch import Tensor

from ..errors import UserError
from ..families.base import Family
from .rewired import Rewired, in_front_of, revive

OFF, WRITE, READ, MASK = "off", "write", "read", "mask"


class _InFront:
    """In front of another processor; attention backends are set through to it."""

    made_of: tuple[type, type]

    def __init__(self, original: Any):
        self.original = original
        self.mode = OFF

    @property
    def base(self) -> Any:
        """The block's own processor, behind all that stand in front of it."""
        found = self.original
        while isinstance(found, _InFront):
            found = found.original
        return found

    def __reduce_ex__(self, protocol: Any) -> Any:
        return revive, self.made_of, dict(vars(self))

    @property
    def _attention_backend(self) -> Any:
        return self.original._attention_backend

    @_attention_backend.setter
    def _attention_backend(self, backend: Any) -> None:
        self.original._attention_backend = backend

    @property
    def _parallel_config(self) -> Any:
        return getattr(self.original, "_parallel_config", None)

    @_parallel_config.setter
    def _parallel_config(self, config: Any) -> None:
        self.original._parallel_config = config


class KeyValueProcessor(_InFront):
    """Self-attention that writes or reads references' keys and values, or leaves some out.

    Attributes:
        original: the block's own processor.
        mode: OFF: the original's; WRITE: attend as usual and keep keys and values; READ: attend to the tokens' own and
            to those in the slot; MASK: attend to those of the tokens' own that the mask lets through.
        keys, values: the slot, (B, T, heads, head_dim); as written, (R, N, heads, head_dim).
        mask: bool of the keys that may be attended to; None: all. WRITE: (R, 1, 1, N); READ: (B, 1, 1, T) of the slot;
            MASK: (B, 1, 1, N) of the tokens' own without text.
        ends: whether nothing but keys and values is used of a reference pass: the last block's, if it is not aligned.
    """

    def __init__(self, original: Any, family: Family, ends: bool, rewired: Rewired):
        super().__init__(original)
        self.family = family
        self.ends = ends
        self.rewired = rewired
        self.keys: Tensor | None = None
        self.values: Tensor | None = None
        self.mask: Tensor | None = None
        self.tokens = 0

    def __call__(self, attention: Any, *args: Any, **kwargs: Any) -> Any:
        if self.mode == OFF:
            return self.original(attention, *args, **kwargs)
        self.tokens = (args[0] if args else kwargs["hidden_states"]).shape[1]
        self.rewired.slot = self
        return self.rewired.call(self.base, attention, *args, **kwargs)

    def attend(
        self, query: Tensor, key: Tensor, value: Tensor, attn_mask: Tensor | None = None, **options: Any
    ) -> Tensor:
        """What the processor's code calls: (B, S + N, heads, head_dim) each, to the same of the values attended to."""
        text = query.shape[1] - self.tokens
        if self.mode == WRITE:
            return self._write(query, key, value, text, options)
        if self.mode == MASK:
            mask = self._beside_text(self.mask, text) if self.mask is not None else None
        else:
            if self.keys is None or self.values is None:
                return dispatch_attention_fn(query, key, value, attn_mask=attn_mask, **options)
            own = key.shape[1]
            key, value = _append(key, self.keys), _append(value, self.values)
            mask, attn_mask = self.mask, _with_more(attn_mask, key.shape[1] - own)
            if mask is not None:
                mask = torch.cat([mask.new_ones(*mask.shape[:-1], own), mask], -1)
        return dispatch_attention_fn(query, key, value, attn_mask=_both(attn_mask, mask), **options)

    def _write(self, query: Tensor, key: Tensor, value: Tensor, text: int, options: dict[str, Any]) -> Tensor:
        total = query.shape[1]
        if text:
            own = slice(text, None) if self.family.text_first else slice(0, total - text)
            query, key, value = query[:, own], key[:, own], value[:, own]
        # Autocast norms keys in float32, and casts them to the values' type again when they are attended to.
        self.keys, self.values = key.to(value.dtype), value
        if self.ends:
            return value.new_zeros(value.shape[0], total, *value.shape[2:])
        attended = dispatch_attention_fn(query, key, value, attn_mask=self.mask, **options)
        return (
            F.pad(attended, (0, 0, 0, 0, *((text, 0) if self.family.text_first else (0, text)))) if text else attended
        )

    def _beside_text(self, mask: Tensor, text: int) -> Tensor:
        if not text:
            return mask
        seen = mask.new_ones(*mask.shape[:-1], text)
        return torch.cat([seen, mask] if self.family.text_first else [mask, seen], -1)

    def set(self, mode: str, keys: Tensor | None = None, values: Tensor | None = None, mask: Tensor | None = None):
        """Choose what it does from now on."""
        self.mode, self.keys, self.values, self.mask = mode, keys, values, mask


class SkippedProcessor(_InFront):
    """Cross-attention that references skip: in mode WRITE its output is zero, else the original's."""

    def __call__(self, attention: Any, *args: Any, **kwargs: Any) -> Any:
        if self.mode == WRITE:
            return torch.zeros_like(args[0] if args else kwargs["hidden_states"])
        return self.original(attention, *args, **kwargs)


def _with_more(mask: Tensor | None, count: int) -> Tensor | None:
    """A model's own mask of its keys, with `count` more that it lets through; bool, or added to the scores."""
    if mask is None:
        return None
    return F.pad(mask, (0, count), value=True if mask.dtype == torch.bool else 0.0)


def _both(mask: Tensor | None, other: Tensor | None) -> Tensor | None:
    if mask is None or other is None:
        return other if mask is None else mask
    return (mask if mask.dtype == torch.bool else mask == 0) & other


def _append(tokens: Tensor, references: Tensor) -> Tensor:
    """(B, tokens + T, heads, head_dim), each head's in one piece: the layout in which attention is fastest."""
    if references.requires_grad:
        # Their gradient waits for the references' own backward, the last of all. As a view, which joining makes it, it
        # would keep the gradient of all tokens, twice in every block.
        references = references.view_as(references)
        references.register_hook(torch.clone)
    return torch.cat([tokens.transpose(1, 2), references.to(tokens).transpose(1, 2)], 2).transpose(1, 2)


def install(attention: Any, kind: type, *args: Any) -> Any:
    """Put a processor of a class, made with these further arguments, in front of the attention's own; returns it.

    Raises:
        UserError: the attention runs in parallel over several devices, which cannot read references.
    """
    processor = in_front_of(kind, type(attention.processor))(attention.processor, *args)
    if processor._parallel_config is not None:
        raise UserError("references: context parallelism is not supported; disable it before loading an adapter")
    attention.set_processor(processor)
    return processor


def uninstall(attention: Any, processor: _InFront) -> None:
    """Take `processor` out again, also from behind others that were installed after it."""
    if attention.processor is processor:
        attention.set_processor(processor.original)
        return
    other = attention.processor
    while isinstance(other, _InFront):
        if other.original is processor:
            other.original = processor.original
            return
        other = other.original
