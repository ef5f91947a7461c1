"""Reference features: pooled as captured, separability in closed form."""

import numpy as np
import pytest
import torch
from tiny_models import tiny_transformer

from refalign_adapter import RefAlignConfig, attach
from refalign_adapter.analysis.features import mean_reference_tokens, project, separability
from refalign_adapter.batch import EMBEDDING


@pytest.fixture(scope="module")
def branch():
    return attach(
        tiny_transformer(), RefAlignConfig(attention="joint", r=4, lora_alpha=4, align_layers=[0, 2]), seed=0
    )


def test_mean_tokens_are_those_of_a_plain_call(branch):
    generator = torch.Generator().manual_seed(0)
    references = torch.randn(3, 16, 2, 4, 4, generator=generator)
    text = torch.randn(5, 32, generator=generator)
    found = mean_reference_tokens(branch, references, {EMBEDDING: text}, num_frames=2, sigma=0.7, seed=5, batch_size=3)
    noise = torch.randn(3, 16, 2, 4, 4, generator=torch.Generator().manual_seed(5))
    branch.capture = True
    with torch.no_grad(), branch.references(references):
        branch.transformer(noise, torch.full((3,), 700.0), text.expand(3, -1, -1), return_dict=False)
    assert set(found) == {0, 2}
    for block, tokens in branch.features.items():
        np.testing.assert_allclose(found[block], tokens.mean(2).numpy(), atol=1e-6)
    branch.capture = False


def test_leaves_capture_and_mode_as_they_were(branch):
    branch.transformer.train()
    mean_reference_tokens(
        branch, torch.randn(2, 16, 1, 4, 4), {EMBEDDING: torch.randn(5, 32)}, num_frames=1, batch_size=1
    )
    assert not branch.capture
    assert branch.features == {}
    assert branch.transformer.training


def test_separability_of_groups_far_apart_is_one():
    features = np.array([[1, 0, 0], [2, 0, 0], [0, 1, 0], [0, 3, 0]], dtype=float)
    result = separability(features, np.array([0, 0, 1, 1]))
    assert (result.silhouette, result.retrieval) == pytest.approx((1.0, 1.0))


def test_separability_of_mixed_groups():
    # Nearest neighbours are (0, 1) and (2, 3), and each is of the other subject.
    features = np.array([[1, 0], [1, 0.1], [0, 1], [0.1, 1]], dtype=float)
    result = separability(features, np.array([0, 1, 0, 1]))
    assert result.retrieval == 0
    assert result.silhouette < 0


def test_projection_keeps_a_plane():
    angles = np.linspace(0, 2 * np.pi, 9)[:-1]
    basis = np.linalg.qr(np.random.default_rng(0).normal(size=(6, 2)))[0]
    features = np.stack([np.cos(angles), np.sin(angles)], 1) @ basis.T * 3
    points = project(features)
    np.testing.assert_allclose(np.linalg.norm(points, axis=1), 1, atol=1e-9)
    np.testing.assert_allclose(np.abs(points @ points.T - features @ features.T / 9), 0, atol=1e-9)
