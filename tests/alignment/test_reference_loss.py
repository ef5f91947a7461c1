"""The tiled alignment loss against the released code's numbers, a naive reference and finite differences.

Shape letters: B batch, L blocks, M references, N tokens per reference, C channels.
"""

import json
from functools import partial
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from naive_loss import MASK, SUBJECTS, TOKENS, LargestTensor, assert_equals_naive, draw, naive
from safetensors import safe_open

from refalign_adapter.alignment.reference import loss as reference_loss
from refalign_adapter.alignment.reference.loss import reference_alignment_loss
from refalign_adapter.errors import UserError

FIXTURE = Path(__file__).parents[1] / "data" / "official_reference_alignment_loss.safetensors"


@pytest.mark.parametrize("case", range(4))
def test_equals_the_released_code(case):
    with safe_open(FIXTURE, "pt") as file:
        names = ("student", "teacher", "total", "positive", "negative", "grad_student")
        tensors = {name: file.get_tensor(f"{case}.{name}") for name in names}
        options = json.loads(file.metadata()["cases"])[case]
    student = tensors["student"].requires_grad_()
    margins = {name: options[name] for name in ("positive_margin", "negative_margin", "negative_weight")}
    loss = reference_alignment_loss(student, tensors["teacher"], **margins)
    loss.total.backward()
    for name in ("total", "positive", "negative"):
        torch.testing.assert_close(getattr(loss, name).detach(), tensors[name].squeeze(), rtol=0, atol=1e-9)
    torch.testing.assert_close(student.grad, tensors["grad_student"], rtol=0, atol=1e-9)


@pytest.mark.parametrize("tile", [2**22, 1])
@pytest.mark.parametrize(
    "options",
    [
        {},
        {"positive_margin": 0.9, "negative_margin": 0.8, "negative_weight": 0.3},
        {"negative_margin": 2.0, "negative_weight": 0.0},
        {"mask": MASK},
        {"subjects": SUBJECTS},
        {"mask": MASK, "subjects": SUBJECTS, "negative_margin": 1.2},
        {"mask": MASK[1], "subjects": SUBJECTS[:1]},
        {"tokens": TOKENS},
        {"tokens": TOKENS, "mask": MASK, "subjects": SUBJECTS, "negative_margin": 1.2, "negative_weight": 0.3},
        {"tokens": TOKENS[0], "positive_margin": 0.9},
    ],
    ids=[
        "defaults",
        "margins",
        "no negative",
        "mask",
        "subjects",
        "both",
        "broadcast",
        "tokens",
        "all three",
        "broadcast tokens",
    ],
)
def test_equals_the_naive_formula(options, tile, monkeypatch):
    monkeypatch.setitem(reference_loss.TILE_ELEMENTS, "cpu", tile)
    assert_equals_naive(draw(4, 3, 5, 7), draw(4, 3, 5, 7, seed=1), **options)


def test_equals_finite_differences():
    def total(student, **more):
        options = {"positive_margin": 0.1, "negative_margin": 1.1, "mask": MASK, "subjects": SUBJECTS, **more}
        return reference_alignment_loss(student, draw(4, 3, 2, 4, seed=1), negative_weight=0.7, **options).total

    assert torch.autograd.gradcheck(total, draw(4, 3, 2, 4).requires_grad_())
    tokens = partial(total, tokens=TOKENS[..., 1:3], mask=None)
    assert torch.autograd.gradcheck(tokens, draw(4, 3, 2, 4).requires_grad_())


def test_leading_dimensions_are_averaged_and_the_teacher_is_broadcast():
    student, teacher = draw(2, 4, 3, 5, 6), draw(4, 3, 5, 6, seed=1)
    assert_equals_naive(student, teacher, mask=MASK, subjects=SUBJECTS)
    whole = reference_alignment_loss(student, teacher, mask=MASK, subjects=SUBJECTS).total
    parts = [
        reference_alignment_loss(student[block, b], teacher[b], mask=MASK[b], subjects=SUBJECTS[b]).total
        for block in range(2)
        for b in range(4)
    ]
    torch.testing.assert_close(whole, torch.stack(parts).mean())


def test_teacher_with_leading_dimension_one():
    student, teacher = draw(3, 2, 2, 4, 5), draw(1, 2, 2, 4, 5, seed=1)
    expected = reference_alignment_loss(student, teacher.expand(3, 2, 2, 4, 5)).total
    assert torch.equal(reference_alignment_loss(student, teacher).total, expected)


def test_one_reference_has_no_negative_term():
    loss = reference_alignment_loss(draw(1, 6, 4), draw(1, 6, 4, seed=1))
    assert loss.negative == 0
    assert loss.total == loss.positive > 0


def test_views_of_one_subject_keep_their_positive_term():
    student, teacher = draw(2, 6, 4), draw(2, 6, 4, seed=1)
    loss = reference_alignment_loss(student, teacher, subjects=torch.tensor([3, 3]))
    assert loss.negative == 0
    assert loss.positive == reference_alignment_loss(student, teacher).positive


def test_padding_reaches_neither_value_nor_gradient():
    student, teacher = draw(3, 4, 5), draw(3, 4, 5, seed=1)
    mask = torch.tensor([True, False, True])
    expected = reference_alignment_loss(student[mask], teacher[mask])
    student[1], teacher[1] = torch.nan, torch.nan
    student.requires_grad_()
    loss = reference_alignment_loss(student, teacher, mask=mask)
    loss.total.backward()
    torch.testing.assert_close((loss.total, loss.cosine), (expected.total, expected.cosine))
    assert student.grad.isfinite().all()
    assert student.grad[1].eq(0).all()


@pytest.mark.parametrize("hidden", ["mask", "tokens"])
@pytest.mark.parametrize("shape", [(2, 3, 4, 5), (2, 0, 4, 5), (0, 3, 4, 5)])
def test_no_real_reference_at_all_is_zero(shape, hidden):
    student = draw(*shape).requires_grad_()
    nothing = torch.zeros(shape[:2] if hidden == "mask" else shape[:3], dtype=torch.bool)
    loss = reference_alignment_loss(student, draw(*shape), **{hidden: nothing})
    loss.total.backward()
    assert [loss.total.item(), loss.positive.item(), loss.negative.item(), loss.cosine.item()] == [0, 0, 0, 0]
    assert student.grad.eq(0).all()


def test_cosine_is_the_mean_over_real_references():
    student, teacher = draw(4, 3, 5, 7), draw(4, 3, 5, 7, seed=1)
    loss = reference_alignment_loss(student, teacher, mask=MASK)
    cosines = F.cosine_similarity(student, teacher, dim=-1)
    torch.testing.assert_close(loss.cosine, cosines[MASK].mean())
    loss = reference_alignment_loss(student, teacher, mask=MASK, tokens=TOKENS)
    means = [cosines[b, m][TOKENS[b, m]].mean() for b, m in (MASK & TOKENS.any(-1)).nonzero()]
    torch.testing.assert_close(loss.cosine, torch.stack(means).mean())


def test_perfect_alignment_of_orthogonal_subjects_costs_nothing():
    features = torch.eye(6).view(2, 3, 6)
    loss = reference_alignment_loss(5 * features, features)
    assert (loss.total, loss.cosine) == (0, 1)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("tokens", [None, torch.arange(120).view(3, 40) % 7 < 3], ids=["all tokens", "some"])
def test_lower_precision_is_computed_in_float32(dtype, tokens):
    student, teacher = draw(2, 3, 40, 24, dtype=dtype).requires_grad_(), draw(2, 3, 40, 24, seed=1, dtype=dtype)
    exact = student.detach().double().requires_grad_()
    loss = reference_alignment_loss(student, teacher, tokens=tokens)
    expected = reference_alignment_loss(exact, teacher.double(), tokens=tokens)
    loss.total.backward()
    expected.total.backward()
    assert loss.total.dtype == torch.float32
    torch.testing.assert_close(loss.total.double(), expected.total, rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(loss.negative.double(), expected.negative, rtol=1e-6, atol=1e-7)
    largest = exact.grad.abs().max().item()
    tolerance = 2 * torch.finfo(dtype).eps if dtype != torch.float32 else 1e-5
    torch.testing.assert_close(student.grad.double(), exact.grad, rtol=tolerance, atol=tolerance * largest)


@pytest.mark.parametrize("counting", [64, 3])
def test_float16_gradients_survive_a_large_batch(counting):
    # The mean over 32 · 64 tokens takes gradients below float16's smallest number, 6e-8; a loss scale saves them.
    student = (20 * draw(32, 2, 64, 16)).half().requires_grad_()
    teacher = draw(32, 2, 64, 16, seed=1).half()
    exact = student.detach().double().requires_grad_()
    tokens = (torch.arange(64) < counting).expand(2, 64)
    (2.0**14 * reference_alignment_loss(student, teacher, tokens=tokens).total).backward()
    (2.0**14 * reference_alignment_loss(exact, teacher.double(), tokens=tokens).total).backward()
    torch.testing.assert_close(student.grad.double(), exact.grad, rtol=5e-3, atol=5e-3 * exact.grad.abs().max().item())


def test_torch_products_equal_those_of_onednn(monkeypatch):
    student, teacher = draw(3, 30, 20, dtype=torch.float32), draw(3, 30, 20, seed=1, dtype=torch.float32)

    def evaluate():
        leaf = student.clone().requires_grad_()
        reference_alignment_loss(leaf, teacher).total.backward()
        return leaf.grad

    fast = evaluate()
    monkeypatch.setattr(torch.backends.mkldnn, "is_available", lambda: False)
    torch.testing.assert_close(fast, evaluate(), rtol=1e-5, atol=1e-8)


def test_autocast_changes_nothing():
    student, teacher = draw(2, 9, 8, dtype=torch.float32), draw(2, 9, 8, seed=1, dtype=torch.float32)
    expected = reference_alignment_loss(student, teacher).total
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(reference_alignment_loss(student, teacher).total, expected)
        leaf = student.clone().requires_grad_()
        loss = reference_alignment_loss(leaf, teacher)
    assert torch.equal(loss.total.detach(), expected)


def test_compiled_code_agrees():
    student, teacher = draw(2, 2, 4, 6, dtype=torch.float32), draw(2, 2, 4, 6, seed=1, dtype=torch.float32)
    options = {"mask": MASK[:2, :2], "tokens": TOKENS[:2, :2, 1:]}
    total = lambda leaf: reference_alignment_loss(2 * leaf, teacher, **options).total  # noqa: E731
    gradients = []
    for function in (total, torch.compile(total, backend="eager")):
        leaf = student.clone().requires_grad_()
        function(leaf).backward()
        gradients.append(leaf.grad)
    torch.testing.assert_close(*gradients)


def test_inputs_need_not_be_contiguous():
    student, teacher = draw(7, 5, 3, 2).permute(3, 2, 1, 0), draw(5, 3, 14, seed=1).transpose(0, 1)[..., ::2]
    assert not student.is_contiguous()
    assert not teacher.is_contiguous()
    assert_equals_naive(student, teacher)


def test_zero_vectors_have_finite_gradients():
    student, teacher = draw(2, 4, 6), draw(2, 4, 6, seed=1)
    student[0, 1], teacher[1, 2] = 0, 0
    expected = naive(student, teacher)[0]
    for dtype in (torch.float64, torch.float32, torch.float16):
        leaf = student.to(dtype, copy=True).requires_grad_()
        loss = reference_alignment_loss(leaf, teacher.to(dtype))
        loss.total.backward()
        torch.testing.assert_close(loss.total.double(), expected, rtol=2e-3, atol=2e-3)
        assert leaf.grad.isfinite().all()
        assert leaf.grad[0, 1].eq(0).all()


def test_only_the_total_of_the_student_has_a_gradient():
    student, teacher = draw(2, 4, 6).requires_grad_(), draw(2, 4, 6, seed=1).requires_grad_()
    loss = reference_alignment_loss(student, teacher)
    assert loss.total.requires_grad
    assert not any(value.requires_grad for value in (loss.positive, loss.negative, loss.cosine))
    loss.total.backward()
    assert teacher.grad is None
    assert student.grad.ne(0).any()


def test_values_agree_without_gradients():
    student, teacher = draw(2, 4, 6), draw(2, 4, 6, seed=1)
    expected = naive(student, teacher)[0]
    with torch.no_grad():
        loss = reference_alignment_loss(student.clone().requires_grad_(), teacher).total
    assert not loss.requires_grad
    torch.testing.assert_close(loss, expected)
    torch.testing.assert_close(reference_alignment_loss(student, teacher).total, expected)


def test_a_kept_graph_gives_the_same_gradient_twice():
    student = draw(2, 4, 6).requires_grad_()
    total = reference_alignment_loss(student, draw(2, 4, 6, seed=1)).total
    first, second = (torch.autograd.grad(total, student, retain_graph=True)[0] for _ in range(2))
    assert torch.equal(first, second)


def test_a_second_derivative_is_refused():
    student = draw(2, 4, 6).requires_grad_()
    total = reference_alignment_loss(student, draw(2, 4, 6, seed=1)).total
    with pytest.raises(UserError, match="can be differentiated once only, got create_graph=True"):
        torch.autograd.grad(total, student, create_graph=True)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_no_tensor_outgrows_the_student_or_one_tile(dtype):
    student, teacher = draw(4, 40, 8, dtype=dtype).requires_grad_(), draw(4, 40, 8, seed=1, dtype=dtype)
    with LargestTensor() as largest:
        reference_alignment_loss(student, teacher).total.backward()
    assert largest.elements == max(40 * 40, student.numel())
    assert student.grad is not None


def test_same_subject_and_masked_tiles_are_skipped(monkeypatch):
    tiles = []
    cosines = reference_loss._Target.cosines
    monkeypatch.setattr(reference_loss._Target, "cosines", lambda self, rows: tiles.append(1) or cosines(self, rows))
    reference_alignment_loss(draw(4, 3, 5, 7), draw(4, 3, 5, 7), mask=MASK, subjects=SUBJECTS)
    assert len(tiles) == 4 + 2 + 0 + 0


def test_what_is_saved_for_backward_is_one_gradient():
    saved = []
    student = draw(3, 10, 6).requires_grad_()
    with torch.autograd.graph.saved_tensors_hooks(lambda tensor: saved.append(tensor.numel()) or tensor, lambda t: t):
        reference_alignment_loss(student, draw(3, 10, 6, seed=1))
    assert saved == [student.numel()]


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_a_gpu_agrees_with_the_cpu(dtype):
    student, teacher = draw(4, 3, 50, 32, dtype=dtype), draw(4, 3, 50, 32, seed=1, dtype=dtype)
    options = {"mask": MASK, "subjects": SUBJECTS, "tokens": TOKENS.repeat_interleave(10, -1)}
    results = []
    for device in ("cpu", "cuda"):
        leaf = student.to(device).detach().requires_grad_()
        there = {name: option.to(device) for name, option in options.items()}
        loss = reference_alignment_loss(leaf, teacher.to(device), **there)
        loss.total.backward()
        results.append((loss.total.detach().cpu(), leaf.grad.cpu()))
    torch.testing.assert_close(*results)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"negative_margin": 3.0}, r"negative_margin must be in \[0, 2\], got 3.0"),
        ({"positive_margin": -0.5}, r"positive_margin must be in \[0, 2\], got -0.5"),
        ({"positive_margin": float("nan")}, r"positive_margin must be in \[0, 2\], got nan"),
        ({"negative_weight": -1.0}, "negative_weight must be at least 0 and finite, got -1.0"),
        ({"student": draw(4, 5)}, r"student must have shape .*, got \(4, 5\)"),
        ({"student": torch.ones(2, 3, 4, 5).long()}, "student must be of a floating point type, got torch.int64"),
        ({"teacher": draw(2, 3, 4, 6)}, r"teacher must have shape \(2, 3, 4, 5\) .*, got \(2, 3, 4, 6\)"),
        ({"teacher": draw(2, 1, 4, 5)}, r"teacher must have shape \(2, 3, 4, 5\) .*, got \(2, 1, 4, 5\)"),
        ({"teacher": draw(7, 3, 4, 5)}, r"teacher must have shape \(2, 3, 4, 5\) .*, got \(7, 3, 4, 5\)"),
        ({"teacher": draw(1, 2, 3, 4, 5)}, r"teacher must have shape \(2, 3, 4, 5\) .*, got \(1, 2, 3, 4, 5\)"),
        ({"mask": torch.ones(2, 3)}, "mask must be of type torch.bool, got torch.float32"),
        ({"mask": torch.ones(2, 4, dtype=torch.bool)}, r"mask must have shape \(2, 3\) .*, got \(2, 4\)"),
        ({"tokens": torch.ones(2, 3, 4)}, "tokens must be of type torch.bool, got torch.float32"),
        ({"tokens": torch.ones(2, 3, 5).bool()}, r"tokens must have shape \(2, 3, 4\) .*, got \(2, 3, 5\)"),
        ({"tokens": torch.ones(4).bool()}, r"tokens must have shape \(2, 3, 4\) .*, got \(4,\)"),
        ({"subjects": torch.zeros(2, 3)}, "subjects must be integers, got torch.float32"),
        ({"subjects": torch.zeros(3, 3, dtype=torch.long)}, r"subjects must have shape \(2, 3\) .*, got \(3, 3\)"),
    ],
)
def test_mistakes_are_named(options, message):
    with pytest.raises(UserError, match=message):
        reference_alignment_loss(**{"student": draw(2, 3, 4, 5), "teacher": draw(2, 3, 4, 5), **options})
