"""References waiting for the transformer's next call, and what one call of it knows.

Shape letters: B batch, C latent channels, M references, h and w latent height and width, N tokens per reference,
R real references of the whole batch.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from ..errors import UserError
from .reference_cache import ReferenceCache

BUSY = (
    "this transformer is in use with references in another thread; let threads take turns (a lock around the call), "
    "or give each a transformer of its own"
)


@dataclass
class References:
    """References in the order in which the transformer sees them: real ones first, cut to the fullest sample's number.

    Attributes:
        latents: (B, C, M', h, w).
        mask: (B, M') bool, True where real; None when all are.
        order: (B, M) the given index of each position, or None when the order is as given.
        given: M, the number of references before padding was cut off.
        tokens: (B, M', N) bool, True where a token is kept; None: all are.
    """

    latents: Tensor
    mask: Tensor | None
    order: Tensor | None
    given: int
    tokens: Tensor | None = None

    @property
    def count(self) -> int:
        """M', the references that ride along."""
        return self.latents.shape[2]

    @property
    def clips(self) -> Tensor:
        """(R, C, 1, h, w): each real reference as a clip of one latent frame, sample by sample."""
        return self.of_real(self.latents.transpose(1, 2)).unsqueeze(2)

    def of_real(self, values: Tensor) -> Tensor:
        """(B, M', ...) to (R, ...): those of real references, sample by sample."""
        return values.flatten(0, 1) if self.mask is None else values[self.mask]

    def of_all(self, values: Tensor) -> Tensor:
        """(R, ...) back to (B, M', ...), zero where padded."""
        shape = self.latents.shape[0], self.count
        if self.mask is None:
            return values.unflatten(0, shape)
        padded = values.new_zeros(*shape, *values.shape[1:])
        padded[self.mask] = values
        return padded

    def restore(self, features: Tensor) -> Tensor:
        """(B, M', N, dim) in the transformer's order to (B, M, N, dim) as given; zero where padded."""
        if self.mask is not None:
            features = features * self.mask[:, :, None, None]
        if self.given > self.count:
            features = torch.nn.functional.pad(features, (0, 0, 0, 0, 0, self.given - self.count))
        if self.order is None:
            return features
        inverse = self.order.argsort(dim=1)[:, :, None, None].expand_as(features)
        return features.gather(1, inverse)


def prepare_references(latents: Tensor, mask: Tensor | None = None, tokens: Tensor | None = None) -> References | None:
    """Check references, move real ones to the front and cut off padding that no sample needs.

    Moving matters because a reference's position is its place in the sequence: with gaps, a sample would not get what
    it gets alone.

    Args:
        latents: (B, C, M, h, w) normalised latents.
        mask: (B, M) bool, True where a reference is real; None: all are.
        tokens: (B, M, rows, columns) bool, True where a token is kept; None: all are.

    Returns:
        The references, or None when none is real.

    Raises:
        UserError: shapes that do not fit, or a real reference without a token.
    """
    if latents.ndim != 5:
        raise UserError(f"references must have shape (B, C, M, h, w), got {tuple(latents.shape)}")
    given = latents.shape[2]
    if tokens is not None:
        tokens = _check_tokens(latents, mask, tokens)
    if mask is None:
        return References(latents, None, None, given, tokens) if given else None
    if mask.shape != (latents.shape[0], given):
        raise UserError(f"mask must have shape (B, M) = {(latents.shape[0], given)}, got {tuple(mask.shape)}")
    mask = mask.to(latents.device, torch.bool)
    count = int(mask.sum(1).max()) if mask.numel() else 0
    if count == 0:
        return None
    order = mask.logical_not().to(torch.int8).argsort(dim=1, stable=True)
    moved = not torch.equal(order, torch.arange(given, device=order.device).expand_as(order))
    if moved:
        latents = latents.gather(2, order[:, None, :, None, None].expand_as(latents))
        mask = mask.gather(1, order)
        tokens = None if tokens is None else tokens.gather(1, order[:, :, None].expand_as(tokens))
    mask = mask[:, :count]
    return References(
        latents[:, :, :count],
        None if mask.all() else mask,
        order if moved else None,
        given,
        None if tokens is None else tokens[:, :count],
    )


def _check_tokens(latents: Tensor, mask: Tensor | None, tokens: Tensor) -> Tensor | None:
    """(B, M, N), or None when all tokens are kept."""
    if tokens.ndim != 4 or tokens.shape[:2] != (latents.shape[0], latents.shape[2]):
        wanted = (latents.shape[0], latents.shape[2], "rows", "columns")
        raise UserError(f"tokens must have shape (B, M, rows, columns) = {wanted}, got {tuple(tokens.shape)}")
    kept = tokens.flatten(2).to(latents.device, torch.bool)
    real = kept if mask is None else kept | ~mask.to(kept.device, torch.bool)[:, :, None]
    if not real.any(2).all():
        raise UserError("tokens: a reference keeps none of its tokens; each needs at least one")
    return None if real.all() else kept


@dataclass
class Pass:
    """One call of the transformer; hooks read it, also when gradient checkpointing runs a block a second time.

    Attributes:
        references: what rides along, or, in isolated attention, what this pass is made of; None without.
        tokens: reference tokens at the end of the sequence, M' · N (joint attention).
        key_mask: (..., 1, 1, keys) bool, True where a token may be attended to; None: all.
        cache: keys and values that video tokens read (isolated attention); None: this pass has none.
        writes: whether this pass is the references' own and leaves keys and values behind (isolated attention).
        capture: whether aligned blocks put their reference tokens into `features`.
        features: block index -> reference tokens in the transformer's order: joint (B, M', N, dim), isolated
            (R, N, dim).
        written: keys and values of every block, once a references' pass is over.
        undo: what has to be put back when the pass is over.
    """

    references: References | None = None
    tokens: int = 0
    key_mask: Tensor | None = None
    cache: ReferenceCache | None = None
    writes: bool = False
    capture: bool = False
    features: dict[int, Tensor] = field(default_factory=dict)
    written: list[tuple[Any, Any]] = field(default_factory=list)
    undo: ExitStack = field(default_factory=ExitStack)

    def given_features(self) -> dict[int, Tensor]:
        """`features` as (B, M, N, dim) in the order as given, zero where padded; none without references."""
        references, features = self.references, self.features
        if references is None:
            return {}
        if self.writes:
            features = {index: references.of_all(tokens) for index, tokens in features.items()}
        return {index: references.restore(tokens) for index, tokens in features.items()}


class BranchState:
    """What the hooks share: the references of the next call, the call that runs, the pass that features are from.

    One thread at a time: a second one that calls the transformer while references wait or ride is refused.
    """

    def __init__(self) -> None:
        self.pending: References | ReferenceCache | None = None
        self.current: Pass | None = None
        self.latest: Pass | None = None
        self.capture = False
        self._stack: list[Pass] = []
        self._owner: int | None = None
        self._lock = threading.Lock()

    def __getstate__(self) -> dict[str, Any]:
        """A copy of a transformer has no references waiting and no thread."""
        return {"capture": self.capture}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__init__()
        self.capture = state["capture"]

    @contextmanager
    def waiting(self, references: References | ReferenceCache | None) -> Iterator[None]:
        """Have `references` ride along with every call inside the context.

        Raises:
            UserError: another thread's references wait or ride.
        """
        outer = self._claim()
        previous, self.pending = self.pending, references
        try:
            yield
        finally:
            self.pending = previous
            self._owner = outer

    def begin(self, current: Pass) -> None:
        """Make `current` the pass that hooks see, until `end`.

        Raises:
            UserError: another thread's references wait or ride.
        """
        outer = self._claim()
        current.undo.callback(setattr, self, "_owner", outer)
        self._stack.append(current)
        self.current = current

    def end(self) -> Pass | None:
        """End the pass that began last and put back what it changed; None when this thread has begun none."""
        if not self._stack or self._owner != threading.get_ident():
            return None
        ended = self._stack.pop()
        self.current = self._stack[-1] if self._stack else None
        ended.undo.close()
        return ended

    def is_running(self, current: Pass) -> bool:
        """Whether `current` has begun and not ended."""
        return any(item is current for item in self._stack)

    @contextmanager
    def running(self, current: Pass) -> Iterator[None]:
        """Make `current` the pass that hooks see."""
        previous, self.current = self.current, current
        try:
            yield
        finally:
            self.current = previous

    def _claim(self) -> int | None:
        """Make this thread the one that uses the transformer; returns the owner before it."""
        with self._lock:
            outer, me = self._owner, threading.get_ident()
            if outer not in (None, me):
                raise UserError(BUSY)
            self._owner = me
            return outer
