"""The alignment loss over some of the tokens: what is left out has no effect, what counts has its full weight."""

import pytest
import torch
from naive_loss import MASK, SUBJECTS, LargestTensor, draw

from refalign_adapter.alignment.reference import loss as reference_loss
from refalign_adapter.alignment.reference.loss import reference_alignment_loss


def test_tokens_that_do_not_count_reach_neither_value_nor_gradient():
    student, teacher = draw(2, 3, 5, 4), draw(2, 3, 5, 4, seed=1)
    kept = torch.tensor([True, False, True, True, False])
    expected = reference_alignment_loss(student[:, :, kept], teacher[:, :, kept])
    student[:, :, ~kept], teacher[:, :, ~kept] = torch.nan, torch.nan
    student.requires_grad_()
    loss = reference_alignment_loss(student, teacher, tokens=kept.expand(3, 5))
    loss.total.backward()
    torch.testing.assert_close((loss.total, loss.cosine), (expected.total, expected.cosine))
    assert student.grad[:, :, ~kept].eq(0).all()
    assert student.grad[:, :, kept].ne(0).all()


def test_a_reference_without_a_token_that_counts_is_as_if_padded():
    student, teacher = draw(4, 3, 5, 7), draw(4, 3, 5, 7, seed=1)
    tokens = torch.ones(4, 3, 5, dtype=torch.bool) & MASK[..., None]
    ours, theirs = (student.clone().requires_grad_() for _ in range(2))
    loss = reference_alignment_loss(ours, teacher, tokens=tokens)
    expected = reference_alignment_loss(theirs, teacher, mask=MASK)
    loss.total.backward()
    expected.total.backward()
    assert torch.equal(ours.grad, theirs.grad)
    for name in ("total", "positive", "negative", "cosine"):
        assert torch.equal(getattr(loss, name), getattr(expected, name))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_all_tokens_counting_is_the_loss_without_them_to_the_last_bit(dtype):
    student, teacher = draw(4, 3, 9, 24, dtype=dtype), draw(4, 3, 9, 24, seed=1, dtype=dtype)
    results = []
    for tokens in (None, torch.ones(1, 3, 9, dtype=torch.bool)):
        leaf = student.clone().requires_grad_()
        loss = reference_alignment_loss(leaf, teacher, mask=MASK, subjects=SUBJECTS, tokens=tokens)
        loss.total.backward()
        results.append((loss.total.detach(), loss.positive, loss.negative, loss.cosine, leaf.grad))
    assert all(map(torch.equal, *results))


def test_every_reference_weighs_the_same_however_few_of_its_tokens_count():
    # Orthogonal to its own teacher and equal to the other's: positive and negative are 1 at every token.
    student = torch.eye(2).repeat_interleave(6, 0).view(2, 6, 2).requires_grad_()
    tokens = torch.ones(2, 6, dtype=torch.bool)
    tokens[1, 2:] = False
    loss = reference_alignment_loss(student, student.detach().flip(0), tokens=tokens)
    loss.total.backward()
    assert (loss.positive, loss.negative, loss.cosine) == (1, 1, 0)
    # Only the positive term has a slope, 1 / (2 references · n tokens) towards the own teacher: at right angles.
    torch.testing.assert_close(student.grad[0], torch.tensor([0, -1 / 12]).expand(6, 2))
    torch.testing.assert_close(student.grad[1, :2], torch.tensor([-1 / 4, 0]).expand(2, 2))


def test_tiles_hold_the_tokens_that_count_only():
    student, teacher = draw(3, 40, 8).requires_grad_(), draw(3, 40, 8, seed=1)
    tokens = torch.arange(40).expand(3, 40) < torch.tensor([[30], [40], [35]])
    with LargestTensor() as largest:
        reference_alignment_loss(student, teacher, tokens=tokens).total.backward()
    assert largest.elements == 40 * 35


def test_tiles_keep_to_their_size_beside_a_reference_with_more_tokens(monkeypatch):
    tiles = []
    cosines = reference_loss._Target.cosines
    monkeypatch.setitem(reference_loss.TILE_ELEMENTS, "cpu", 50)
    monkeypatch.setattr(
        reference_loss._Target,
        "cosines",
        lambda self, rows: tiles.append((len(rows), len(self.unit))) or cosines(self, rows),
    )
    tokens = torch.arange(40).expand(2, 40) < torch.tensor([[4], [40]])
    reference_alignment_loss(draw(2, 40, 8), draw(2, 40, 8, seed=1), tokens=tokens)
    assert tiles == [(1, 40)] * 4 + [(10, 4)] * 4
