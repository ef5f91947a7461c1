"""Attention processors that keep references' keys and values, and that let video tokens read them.

They are installed in front of the block's own processors, to which they leave every pass without references.
Attention goes through diffusers' dispatcher, so that its attention backends work. Each has its own slot instead of a
block number, so that torch.compile makes one graph for all blocks.

Shape letters: B batch, R real references of the batch, N tokens, T reference tokens of a sample.
"""

from __future__ import annotations

from typing import Any

import torch
from diffusers.models.attention_dispatch import dispatch_attention_fn
from torch import Tensor

from ..errors import UserError
from ..families.base import Family

OFF, WRITE, READ = "off", "write", "read"


class _InFront:
    """In front of another processor; attention backends are set through to it."""

    def __init__(self, original: Any):
        self.original = original
        self.mode = OFF

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
    """Self-attention that writes or reads references' keys and values.

    Attributes:
        original: the block's own processor.
        mode: OFF: the original's; WRITE: attend as usual and keep keys and values; READ: attend to the tokens' own and
            to those in the slot.
        keys, values: the slot, (B, T, heads, head_dim); as written, (R, N, heads, head_dim).
        mask: (..., 1, 1, keys) bool of the keys that may be attended to; None: all.
        ends: whether nothing but keys and values is used of a reference pass: the last block's, if it is not aligned.
    """

    def __init__(self, original: Any, family: Family, ends: bool):
        super().__init__(original)
        self.family = family
        self.ends = ends
        self.keys: Tensor | None = None
        self.values: Tensor | None = None
        self.mask: Tensor | None = None

    def __call__(self, attention: Any, *args: Any, **kwargs: Any) -> Tensor:
        if self.mode == OFF:
            return self.original(attention, *args, **kwargs)
        query, key, value = self.family.attention_inputs(attention, *args, **kwargs)
        if self.mode == WRITE:
            # Autocast norms keys in float32, and casts them to the values' type again when they are attended to.
            self.keys, self.values = key.to(value.dtype), value
            if self.ends:
                return torch.zeros_like(args[0])
        elif self.keys is not None and self.values is not None:
            key, value = _append(key, self.keys), _append(value, self.values)
        attended = dispatch_attention_fn(query, key, value, attn_mask=self.mask, backend=self._attention_backend)
        return self.family.attention_output(attention, attended.flatten(2).type_as(query))

    def set(self, mode: str, keys: Tensor | None = None, values: Tensor | None = None, mask: Tensor | None = None):
        """Choose what it does from now on."""
        self.mode, self.keys, self.values, self.mask = mode, keys, values, mask


class SkippedProcessor(_InFront):
    """Cross-attention that references skip: in mode WRITE its output is zero, else the original's."""

    def __call__(self, attention: Any, hidden_states: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        if self.mode == WRITE:
            return torch.zeros_like(hidden_states)
        return self.original(attention, hidden_states, *args, **kwargs)


def _append(tokens: Tensor, references: Tensor) -> Tensor:
    """(B, tokens + T, heads, head_dim), each head's in one piece: the layout in which attention is fastest."""
    if references.requires_grad:
        # Their gradient waits for the references' own backward, the last of all. As a view, which joining makes it, it
        # would keep the gradient of all tokens, twice in every block.
        references = references.view_as(references)
        references.register_hook(torch.clone)
    return torch.cat([tokens.transpose(1, 2), references.to(tokens).transpose(1, 2)], 2).transpose(1, 2)


def install(attention: Any, processor: _InFront) -> None:
    """Put `processor` in front of the attention's own.

    Raises:
        UserError: the attention runs in parallel over several devices, which cannot read references.
    """
    if processor._parallel_config is not None:
        raise UserError("references: context parallelism is not supported; disable it before loading an adapter")
    attention.set_processor(processor)


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
