"""Training on rows without references: text-to-video where a batch has none, padding where others of it have some."""

import json
from collections import Counter

import pytest
import tiny_data
import torch
from tiny_models import tiny_transformer

import refalign_adapter as ra
from refalign_adapter.alignment.projector import Projectors
from refalign_adapter.alignment.reference.objective import ReferenceAlignment
from refalign_adapter.batch import EMBEDDING, REFERENCE, Batch
from refalign_adapter.data.cache.build import cache_dataset
from refalign_adapter.data.cache.dataset import open_cache
from refalign_adapter.recipes.cache_options import options_of
from refalign_adapter.training.loop import train
from refalign_adapter.training.setup import build_accelerator, build_run
from refalign_adapter.training.step import StepOptions, TrainingStep
from refalign_adapter.training.tracking import read_metrics

ADAPTERS = {
    "joint": {"attention": "joint"},
    "joint, zeros": {"attention": "joint", "null_reference": "zeros"},
    "isolated": {"attention": "isolated", "lora_scope": "reference"},
    "isolated, all": {"attention": "isolated", "lora_scope": "all"},
    "isolated, zeros": {"attention": "isolated", "lora_scope": "reference", "null_reference": "zeros"},
}
EMPTY_TEXT = {EMBEDDING: torch.zeros(5, 32)}


def build_step(adapter, checkpointing=False):
    transformer = tiny_transformer()
    if checkpointing:
        transformer.enable_gradient_checkpointing()
    branch = ra.attach(transformer, ra.RefAlignConfig(r=4, align_layers=3, **adapter), seed=0)
    for name, parameter in branch.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.1, generator=torch.Generator().manual_seed(1))
    projectors = Projectors(branch.align_blocks, 48, {"one": 10}, torch.Generator().manual_seed(2))
    return TrainingStep(branch, [ReferenceAlignment(projectors)], StepOptions(text_dropout=0, both_dropout=0)).train()


def make_batch(counts):
    """A row for each number of references, padded as `collate` does."""
    generator, most = torch.Generator().manual_seed(6), max(counts)
    draw = lambda *shape: torch.randn(shape, generator=generator)  # noqa: E731
    mask = torch.arange(most) < torch.tensor(counts)[:, None]
    shown = mask[:, :, None, None, None]
    targets = {REFERENCE: {"one": draw(len(counts), most, 3, 4, 10) * shown}} if most else {}
    return Batch(
        [str(place) for place in range(len(counts))],
        draw(len(counts), 16, 2, 6, 8),
        {EMBEDDING: draw(len(counts), 5, 32)},
        (draw(len(counts), most, 16, 6, 8) * shown).transpose(1, 2),
        mask,
        torch.arange(most).expand(len(counts), -1),
        targets,
    )


def run(step, batch, weight=1.0, **options):
    return step(batch, EMPTY_TEXT, generator=torch.Generator().manual_seed(0), weights={REFERENCE: weight}, **options)


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("adapter", ADAPTERS.values(), ids=ADAPTERS)
def test_a_batch_without_any_is_text_to_video_with_zero_gradients_where_nothing_is_trained(adapter, checkpointing):
    step, batch = build_step(adapter, checkpointing), make_batch([0, 0])
    sigmas, noise = torch.tensor([0.3, 0.8]), torch.randn(batch.latents.shape)
    output = run(step, batch, sigmas=sigmas, noise=noise)
    shaped = sigmas.view(-1, 1, 1, 1, 1)
    noisy = (1 - shaped) * batch.latents + shaped * noise
    prediction = step.transformer(noisy, 1000 * sigmas, batch.text[EMBEDDING]).sample
    flow = (prediction - (noise - batch.latents)).square().mean()
    torch.testing.assert_close(output.flow, flow.detach())
    assert output.loss.item() == output.flow.item()
    assert output.logs == {"positive": 0, "negative": 0}
    output.loss.backward()
    assert all(item.grad is not None for item in step.parameters() if item.requires_grad)
    assert not any(item.grad.any() for item in step.objectives.parameters())
    reached = any(item.grad.any() for _, item in step.branch.named_parameters())
    assert reached == (adapter.get("lora_scope") != "reference")


@pytest.mark.parametrize("adapter", ADAPTERS.values(), ids=ADAPTERS)
def test_beside_others_a_row_gives_what_it_gives_alone(adapter):
    step, batch = build_step(adapter), make_batch([2, 0])
    sigmas, noise = torch.tensor([0.3, 0.8]), torch.randn(batch.latents.shape)
    both = run(step, batch, sigmas=sigmas, noise=noise, drop_conditions=False)
    flows, terms = [], []
    for row, count in enumerate((2, 0)):
        targets = batch.targets[REFERENCE]["one"][row : row + 1, :count]
        one = Batch(
            [str(row)],
            batch.latents[row : row + 1],
            {EMBEDDING: batch.text[EMBEDDING][row : row + 1]},
            batch.references[row : row + 1, :, :count],
            *(getattr(batch, name)[row : row + 1, :count] for name in ("mask", "subjects")),
            {REFERENCE: {"one": targets}} if count else {},
        )
        alone = run(step, one, sigmas=sigmas[row : row + 1], noise=noise[row : row + 1], drop_conditions=False)
        flows.append(alone.flow)
        terms.append((alone.loss - alone.flow).detach())
    torch.testing.assert_close(both.flow, torch.stack(flows).mean())
    torch.testing.assert_close((both.loss - both.flow).detach(), torch.stack(terms).mean(), atol=1e-5, rtol=1e-5)
    assert terms[1] == 0


@pytest.fixture
def one_process(tmp_path):
    """A process group of one."""
    store = torch.distributed.FileStore(str(tmp_path / "store"), 1)
    torch.distributed.init_process_group("gloo", store=store, rank=0, world_size=1)
    yield
    torch.distributed.destroy_process_group()


@pytest.mark.parametrize("adapter", ADAPTERS.values(), ids=ADAPTERS)
def test_distributed_training_goes_on_after_batches_without_any(one_process, adapter):
    step = build_step(adapter)
    model = torch.nn.parallel.DistributedDataParallel(step)  # refuses a step after one that left a parameter out
    for counts, weight in (([0, 0], 1.0), ([1, 2], 1.0), ([0, 0], 0.0), ([0, 1], 0.0), ([0, 1], 1.0)):
        run(model, make_batch(counts), weight=weight).loss.backward()
        assert all(parameter.grad is not None for parameter in model.parameters() if parameter.requires_grad)
        model.zero_grad()


@pytest.fixture
def mixed(make_recipe, tmp_path):
    """`mixed("key=value", …)`: the tiny recipe on nine clips, every third without references, and their cache."""
    manifest = tiny_data.write_data(tmp_path / "data", 9, frames=5, height=48, width=48)
    rows = [json.loads(line) for line in manifest.read_text().splitlines()]
    for row in rows[::3]:
        del row["references"], row["pair"]
    tiny_data.write_manifest(tmp_path / "data", rows)
    where = [f"data.train_data={manifest}", f"data.cache_dir={tmp_path / 'cache'}", "optimizer=adamw"]
    cache_dataset(options_of(make_recipe(*where)), device="cpu")
    return lambda *overrides: make_recipe(*where, *overrides)


@pytest.mark.parametrize("by_references", [False, True])
def test_they_train_validate_and_share_batches_by_shape_or_by_number(mixed, tmp_path, by_references):
    recipe = mixed(
        "adapter.attention=isolated", "adapter.lora_scope=reference", "validation_steps=3",
        f"data.bucket_by_references={str(by_references).lower()}", "data.validation_rows=2",
    )  # fmt: skip
    assert Counter(open_cache(options_of(recipe)).reference_counts) == {0: 3, 2: 3, 3: 3}
    run = build_run(recipe, build_accelerator(recipe, tmp_path), tmp_path)
    batches = run.data.training_batches(0, 0)
    counts = [next(batches).mask.sum(1).tolist() for _ in range(9)]
    assert any(0 in found for found in counts)
    assert all(len(set(found)) == 1 for found in counts) or not by_references
    train(recipe)
    rows = read_metrics(tmp_path / "out/metrics.jsonl")
    assert len([row for row in rows if "train/loss" in row]) == 6
    assert all(row["train/positive"] >= 0 for row in rows if "train/loss" in row)
    assert all(row["validation/flow"] > 0 for row in rows if "validation/flow" in row)
