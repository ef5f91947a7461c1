"""What every objective must do. A new one is a row in `OBJECTIVES`: how to make it, and the shape of its targets."""

import pytest
import torch
from toy_objective import TEACHER, Toy

from refalign_adapter.alignment.objective import NAME, Context, Features, problems_of, zero_of
from refalign_adapter.alignment.projector import Projectors
from refalign_adapter.alignment.reference.objective import ReferenceAlignment, ReferenceOptions
from refalign_adapter.batch import EMBEDDING, Batch

B, M, GRID, VIDEO, DIM, BLOCKS = 3, 2, (3, 4), (2, 3, 4), 48, 3


def reference_alignment(**options):
    projectors = Projectors((0, 2), DIM, {"one": 10, "two": 6}, torch.Generator().manual_seed(0))
    return ReferenceAlignment(projectors, ReferenceOptions(**options))


OBJECTIVES = {
    "reference": (reference_alignment, {"one": (B, M, 3, 4, 10), "two": (B, M, 5, 6, 6)}),
    "gated": (lambda: reference_alignment(timestep_gate=3.0), {"one": (B, M, *GRID, 10), "two": (B, M, 2, 2, 6)}),
    "toy": (Toy, {TEACHER: (B, VIDEO[0], 3)}),
}  # fmt: skip
draw = torch.Generator().manual_seed(1)


@pytest.fixture(params=OBJECTIVES)
def case(request):
    """(objective, batch, features of its taps with a graph)."""
    make, shapes = OBJECTIVES[request.param]
    objective = make()
    random = lambda *shape: torch.randn(shape, generator=draw)  # noqa: E731
    batch = Batch(
        ["a", "b", "c"],
        random(B, 16, 2, 6, 8),
        {EMBEDDING: random(B, 5, 32)},
        random(B, 16, M, 6, 8),
        torch.tensor([[True, True], [True, False], [False, False]]),
        torch.tensor([[0, 1], [0, -1], [-1, -1]]),
        {objective.name: {teacher: random(*shape) for teacher, shape in shapes.items()}},
    )
    features = Features(
        {block: random(B, M, GRID[0] * GRID[1], DIM).requires_grad_() for block in objective.taps.reference},
        {block: random(B, *VIDEO, DIM).requires_grad_() for block in objective.taps.video},
    )
    return objective, batch, features


def context_of(batch, seed=0):
    return Context(torch.tensor([0.3, 0.8, 0.5]), batch.mask, GRID, torch.Generator().manual_seed(seed))


def test_says_what_a_run_has_to_know(case):
    objective, batch, _ = case
    assert NAME.fullmatch(objective.name)
    assert list(problems_of([objective], BLOCKS, (0, 2))) == []
    assert objective.taps.reference or objective.taps.video
    assert {name: target.shape[-1] for name, target in batch.targets[objective.name].items()} == objective.targets
    assert objective.weight_at(0) == objective.schedule.weight_at(0)
    assert objective.weight_name.endswith("_weight")
    assert list(objective.heads.parameters())


def test_its_loss_reaches_every_head_and_every_tap(case):
    objective, batch, features = case
    output = objective.loss(features, batch, context_of(batch))
    assert output.total.shape == ()
    assert output.logs.keys() <= set(objective.logs)
    assert output.counts.keys() <= output.logs.keys()
    assert all(log.shape == () and not log.requires_grad for log in output.logs.values())
    output.total.backward()
    assert all(parameter.grad is not None and parameter.grad.any() for parameter in objective.parameters())
    assert all(tokens.grad.any() for taps in (features.reference, features.video) for tokens in taps.values())


def test_it_draws_from_the_steps_generator_alone(case):
    objective, batch, features = case
    totals = []
    for seed in (0, 0):
        torch.manual_seed(len(totals))
        totals.append(objective.loss(features, batch, context_of(batch, seed)).total)
    assert torch.equal(*totals)


def test_without_references_it_still_gives_every_head_a_gradient(case):
    objective, batch, features = case
    batch.mask[:] = False
    output = objective.loss(Features({}, features.video), batch, context_of(batch))
    (output.total + objective.nothing()).backward()
    assert all(parameter.grad is not None for parameter in objective.parameters())
    if not objective.taps.video:
        assert output.total == 0
        assert not any(parameter.grad.any() for parameter in objective.parameters())


def test_it_runs_without_data(case):
    objective, batch, features = case
    meta = objective.to("meta").without_data()

    def without_data(taps):
        return {block: value.detach().to("meta").requires_grad_() for block, value in taps.items()}

    on_meta = Features(without_data(features.reference), without_data(features.video))
    shown = batch.to("meta")
    shown.mask, shown.subjects = batch.mask, batch.subjects
    output = meta.loss(on_meta, shown, context_of(batch))
    assert output.total.is_meta
    output.total.backward()
    assert meta.name == objective.name
    assert meta.logs == objective.logs


def test_nothing_is_zero_with_and_without_parameters():
    weight = torch.nn.Parameter(torch.tensor([3.0, -2.0]))
    zero_of([weight]).backward()
    assert torch.equal(weight.grad, torch.zeros(2))
    assert zero_of([]) == 0


@pytest.mark.parametrize("name", ["", "heads", "With.Dot", "a" * 41, "../up"])
def test_a_name_that_cannot_be_a_folders_is_told(name):
    objective = Toy()
    objective.name = name
    (problem,) = problems_of([objective], BLOCKS, ())
    assert problem == f"objective {name!r}: a name has lowercase letters, digits and _ alone, and is not 'heads'"


def test_taps_of_references_that_are_not_captured_are_told():
    (problem,) = problems_of([reference_alignment()], BLOCKS, (0, 1))
    assert problem == "objective reference: reference tokens of block 2 are not captured, of [0, 1] are"
