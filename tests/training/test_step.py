"""The training step against the method written out by hand on the same draws."""

import dataclasses

import pytest
import torch
from tiny_models import tiny_transformer

import refalign_adapter as ra
from refalign_adapter.alignment.projector import Projectors
from refalign_adapter.alignment.reference.objective import ReferenceAlignment, ReferenceOptions
from refalign_adapter.batch import EMBEDDING, REFERENCE, Batch
from refalign_adapter.training.step import StepOptions, TrainingStep

TEACHERS = {"first": 10, "second": 6}
KEEP = {"text_dropout": 0.0, "reference_dropout": 0.0, "both_dropout": 0.0}


LOSS_OPTIONS = {field.name for field in dataclasses.fields(ReferenceOptions)}
JOINT = {"attention": "joint"}
ISOLATED = {"attention": "isolated", "lora_scope": "reference"}


def build_step(teachers=("first",), align_layers=2, adapter=JOINT, **options):
    transformer = tiny_transformer()
    config = ra.RefAlignConfig(r=4, align_layers=align_layers, teachers=teachers, **adapter)
    branch = ra.attach(transformer, config, seed=0)
    generator = torch.Generator().manual_seed(5)
    for name, parameter in branch.named_parameters():
        if "lora_B" in name:
            parameter.data = 0.1 * torch.randn(parameter.shape, generator=generator)
    widths = {name: TEACHERS[name] for name in teachers}
    weighing = ReferenceOptions(**{name: options.pop(name) for name in LOSS_OPTIONS & options.keys()})
    projectors = Projectors(branch.align_blocks, 48, widths, generator) if branch.align_blocks else None
    objectives = [] if projectors is None else [ReferenceAlignment(projectors, weighing)]
    return TrainingStep(branch, objectives, StepOptions(**KEEP | options))


def heads_of(step):
    """The projectors of the step's reference alignment."""
    (objective,) = step.objectives
    return objective.heads


def make_batch(size=2, references=2, grid=(3, 4), canvas=(6, 8)):
    generator = torch.Generator().manual_seed(6)
    draw = lambda *shape: torch.randn(shape, generator=generator)  # noqa: E731
    mask = torch.ones(size, references, dtype=torch.bool)
    mask[-1, -1] = False
    return Batch(
        keys=[f"row {i}" for i in range(size)],
        latents=draw(size, 16, 2, 6, 8),
        text={EMBEDDING: draw(size, 5, 32)},
        references=draw(size, 16, references, *canvas),
        mask=mask,
        subjects=torch.arange(references).repeat(size, 1),
        targets={REFERENCE: {name: draw(size, references, *grid, width) for name, width in TEACHERS.items()}},
    )


EMPTY_TEXT = {EMBEDDING: torch.zeros(5, 32)}


def run(step, batch, seed=0, weight=1.0, **options):
    generator = torch.Generator().manual_seed(seed)
    return step(batch, EMPTY_TEXT, generator=generator, weights={REFERENCE: weight}, **options)


def by_hand(step, batch, sigmas, noise):
    """Prediction and features of the same noisy latents, straight from the branch."""
    shaped = sigmas.view(-1, 1, 1, 1, 1)
    noisy = (1 - shaped) * batch.latents + shaped * noise
    step.branch.capture = True
    with step.branch.references(batch.references, batch.mask, tokens=batch.tokens):
        prediction = step.transformer(noisy, 1000 * sigmas, batch.text[EMBEDDING]).sample
    return prediction, step.branch.features


def test_total_is_flow_plus_weight_times_the_mean_over_blocks_and_teachers():
    step, batch = build_step(teachers=("first", "second"), negative_weight=0.7), make_batch()
    sigmas = torch.tensor([0.3, 0.8])
    output = run(step, batch, weight=0.4, sigmas=sigmas)
    # The same generator first draws the dropout, one number a sample.
    generator = torch.Generator().manual_seed(0)
    torch.rand(2, generator=generator)
    noise = torch.randn(batch.latents.shape, generator=generator)
    prediction, features = by_hand(step, batch, sigmas, noise)
    flow = (prediction - (noise - batch.latents)).square().mean()
    losses = {
        (block, name): ra.reference_alignment_loss(
            students[name],
            batch.targets[REFERENCE][name].flatten(2, 3),
            negative_weight=0.7,
            mask=batch.mask,
            subjects=batch.subjects,
        )
        for block, students in heads_of(step)(features).items()
        for name in TEACHERS
    }
    total = flow + 0.4 * torch.stack([loss.total for loss in losses.values()]).mean()
    torch.testing.assert_close(output.loss, total)
    torch.testing.assert_close(output.flow, flow.detach())
    for term in ("positive", "negative"):
        expected = torch.stack([getattr(loss, term) for loss in losses.values()]).mean()
        torch.testing.assert_close(output.logs[term], expected.detach())
    for block in (0, 1):
        expected = torch.stack([losses[block, name].cosine for name in TEACHERS]).mean()
        torch.testing.assert_close(output.logs[f"cosine/block_{block}"], expected.detach())


def test_a_teacher_grid_of_another_size_is_resampled_to_the_tokens():
    step = build_step()
    assert torch.isfinite(run(step, make_batch(grid=(5, 7))).loss)
    exact, coarse = run(step, make_batch()), run(step, make_batch(grid=(5, 7)))
    assert exact.flow == coarse.flow
    assert exact.logs["positive"] != coarse.logs["positive"]


def economical_batch():
    """References on a canvas of 2 x 3 tokens, some of them left out."""
    batch = make_batch(grid=(2, 3), canvas=(4, 6))
    batch.tokens = batch.mask[:, :, None, None] & (torch.arange(24).view(2, 2, 2, 3) % 5 < 3)
    return batch


def test_small_references_with_some_of_their_tokens_reach_branch_and_loss():
    step, batch = build_step(adapter=ISOLATED), economical_batch()
    sigmas = torch.tensor([0.3, 0.8])
    output = run(step, batch, weight=0.4, sigmas=sigmas)
    generator = torch.Generator().manual_seed(0)
    torch.rand(2, generator=generator)
    noise = torch.randn(batch.latents.shape, generator=generator)
    prediction, features = by_hand(step, batch, sigmas, noise)
    flow = (prediction - (noise - batch.latents)).square().mean()
    target, tokens = batch.targets[REFERENCE]["first"].flatten(2, 3), batch.tokens.flatten(2)
    losses = [
        ra.reference_alignment_loss(students["first"], target, mask=batch.mask, subjects=batch.subjects, tokens=tokens)
        for students in heads_of(step)(features).values()
    ]
    torch.testing.assert_close(output.loss, flow + 0.4 * torch.stack([loss.total for loss in losses]).mean())
    torch.testing.assert_close(output.logs["cosine/block_1"], losses[1].cosine)
    batch.tokens = None
    whole = run(step, batch, sigmas=sigmas)
    assert whole.flow != output.flow
    assert whole.logs["positive"] != output.logs["positive"]


@pytest.mark.parametrize("economical", [False, True], ids=["joint", "tokens left out"])
def test_the_gate_multiplies_each_samples_term_by_sigma_to_the_power(economical):
    batch = economical_batch() if economical else make_batch()
    sigmas = torch.tensor([0.3, 0.8])
    adapter = ISOLATED if economical else JOINT
    plain, gated = build_step(adapter=adapter), build_step(adapter=adapter, timestep_gate=3.0)
    output = run(gated, batch, sigmas=sigmas)
    alignment = output.loss - output.flow
    parts = []
    for i in range(2):
        one = Batch(
            [batch.keys[i]],
            batch.latents[i : i + 1],
            {EMBEDDING: batch.text[EMBEDDING][i : i + 1]},
            *(getattr(batch, name)[i : i + 1] for name in ("references", "mask", "subjects")),
            targets={REFERENCE: {name: features[i : i + 1] for name, features in batch.targets[REFERENCE].items()}},
            tokens=None if batch.tokens is None else batch.tokens[i : i + 1],
        )
        generator = torch.Generator().manual_seed(0)
        torch.rand(2, generator=generator)
        noise = torch.randn(batch.latents.shape, generator=generator)[i : i + 1]
        _, features = by_hand(plain, one, sigmas[i : i + 1], noise)
        students = heads_of(plain)(features)
        target = one.targets[REFERENCE]["first"].flatten(2, 3)
        losses = [
            ra.reference_alignment_loss(
                students[block]["first"],
                target,
                mask=one.mask,
                subjects=one.subjects,
                tokens=None if one.tokens is None else one.tokens.flatten(2),
            ).total
            for block in (0, 1)
        ]
        parts.append(sigmas[i] ** 3 * torch.stack(losses).mean())
    torch.testing.assert_close(alignment, torch.stack(parts).mean(), atol=1e-6, rtol=1e-5)


def test_only_lora_and_projectors_get_gradients_and_all_of_them_do():
    step = build_step()
    run(step, make_batch()).loss.backward()
    trained = {name for name, parameter in step.named_parameters() if parameter.grad is not None}
    declared = {f"transformer.{name}" for name, _ in step.branch.named_parameters()}
    declared |= {f"objectives.0.projectors.{name}" for name, _ in heads_of(step).named_parameters()}
    assert trained == declared


@pytest.mark.parametrize("reason", ["references dropped", "none given", "weight 0"])
def test_a_step_without_alignment_still_gives_every_parameter_a_gradient(reason):
    step, batch = build_step(**({"reference_dropout": 1.0} if reason == "references dropped" else {})), make_batch()
    if reason == "none given":
        batch.mask[:] = False
    output = run(step, batch, weight=0.0 if reason == "weight 0" else 1.0)
    output.loss.backward()
    assert output.loss.item() == output.flow.item()
    assert output.logs == ({} if reason == "weight 0" else {"positive": 0, "negative": 0})
    for parameter in heads_of(step).parameters():
        assert parameter.grad is not None
        assert not parameter.grad.any()


@pytest.mark.parametrize("align_layers", [0, 2])
@pytest.mark.parametrize("checkpointing", [False, True])
def test_a_lora_on_references_alone_has_zero_gradients_without_references(align_layers, checkpointing):
    step, batch = build_step(adapter=ISOLATED, align_layers=align_layers), make_batch()
    if checkpointing:
        step.transformer.enable_gradient_checkpointing()
    batch.mask[:] = False
    output = run(step, batch)
    output.loss.backward()
    assert output.loss.item() == output.flow.item()
    trained = [parameter for parameter in step.parameters() if parameter.requires_grad]
    assert len(trained) >= len(list(step.branch.named_parameters())) > 0
    for parameter in trained:
        assert torch.equal(parameter.grad, torch.zeros_like(parameter))


@pytest.fixture
def one_process(tmp_path):
    """A process group of one."""
    store = torch.distributed.FileStore(str(tmp_path / "store"), 1)
    torch.distributed.init_process_group("gloo", store=store, rank=0, world_size=1)
    yield
    torch.distributed.destroy_process_group()


def test_distributed_training_goes_on_after_steps_without_references_or_alignment(one_process):
    step = build_step(adapter=ISOLATED, align_layers=3)
    model = torch.nn.parallel.DistributedDataParallel(step)  # refuses a step after one that left a parameter out
    nobody = make_batch()
    nobody.mask[:] = False
    for batch, weight in ((nobody, 1.0), (make_batch(), 0.0), (nobody, 0.0), (make_batch(), 1.0)):
        run(model, batch, weight=weight).loss.backward()
    assert all(parameter.grad.any() for parameter in step.parameters() if parameter.requires_grad)


@pytest.mark.parametrize("weight", [0.0, 1.0])
@pytest.mark.parametrize("scope", ["reference", "all"])
def test_every_isolated_parameter_has_a_gradient_in_every_step(scope, weight):
    # With the last block aligned, some of a reference LoRA reaches the alignment alone, which can have weight 0.
    step = build_step(adapter=ISOLATED | {"lora_scope": scope}, align_layers=3)
    run(step, make_batch(), weight=weight).loss.backward()
    grads = {name: parameter.grad for name, parameter in step.named_parameters() if parameter.requires_grad}
    assert [name for name, grad in grads.items() if grad is None] == []
    touched = {name for name, grad in grads.items() if grad.any()}
    declared = {f"transformer.{name}" for name, _ in step.branch.named_parameters()}
    if weight:
        assert touched == set(grads) > declared
    else:
        tail = {name for name in declared if "blocks.2." in name and not any(f"to_{x}." in name for x in "kv")}
        assert touched == declared - (tail if scope == "reference" else set())


def test_conditions_are_dropped_at_the_shares_asked_for():
    step = build_step(text_dropout=0.2, reference_dropout=0.3, both_dropout=0.1)
    size = 2000
    batch = make_batch(2)
    ones = torch.ones(size, 1, 1)
    many = Batch([""] * size, ones, {EMBEDDING: ones}, ones, torch.ones(size, 2).bool(), batch.subjects, {})
    shown = step._drop_conditions(many, {EMBEDDING: torch.zeros(1, 1)}, torch.Generator().manual_seed(0))
    text, mask = shown.text[EMBEDDING], shown.mask
    assert shown.aligned is shown.mask
    no_text, no_references = (text == 0).flatten(), ~mask.any(1)
    assert (no_text & ~no_references).float().mean().item() == pytest.approx(0.2, abs=0.03)
    assert (no_references & ~no_text).float().mean().item() == pytest.approx(0.3, abs=0.03)
    assert (no_references & no_text).float().mean().item() == pytest.approx(0.1, abs=0.03)
    assert torch.equal(mask.all(1), mask.any(1))


def test_the_same_seed_gives_the_same_loss_and_validation_drops_nothing():
    step, batch = build_step(text_dropout=0.5, reference_dropout=0.5), make_batch()
    first, again, other = (run(step, batch, seed=seed).flow for seed in (1, 1, 2))
    assert first == again
    assert first != other
    output = run(step, batch, drop_conditions=False)
    assert output.logs["positive"] > 0


def test_without_projectors_the_step_is_the_flow_loss():
    step = build_step(align_layers=0)
    output = run(step, make_batch())
    output.loss.backward()
    assert output.loss.item() == output.flow.item()
    assert output.logs == {}


NULLS = {"joint": JOINT, "isolated": ISOLATED, "isolated, all": ISOLATED | {"lora_scope": "all"}}


@pytest.mark.parametrize("adapter", NULLS.values(), ids=NULLS)
@pytest.mark.parametrize("checkpointing", [False, True])
def test_dropped_references_ride_along_as_zeros_where_the_adapter_says_so(adapter, checkpointing):
    """Of three samples the first keeps its references; the prediction is that of zeros in the others' places."""
    step = build_step(adapter=adapter | {"null_reference": "zeros"}, reference_dropout=0.5)
    if checkpointing:
        step.transformer.enable_gradient_checkpointing()
    batch = make_batch(3)
    seed = next(
        seed
        for seed in range(100)
        if (torch.rand(3, generator=torch.Generator().manual_seed(seed)) < 0.5).tolist() == [False, True, True]
    )
    sigmas, noise = torch.tensor([0.3, 0.8, 0.5]), torch.randn(batch.latents.shape)
    output = run(step, batch, seed=seed, sigmas=sigmas, noise=noise)
    output.loss.backward()
    got = {name: parameter.grad.clone() for name, parameter in step.branch.named_parameters()}
    step.zero_grad()

    zeroed = dataclasses.replace(batch, references=batch.references.clone())
    zeroed.references[1:] = 0
    prediction, features = by_hand(step, zeroed, sigmas, noise)
    flow = (prediction - (noise - batch.latents)).square().mean()
    kept = batch.mask & torch.tensor([[True], [False], [False]])
    losses = [
        ra.reference_alignment_loss(
            students["first"], batch.targets[REFERENCE]["first"].flatten(2, 3), mask=kept, subjects=batch.subjects
        ).total
        for students in heads_of(step)(features).values()
    ]
    loss = flow + torch.stack(losses).mean()
    torch.testing.assert_close(output.loss, loss)
    assert set(output.counts.values()) == {2}  # what a cosine is a mean over
    loss.backward()
    for name, parameter in step.branch.named_parameters():
        torch.testing.assert_close(got[name], parameter.grad, atol=1e-6, rtol=1e-4, msg=name)
    absent = build_step(adapter=adapter, reference_dropout=0.5)
    assert run(absent, batch, seed=seed, sigmas=sigmas, noise=noise).flow != output.flow


def test_a_step_whose_references_are_all_zeros_trains_the_lora_and_no_head():
    step = build_step(adapter=ISOLATED | {"null_reference": "zeros"}, reference_dropout=1.0)
    output = run(step, make_batch())
    assert set(output.counts.values()) == {0}
    assert output.loss.item() == output.flow.item()
    output.loss.backward()
    assert all(parameter.grad is not None for parameter in step.parameters() if parameter.requires_grad)
    assert any(parameter.grad.any() for _, parameter in step.branch.named_parameters())
    assert not any(parameter.grad.any() for parameter in heads_of(step).parameters())
