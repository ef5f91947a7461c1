"""Projectors: weights by seed, names, shapes, types, and mistakes.

Shape letters: B batch, M references, N tokens per reference.
"""

import pytest
import torch
from torch import nn

from refalign_adapter.alignment.projector import Projector, Projectors
from refalign_adapter.errors import ConfigError, UserError

TEACHERS = {"facebook/dinov2-base": 12, "google/siglip2-base-patch16-256": 10, "./folder/my.teacher%2E": 6}


def seeded(seed=0):
    return torch.Generator().manual_seed(seed)


def build(blocks=(0, 2), seed=0):
    return Projectors(blocks, 16, TEACHERS, seeded(seed))


def test_projector_is_the_papers_mlp():
    projector = Projector(16, 12, seeded())
    shapes = {name: tuple(value.shape) for name, value in projector.state_dict().items()}
    assert shapes == {"proj.0.weight": (8, 16), "proj.2.weight": (12, 8)}
    features = torch.randn(2, 3, 5, 16, generator=seeded(1))
    first, last = projector.state_dict().values()
    torch.testing.assert_close(projector(features), nn.functional.silu(features @ first.T) @ last.T)


def test_weights_are_as_wide_as_those_of_a_linear_layer():
    weight = Projector(256, 128, seeded()).state_dict()["proj.0.weight"]
    assert weight.abs().max() <= 256**-0.5
    assert weight.std() == pytest.approx(256**-0.5 / 3**0.5, rel=0.02)


def test_a_seed_decides_the_weights_and_the_global_generator_is_left_alone():
    before = torch.get_rng_state()
    first, again, other = build(), build(), build(seed=1)
    assert torch.equal(torch.get_rng_state(), before)
    for name, value in first.state_dict().items():
        assert torch.equal(value, again.state_dict()[name])
        assert not torch.equal(value, other.state_dict()[name])


def test_every_block_and_teacher_has_a_head_of_its_own():
    projectors = build(blocks=[2, 0])
    features = {block: torch.randn(2, 3, 5, 16, generator=seeded(block)) for block in (0, 1, 2)}
    projected = projectors(features)
    assert list(projected) == [0, 2]
    for by_teacher in projected.values():
        assert {name: tuple(value.shape) for name, value in by_teacher.items()} == {
            name: (2, 3, 5, width) for name, width in TEACHERS.items()
        }
    same = projectors(dict.fromkeys((0, 2), features[1]))
    assert not any(torch.equal(same[0][teacher], same[2][teacher]) for teacher in TEACHERS)
    assert len(list(projectors.parameters())) == 2 * len(TEACHERS) * 2
    sum(value.square().sum() for heads in projected.values() for value in heads.values()).backward()
    assert all(parameter.grad.ne(0).any() for parameter in projectors.parameters())


def test_state_round_trip():
    source, target = build(), build(seed=1)
    target.load_state_dict(source.state_dict())
    features = {block: torch.randn(1, 2, 4, 16, generator=seeded(block)) for block in (0, 2)}
    for block, heads in source(features).items():
        for teacher, value in heads.items():
            assert torch.equal(value, target(features)[block][teacher])


@pytest.mark.parametrize("autocast", [False, True])
def test_bfloat16_features(autocast):
    projectors = build()
    features = {block: torch.randn(1, 2, 4, 16, generator=seeded(block)).bfloat16() for block in (0, 2)}
    expected = projectors({block: value.float() for block, value in features.items()})
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        projected = projectors(features)
    for block, heads in projected.items():
        for teacher, value in heads.items():
            assert value.dtype == (torch.bfloat16 if autocast else torch.float32)
            tolerance = 2e-2 if autocast else 0
            torch.testing.assert_close(value.float(), expected[block][teacher], rtol=tolerance, atol=tolerance)


def test_a_block_without_features_is_named():
    with pytest.raises(UserError, match=r"aligned blocks \[0, 2\], got \[0\]: capture \[2\] too"):
        build()({0: torch.zeros(1, 1, 1, 16)})


def test_features_of_another_width_are_refused():
    with pytest.raises(UserError, match="features of block 2 must have 16 channels, got 8"):
        build()({0: torch.zeros(1, 1, 1, 16), 2: torch.zeros(1, 1, 1, 8)})


def test_all_mistakes_are_reported_at_once():
    with pytest.raises(ConfigError) as error:
        Projectors([1, 1], 1, {"teacher": 0})
    assert error.value.problems == [
        "blocks must be distinct indices >= 0, got [1, 1]",
        "dim must be at least 2, got 1",
        "width of teacher must be at least 1, got 0",
    ]
