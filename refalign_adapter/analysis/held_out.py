"""Held-out rows through a transformer with an adapter, each with noise that depends on the row alone.

Measures that compare conditions give all of them the same clip, caption, noise and sigma.

Shape letters: B batch, C latent channels, F latent frames, H and W latent height and width.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from ..batch import Batch, CachedSample, moved_text
from ..branch.reference_branch import ReferenceBranch
from ..flow import interpolate


@contextmanager
def evaluating(transformer: Any) -> Iterator[None]:
    """The transformer in eval mode; afterwards in the mode it was in."""
    training = transformer.training
    transformer.eval()
    try:
        yield
    finally:
        transformer.train(training)


def rows_of_one_shape(samples: Sequence[CachedSample]) -> list[list[int]]:
    """Indices of samples of one shape and number of references together; those without references are left out."""
    shapes: dict[tuple, list[int]] = {}
    for index, sample in enumerate(samples):
        if len(sample.subjects):
            shapes.setdefault((sample.latents.shape, sample.references.shape[1:]), []).append(index)
    return list(shapes.values())


class RowNoise:
    """Noise of rows, a stream each, made of the seed and the row's number: the same in any batch, for any adapter."""

    def __init__(self, rows: Sequence[int], seed: int):
        self._generators = [torch.Generator().manual_seed(seed * 1_000_003 + row) for row in rows]

    def like(self, latents: Tensor) -> Tensor:
        """The next noise of every row, float32, in the shape (B, C, F, H, W) of latents and on their device."""
        drawn = [torch.randn(latents.shape[1:], generator=generator) for generator in self._generators]
        return torch.stack(drawn).to(latents.device)


def predicted_velocity(
    branch: ReferenceBranch, batch: Batch, source: Batch | None, noise: Tensor, sigma: float
) -> Tensor:
    """(B, C, F, H, W) velocity of `batch` at `sigma`, in (0, 1], with the references of `source`.

    With None it goes without references, or with what the adapter's `null_reference` has in their place.
    """
    transformer: Any = branch.transformer
    sigmas = torch.full((len(batch.latents),), sigma, device=batch.latents.device)
    noisy = interpolate(batch.latents.float(), noise, sigmas).to(transformer.dtype)
    family, text = branch.family, moved_text(batch.text, dtype=transformer.dtype)
    arguments = family.forward_arguments(transformer, noisy, sigmas, text)
    references = (None, None, None) if source is None else (source.references, source.mask, source.tokens)
    if source is None and branch.config.null_reference == "zeros":
        references = torch.zeros_like(batch.references), batch.mask, batch.tokens
    with branch.references(*references):
        return family.prediction(transformer, arguments, transformer(**arguments))
