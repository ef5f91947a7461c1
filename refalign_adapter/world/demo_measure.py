"""What the demo measures once its adapter is trained: losses, videos that the judge reads, and reference features.

Shape letters: B batch, C latent channels, M references, H and W latent height and width, R references in all.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ..analysis.features import Separability, mean_reference_tokens, separability
from ..analysis.sensitivity import reference_sensitivity
from ..branch.attach import attach
from ..branch.reference_branch import ReferenceBranch
from ..branch.switched_on import branch_of
from ..data.cache.dataset import CachedDataset
from ..export.folder import open_adapter
from ..families.wan import FAMILY
from ..library_output import quiet_libraries
from ..pipelines.load import load_adapter
from .demo_samples import SPLIT, draw_prepared
from .demo_videos import SAVING
from .evaluation import Losses, Scenes, attribution_of_drawn, watch_scenes
from .reading import Judge
from .sampling import Sampling
from .subjects import KINDS, Subject, random_subject
from .verdict import Verdict

ATTRIBUTED = 24
SUBJECTS, VIEWS = 8, 8


@dataclass(frozen=True)
class FeatureViews:
    """Reference features of held-out subjects, each seen several times.

    Attributes:
        subjects: their names.
        labels: (R,) index into `subjects`.
        block: the aligned block after which they were taken.
        before, after: float64 (R, dim), with the untrained and the trained adapter.
    """

    subjects: list[str]
    labels: np.ndarray
    block: int
    before: np.ndarray
    after: np.ndarray

    @property
    def separability(self) -> dict[str, Separability]:
        """Of both."""
        return {name: separability(getattr(self, name), self.labels) for name in ("before", "after")}


@dataclass(frozen=True)
class Measured:
    """All that is measured.

    Attributes:
        losses: of the validation rows, and of clips that are drawn for attribution.
        verdicts: of videos that are generated for it.
        features: see `FeatureViews`.
    """

    losses: Losses
    verdicts: dict[str, Verdict]
    features: FeatureViews


def measure(base: Path, adapter: Path, cache_dir: Path, *, size: Mapping[str, int], seed: int) -> Measured:
    """Measure an adapter on held-out rows and subjects.

    Args:
        base: the base pipeline's folder.
        adapter: the adapter's folder.
        cache_dir: a cache with validation rows.
        size: height, width and num_frames of what is drawn.
        seed: of subjects, pairing and noise.
    """
    rows = CachedDataset(cache_dir, split="validation", targets={})
    with quiet_libraries():
        pipe = FAMILY.load_pipeline(str(base))
    subjects, views, labels = paired_views(pipe, size["height"], size["width"], seed)
    arguments: dict[str, Any] = {"num_frames": rows.shapes[0][1], "seed": seed}

    untrained = attach(pipe.transformer, open_adapter(adapter).config, seed=seed)
    before = mean_reference_tokens(untrained, views, rows.meta.empty_text, **arguments)
    untrained.detach()
    made = load_adapter(pipe, adapter)
    trained = _trained(made)
    after = mean_reference_tokens(trained, views, rows.meta.empty_text, **arguments)
    block = trained.align_blocks[-1]
    features = FeatureViews(
        subjects, labels, block, *(np.concatenate(list(found[block])) for found in (before, after))
    )
    held_out = [rows[index] for index in range(len(rows))]
    attribution = attribution_of_drawn(made, trained, ATTRIBUTED, subjects=2, seed=seed, size=size)
    losses = Losses(reference_sensitivity(trained, held_out, seed=seed), attribution)
    verdicts = watch_scenes(
        made, Judge.load(), Scenes(one=16, two=8, size=size), Sampling(arguments=SAVING), seeds=[seed]
    )
    return Measured(losses, verdicts, features)


def paired_views(pipe: Any, height: int, width: int, seed: int) -> tuple[list[str], Tensor, np.ndarray]:
    """Views of held-out subjects as latents, two subjects at a time, with another partner in each view.

    Returns:
        The subjects' names, latents (B, C, 2, H, W), and labels (2 B,) in the latents' order.
    """
    generator = np.random.default_rng([seed, 13])
    kinds = generator.permutation(list(KINDS))[:SUBJECTS]
    subjects: list[Subject] = [random_subject(generator, SPLIT, str(kind)) for kind in kinds]
    order = np.concatenate([generator.permutation(SUBJECTS) for _ in range(VIEWS)])
    images = np.stack([np.asarray(draw_prepared(subjects[index], generator, height, width)) for index in order])
    pixels = torch.from_numpy(images).permute(0, 3, 1, 2).float() / 127.5 - 1
    latents = FAMILY.encode_images(pipe, pixels)
    return [str(subject) for subject in subjects], latents.unflatten(0, (-1, 2)).transpose(1, 2), order


def _trained(pipe: Any) -> ReferenceBranch:
    branch = branch_of(pipe.transformer)
    assert branch is not None
    return branch
