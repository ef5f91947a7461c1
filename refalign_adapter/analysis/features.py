"""What the transformer makes of reference images: mean tokens per reference, how well subjects part, a 2-D view.

Shape letters: B batch, C latent channels, F latent frames, M references, H and W latent height and width, S text
tokens, D text width, R references in all, L features.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from ..batch import moved_text
from ..branch.reference_branch import ReferenceBranch


@torch.no_grad()
def mean_reference_tokens(
    branch: ReferenceBranch,
    references: Tensor,
    text: Mapping[str, Tensor],
    *,
    num_frames: int,
    sigma: float = 1.0,
    seed: int = 0,
    batch_size: int = 8,
) -> dict[int, np.ndarray]:
    """Mean token of each reference after every aligned block, as the adapter stands.

    The video is noise, so that nothing of the subjects comes from elsewhere.

    Args:
        branch: the adapter on its transformer.
        references: (B, C, M, H, W) latents; those of one row ride along together.
        text: the transformer's argument -> what a prompt gave, such as (S, D) embeddings; the same for all.
        num_frames: F of the noise.
        sigma: timestep that the transformer is told, in [0, 1].
        seed: of the noise.
        batch_size: rows at a time.

    Returns:
        Block index -> float64 (B, M, dim).
    """
    transformer = branch.transformer
    generator = torch.Generator().manual_seed(seed)
    own = moved_text(text, transformer.device, transformer.dtype)
    training, capture = transformer.training, branch.capture
    transformer.eval()
    branch.capture = True
    parts: dict[int, list[np.ndarray]] = {}
    try:
        for chunk in references.split(batch_size):
            shape = (len(chunk), chunk.shape[1], num_frames, *chunk.shape[-2:])
            noise = torch.randn(shape, generator=generator).to(transformer.device, transformer.dtype)
            sigmas = torch.full((len(chunk),), sigma, device=noise.device)
            prompts = {name: value.expand(len(chunk), *value.shape) for name, value in own.items()}
            with branch.references(chunk.to(noise)):
                transformer(**branch.family.forward_arguments(transformer, noise, sigmas, prompts))
            for block, tokens in branch.features.items():
                parts.setdefault(block, []).append(tokens.mean(2).double().cpu().numpy())
    finally:
        branch.clear()
        branch.capture = capture
        transformer.train(training)
    return {block: np.concatenate(chunks) for block, chunks in parts.items()}


@dataclass(frozen=True)
class Separability:
    """How well features of different subjects part; both by cosine.

    Attributes:
        silhouette: mean silhouette coefficient in [-1, 1]; 1 = tight groups far apart, 0 = groups overlap.
        retrieval: share of features in [0, 1] whose nearest other one is of the same subject.
    """

    silhouette: float
    retrieval: float


def separability(features: np.ndarray, subjects: np.ndarray) -> Separability:
    """Separability of features (R, L) by their subjects (R,); at least two subjects with two views each."""
    from sklearn.metrics import silhouette_score

    unit = features / np.linalg.norm(features, axis=1, keepdims=True)
    cosine = unit @ unit.T
    np.fill_diagonal(cosine, -np.inf)
    retrieval = (subjects[cosine.argmax(1)] == subjects).mean()
    return Separability(float(silhouette_score(unit, subjects, metric="cosine")), float(retrieval))


def project(features: np.ndarray) -> np.ndarray:
    """The two directions in which unit-length features (R, L) vary most: (R, 2) principal components."""
    from sklearn.decomposition import PCA

    unit = features / np.linalg.norm(features, axis=1, keepdims=True)
    return PCA(n_components=2, svd_solver="full").fit_transform(unit)
