"""References waiting for the transformer's next call, and what one call of it knows.

Shape letters: B batch, C latent channels, M references, h and w latent height and width, N tokens per reference.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field

import torch
from torch import Tensor

from ..errors import UserError


@dataclass
class References:
    """References in the order in which the transformer sees them: real ones first, cut to the fullest sample's number.

    Attributes:
        latents: (B, C, M', h, w).
        mask: (B, M') bool, True where real; None when all are.
        order: (B, M) the given index of each position, or None when the order is as given.
        given: M, the number of references before padding was cut off.
    """

    latents: Tensor
    mask: Tensor | None
    order: Tensor | None
    given: int

    @property
    def count(self) -> int:
        """M', the references that ride along."""
        return self.latents.shape[2]

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


def prepare_references(latents: Tensor, mask: Tensor | None = None) -> References | None:
    """Check references, move real ones to the front and cut off padding that no sample needs.

    Moving matters because a reference's position is its place in the sequence: with gaps, a sample would not get what
    it gets alone.

    Args:
        latents: (B, C, M, h, w) normalised latents.
        mask: (B, M) bool, True where a reference is real; None: all are.

    Returns:
        The references, or None when none is real.

    Raises:
        UserError: shapes that do not fit.
    """
    if latents.ndim != 5:
        raise UserError(f"references must have shape (B, C, M, h, w), got {tuple(latents.shape)}")
    given = latents.shape[2]
    if mask is None:
        return References(latents, None, None, given) if given else None
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
    mask = mask[:, :count]
    return References(latents[:, :, :count], None if mask.all() else mask, order if moved else None, given)


@dataclass
class Pass:
    """One call of the transformer; hooks read it, also when gradient checkpointing runs a block a second time.

    Attributes:
        references: what rides along, or None.
        tokens: reference tokens at the end of the sequence, M' · N.
        key_mask: (B, 1, 1, video tokens + M' · N) bool, True where a token may be attended to; None: all.
        capture: whether aligned blocks put their reference tokens into `features`.
        features: block index -> (B, M', N, dim), in the transformer's order.
    """

    references: References | None = None
    tokens: int = 0
    key_mask: Tensor | None = None
    capture: bool = False
    features: dict[int, Tensor] = field(default_factory=dict)


class BranchState:
    """What the hooks share: the references of the next call, the call that runs, the call that ran last."""

    def __init__(self) -> None:
        self.pending: References | None = None
        self.current: Pass | None = None
        self.latest: Pass | None = None
        self.capture = False

    @contextmanager
    def waiting(self, references: References | None) -> Iterator[None]:
        """Have `references` ride along with every call inside the context."""
        previous, self.pending = self.pending, references
        try:
            yield
        finally:
            self.pending = previous

    @contextmanager
    def running(self, current: Pass) -> Iterator[None]:
        """Make `current` the pass that hooks see."""
        previous, self.current = self.current, current
        try:
            yield
        finally:
            self.current = previous
