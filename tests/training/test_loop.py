"""The loop: a run taken up again is the run that went through, with every kind of optimizer state."""

import itertools
from collections import Counter

import pytest
import tiny_data
import torch
from accelerate.state import AcceleratorState
from PIL import Image
from safetensors.torch import load_file
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from refalign_adapter.branch.reference_branch import ReferenceBranch
from refalign_adapter.data.cache.build import cache_dataset
from refalign_adapter.data.cache.collate import collate
from refalign_adapter.data.cache.dataset import open_cache
from refalign_adapter.errors import UserError
from refalign_adapter.media.video import read_video
from refalign_adapter.recipes.cache_options import options_of
from refalign_adapter.recipes.file import load_recipe
from refalign_adapter.training.interrupt import SignalWatch
from refalign_adapter.training.loop import DATA_WAIT, endless_batches, optimizer_step, train
from refalign_adapter.training.objectives import heads_state
from refalign_adapter.training.setup import build_accelerator, build_run, step_seed
from refalign_adapter.training.tracking import LossMeter, read_metrics
from refalign_adapter.training.validation import fixed_noise, fixed_sigmas, validate

FILES = (
    "adapter/pytorch_lora_weights.safetensors",
    "training/projectors.safetensors",
    "training/optimizer.safetensors",
)


def assert_same(one, other):
    """The tensors of two files are bit-identical."""
    left, right = load_file(one), load_file(other)
    assert left.keys() == right.keys()
    assert [name for name in left if not torch.equal(left[name], right[name])] == []


def untimed(row):
    """A row of the log without what a clock decides."""
    return {name: value for name, value in row.items() if name != DATA_WAIT}


@pytest.mark.parametrize("optimizer", ["adamw8bit", "adamw"])
def test_resumed_run_equals_one_that_went_through(make_recipe, tmp_path, optimizer):
    options = [
        f"optimizer={optimizer}", "ema_decay=0.9", "lr_scheduler=cosine", "lr_warmup_steps=2", "validation_steps=3",
        "alignment.decay=cosine", "alignment.cutoff_step=5",
    ]  # fmt: skip
    straight, parts = tmp_path / "straight", tmp_path / "parts"
    train(make_recipe(f"output_dir={straight}", *options))
    (tmp_path / "parts").mkdir()
    (straight / "checkpoint-3").rename(parts / "checkpoint-3")
    train(make_recipe(f"output_dir={parts}", "resume_from_checkpoint=latest", *options))
    for name in (*FILES, "training/ema.safetensors"):
        assert_same(straight / "checkpoint-6" / name, parts / "checkpoint-6" / name)
    assert_same(straight / FILES[0], parts / FILES[0])
    rows = [untimed(row) for row in read_metrics(straight / "metrics.jsonl") if row["step"] > 3]
    assert rows == [untimed(row) for row in read_metrics(parts / "metrics.jsonl")]
    kinds = {str(tensor.dtype) for tensor in load_file(straight / "checkpoint-6" / FILES[2]).values()}
    assert ("torch.uint8" in kinds) == (optimizer == "adamw8bit")


def test_what_a_run_writes(make_recipe, tmp_path):
    out = tmp_path / "out"
    options = ["validation_steps=2", "checkpoints_total_limit=1", "report_to=tensorboard", "max_train_steps=3",
               "checkpointing_steps=2", "optimizer=adamw", "sample_steps=3", "sample.num_inference_steps=1",
               f"sample_prompts=[{{prompt: 'A dog, running!', references: [{make_image(tmp_path)}]}}, {{prompt: a cat}}]"]  # fmt: skip  # noqa: E501
    folder = train(make_recipe(*options))
    assert folder == out / "adapter"
    assert {path.name for path in folder.iterdir()} == {
        "README.md",
        "pytorch_lora_weights.safetensors",
        "refalign_config.json",
    }
    assert (out / "training" / "projectors.safetensors").is_file()
    assert [path.name for path in out.glob("checkpoint-*")] == ["checkpoint-3"]
    videos = sorted((out / "samples" / "step-3").iterdir())
    assert [path.name for path in videos] == ["00-a-dog-running.mp4", "01-a-cat.mp4"]
    assert read_video(videos[0], num_frames=5, height=48, width=48).shape == (5, 48, 48, 3)
    rows = read_metrics(out / "metrics.jsonl")
    training = [row for row in rows if "train/loss" in row]
    assert [row["step"] for row in training] == [1, 2, 3]
    assert {"train/flow", "train/positive", "train/negative", "train/cosine/block_0", "train/cosine/block_1",
            "train/grad_norm", "train/alignment_weight", "train/learning_rate", "train/projector_learning_rate"} < set(training[0])  # fmt: skip  # noqa: E501
    assert all(0 < row[DATA_WAIT] < 1 for row in training)
    assert [row["step"] for row in rows if "validation/flow" in row] == [0, 2, 3]
    assert load_recipe(out / "recipe.yaml").max_train_steps == 3
    events = EventAccumulator(str(out / "logs" / "refalign")).Reload()
    logged = [event.value for event in events.Scalars("train/loss")]
    assert logged == pytest.approx([row["train/loss"] for row in training])


def make_image(folder):
    path = folder / "reference.png"
    Image.new("RGB", (40, 30), "red").save(path)
    return path


def test_only_lora_and_projectors_change_and_all_of_them_do(make_recipe, tmp_path):
    recipe = make_recipe("optimizer=adamw", "adapter.lora_dropout=0")
    accelerator = build_accelerator(recipe, tmp_path)
    run = build_run(recipe, accelerator, tmp_path)
    before = {name: value.clone() for name, value in run.module.state_dict().items()}
    trained = {id(parameter) for _, parameter in run.trained.named_parameters()}
    names = {name for name, parameter in run.module.named_parameters() if id(parameter) in trained}
    assert len(names) == len(trained)
    assert {name for name, parameter in run.module.named_parameters() if parameter.requires_grad} == names
    batches = endless_batches(run)
    for _ in range(2):  # the first step moves the LoRA's second factors, the second also the first ones
        optimizer_step(run, batches, LossMeter(run.module.logs), SignalWatch())
    after = run.module.state_dict()
    assert {name for name in before if not torch.equal(before[name], after[name])} == names


def test_a_lora_on_small_references_trains_and_leaves_the_rest_as_it_is(economical_world, make_recipe, tmp_path):
    # From step 2 on nothing is aligned any more, and a part of the last block's LoRA has no gradient but zero.
    changes = ["optimizer=adamw", "adapter.lora_dropout=0", "adapter.align_layers=3", "alignment.cutoff_step=2"]
    recipe = make_recipe(*economical_world, *changes)
    run = build_run(recipe, build_accelerator(recipe, tmp_path), tmp_path)
    before = {name: value.clone() for name, value in run.module.state_dict().items()}
    names = {name for name, parameter in run.module.named_parameters() if parameter.requires_grad}
    batches, meter = endless_batches(run), LossMeter(run.module.logs)
    values = [optimizer_step(run, batches, meter, SignalWatch()) for _ in range(3)]
    assert [step["train/alignment_weight"] for step in values] == [1, 1, 0]
    after = run.module.state_dict()
    assert {name for name in before if not torch.equal(before[name], after[name])} == names


def test_clips_of_several_sizes_train_together(make_recipe, tmp_path):
    """Each step works on one size; the run resumes exactly, as with one size."""
    manifest = tiny_data.write_data(tmp_path / "data", 9, frames=5, height=48, width=96)
    for number in (1, 2, 5):
        tiny_data.write_clip(tmp_path / f"data/clips/{number}.mp4", frames=5, height=96, width=48, seed=number)
    tiny_data.write_clip(tmp_path / "data/clips/6.mp4", frames=3, height=48, width=96)
    sizes = ["data.buckets=[5x32x64, 5x64x32, 1x32x64]", "data.fps=8", "optimizer=adamw", "validation_steps=3"]
    sizes += [f"data.train_data={manifest}", f"data.cache_dir={tmp_path / 'cache'}"]
    recipe = make_recipe(*sizes, f"output_dir={tmp_path / 'straight'}")
    cache_dataset(options_of(recipe), device="cpu")
    assert Counter(open_cache(options_of(recipe)).shapes) == {(16, 2, 4, 8): 5, (16, 2, 8, 4): 3, (16, 1, 4, 8): 1}
    train(recipe)
    steps = [row for row in read_metrics(tmp_path / "straight/metrics.jsonl") if "train/loss" in row]
    assert len(steps) == 6
    (tmp_path / "parts").mkdir()
    (tmp_path / "straight/checkpoint-3").rename(tmp_path / "parts/checkpoint-3")
    train(make_recipe(*sizes, f"output_dir={tmp_path / 'parts'}", "resume_from_checkpoint=latest"))
    assert_same(tmp_path / "straight" / FILES[0], tmp_path / "parts" / FILES[0])


def test_waiting_for_batches_is_measured(make_recipe, tmp_path, monkeypatch):
    recipe = make_recipe("gradient_accumulation_steps=2", "optimizer=adamw")
    run = build_run(recipe, build_accelerator(recipe, tmp_path), tmp_path)
    clock = itertools.count()  # a tick a look: the step asks at its start and end, and around each of its two batches
    monkeypatch.setattr("refalign_adapter.training.loop.time.perf_counter", lambda: next(clock))
    batches = iter(list(itertools.islice(run.data.training_batches(0, 0), 2)))
    values = optimizer_step(run, batches, LossMeter(run.module.logs), SignalWatch())
    assert values[DATA_WAIT] == 2 / 5


def test_validation_repeats_itself_and_shares_out(make_recipe, tmp_path):
    recipe = make_recipe()
    run = build_run(recipe, build_accelerator(recipe, tmp_path), tmp_path)
    assert run.data.groups == [[0, 1], [2]]
    first = held_out(run)
    torch.manual_seed(99)
    assert held_out(run) == first
    assert run.module.training
    expected = []
    for index in range(3):  # by hand: each row with its own noise and sigma
        batch = collate([run.data.validation[index]])
        output = run.module.eval()(
            batch, run.data.empty_text, generator=torch.Generator(), weights={}, drop_conditions=False,
            sigmas=fixed_sigmas([index], 3.0), noise=fixed_noise(batch.keys[0], batch.latents.shape[1:])[None],
        )  # fmt: skip
        expected.append(float(output.flow.detach()))
    assert first["flow"] == pytest.approx(sum(expected) / 3, rel=1e-6)


def held_out(run, weight=1.0):
    load, empty_text = run.data.validation_batch, run.data.empty_text
    return validate(run.module, load, run.data.groups, empty_text, run.accelerator, weights={"reference": weight})


OTHERWISE = ["train_batch_size=1", "train_batch_size=3", "seed=7", "data.bucket_by_references=true"]


@pytest.mark.parametrize("change", OTHERWISE)
def test_held_out_losses_depend_on_weights_and_rows_alone(make_recipe, tmp_path, change):
    """Not on which rows share a batch, nor on the training's seed."""
    found = []
    for overrides in ([], [change]):
        recipe = make_recipe(*overrides)
        run = build_run(recipe, build_accelerator(recipe, tmp_path), tmp_path)
        for name, parameter in run.trained.named_parameters():
            generator = torch.Generator().manual_seed(len(name))
            parameter.data = 0.1 * torch.randn(parameter.shape, generator=generator)
        found.append(held_out(run))
    assert found[0].keys() == found[1].keys()
    for name, value in found[0].items():
        assert found[1][name] == pytest.approx(value, rel=5e-6), name


def test_fixed_sigmas_cover_the_range():
    sigmas = fixed_sigmas(range(64), 1.0).sort().values
    gaps = torch.diff(sigmas, prepend=torch.zeros(1), append=torch.ones(1))
    assert gaps.max() < 2.5 / 64
    assert torch.equal(fixed_sigmas([5, 6, 7], 3.0), fixed_sigmas(range(8), 3.0)[5:])


def test_accumulated_gradients_are_the_mean(make_recipe, tmp_path):
    """Two batches of one sample make the step that the mean of their gradients makes."""
    base = ["optimizer=sgd", "max_grad_norm=null", "adam_weight_decay=0", "adapter.lora_dropout=0"]
    recipe = make_recipe("gradient_accumulation_steps=2", "train_batch_size=1", *base)
    run = build_run(recipe, build_accelerator(recipe, tmp_path), tmp_path)
    start = {name: parameter.detach().clone() for name, parameter in run.trained.named_parameters()}
    batches = list(itertools.islice(run.data.training_batches(0, 0), 2))
    optimizer_step(run, iter(batches), LossMeter(run.module.logs), SignalWatch())
    moved = {name: (start[name] - parameter.detach()) / 1e-3 for name, parameter in run.trained.named_parameters()}
    with torch.no_grad():
        for name, parameter in run.trained.named_parameters():
            parameter.copy_(start[name])
    total = 0
    for index, batch in enumerate(batches):
        generator = torch.Generator().manual_seed(step_seed(0, index, 0))
        total = (
            total + run.module(batch, run.data.empty_text, generator=generator, weights={"reference": 1.0}).loss / 2
        )
    total.backward()
    for name, parameter in run.trained.named_parameters():
        assert torch.allclose(moved[name], parameter.grad, atol=2e-4 * float(parameter.grad.abs().max()) + 1e-7), name


def test_gradient_checkpointing_and_ema_are_switched_on(make_recipe, tmp_path):
    recipe = make_recipe("gradient_checkpointing=true", "ema_decay=0.5", "max_train_steps=2", "optimizer=adamw")
    run = build_run(recipe, build_accelerator(recipe, tmp_path), tmp_path)
    assert run.module.transformer.is_gradient_checkpointing
    folder = train(recipe)
    averaged = load_file(folder / "pytorch_lora_weights.safetensors")
    sampled = load_file(tmp_path / "out" / "checkpoint-2" / "adapter" / "pytorch_lora_weights.safetensors")
    raw = load_file(tmp_path / "out" / "checkpoint-2" / "training" / "lora.safetensors")
    shadow = load_file(tmp_path / "out" / "checkpoint-2" / "training" / "ema.safetensors")
    assert all(torch.equal(averaged[name], sampled[name]) for name in averaged)
    assert any(not torch.equal(shadow[name], raw[name]) for name in raw)
    name = next(iter(shadow))
    assert torch.equal(averaged[f"transformer.{name.replace('.refalign', '')}"], shadow[name])


def test_stage_two_starts_from_stage_ones_weights_and_projectors(make_recipe, tmp_path):
    folder = train(make_recipe("max_train_steps=1", "optimizer=adamw"))
    second = make_recipe(f"init_adapter={folder}", "seed=7")
    run = build_run(second, build_accelerator(second, tmp_path), tmp_path)
    saved = load_file(tmp_path / "out" / "training" / "projectors.safetensors")
    state = heads_state(run.trained.objectives)
    assert all(torch.equal(saved[name], state[name]) for name in saved)
    weights = load_file(folder / "pytorch_lora_weights.safetensors")
    for name, parameter in run.trained.branch.named_parameters():
        assert torch.equal(weights[f"transformer.{name.replace('.refalign', '')}"], parameter)
    other = make_recipe(f"init_adapter={folder}", "adapter.r=8")
    with pytest.raises(UserError, match=r"^init_adapter: .* has r 4, this recipe 8; use the adapter section it was"):
        build_run(other, build_accelerator(other, tmp_path), tmp_path)


def test_no_alignment_needs_no_projectors(make_recipe, tmp_path):
    train(make_recipe("alignment.weight=0", "max_train_steps=1", "optimizer=adamw"))
    assert not (tmp_path / "out" / "training" / "projectors.safetensors").exists()
    (row,) = read_metrics(tmp_path / "out" / "metrics.jsonl")
    assert not [name for name in row if "cosine" in name or "positive" in name]


def test_a_loss_that_is_no_number_ends_the_run(make_recipe, tmp_path):
    recipe = make_recipe("optimizer=sgd", "max_grad_norm=null", "checkpointing_steps=9")
    recipe = recipe.model_copy(update={"learning_rate": 1e30})  # beyond what a recipe may say
    with pytest.raises(UserError, match=r"^training: loss or gradient of steps 2 to 4 .*lower learning_rate"):
        train(recipe)


def test_bf16_trains_float32_weights_on_a_bf16_base(make_recipe, tmp_path):
    recipe = make_recipe("mixed_precision=bf16", "max_train_steps=2", "optimizer=adamw", "validation_steps=2")
    AcceleratorState._reset_state()
    try:
        run = build_run(recipe, build_accelerator(recipe, tmp_path), tmp_path)
        assert run.module.transformer.blocks[0].ffn.net[2].weight.dtype == torch.bfloat16
        assert {parameter.dtype for _, parameter in run.trained.named_parameters()} == {torch.float32}
        train(recipe)
    finally:
        AcceleratorState._reset_state()
    rows = read_metrics(tmp_path / "out" / "metrics.jsonl")
    assert [row["step"] for row in rows] == [0, 1, 2, 2]


def test_the_adapter_is_uploaded_when_asked_for(make_recipe, tmp_path, monkeypatch):
    calls = []
    monkeypatch.setattr(ReferenceBranch, "push_to_hub", lambda _, *names, **options: calls.append((names, options)))
    train(make_recipe("max_train_steps=1", "push_to_hub=true", "hub_model_id=me/mine", "hub_private=true"))
    assert calls == [(("me/mine",), {"private": True})]
