"""A second objective, `toy_objective`, known nowhere else: cached, trained, logged, validated, saved and resumed."""

from dataclasses import replace

import pytest
import torch
from safetensors.torch import load_file
from toy_objective import TEACHER, MeanColour, Toy

from refalign_adapter.alignment.schedule import AlignmentSchedule
from refalign_adapter.data.cache.build import cache_dataset
from refalign_adapter.data.cache.dataset import CachedDataset, open_cache
from refalign_adapter.data.cache.freshness import check_fresh
from refalign_adapter.data.cache.verify import prune_cache, verify_cache
from refalign_adapter.errors import ConfigError, UserError
from refalign_adapter.media.video import read_video
from refalign_adapter.recipes.cache_options import options_of
from refalign_adapter.recipes.file import load_recipe
from refalign_adapter.training.interrupt import SignalWatch
from refalign_adapter.training.loop import DATA_WAIT, endless_batches, optimizer_step, train
from refalign_adapter.training.setup import build_accelerator, build_run
from refalign_adapter.training.tracking import LossMeter, read_metrics

ALL = ["adapter.attention=isolated", "adapter.lora_scope=all"]  # a LoRA in both passes
OPTIONS = ["max_train_steps=2", "checkpointing_steps=1", "validation_steps=1", "gradient_accumulation_steps=1"]
PROJECTORS = "training/projectors.safetensors"


@pytest.fixture(scope="module")
def cached(tiny_world, tmp_path_factory):
    """The options of a cache of the tiny world with mean colours, and what says where it is."""
    where = f"data.cache_dir={tmp_path_factory.mktemp('toy')}"
    options = replace(options_of(load_recipe(tiny_world / "recipe.yaml", [where])), targets=(MeanColour(),))
    cache_dataset(options, device="cpu")
    return options, where


def toy(**schedule):
    return Toy(schedule=AlignmentSchedule(**{"weight": 0.5, **schedule}))


def rows(folder):
    return [
        {name: value for name, value in row.items() if name != DATA_WAIT}
        for row in read_metrics(folder / "metrics.jsonl")
    ]


def test_its_targets_are_a_part_of_their_own_and_read_where_they_are_asked_for(cached, tiny_world):
    options, _ = cached
    every = CachedDataset(options.cache_dir)
    assert every.meta.widths == {"reference": {options.teachers[0]: 24}, "toy": {TEACHER: 3}}
    sample, entry = every[0], every.entries[0]
    pixels = torch.from_numpy(read_video(f"{tiny_world}/clips/0.mp4", num_frames=5, height=48, width=48)) / 255
    colours = pixels.mean((1, 2))
    expected = torch.stack([colours[0], colours[1:].mean(0)])  # one pixel frame, then four to a latent frame
    torch.testing.assert_close(sample.targets["toy"][TEACHER].float(), expected, atol=4e-3, rtol=0)
    assert every.store.path("target_toy", entry.parts.targets["toy"][TEACHER]).is_file()
    assert open_cache(replace(options, targets=()))[0].targets.keys() == {"reference"}
    files = verify_cache(options)
    assert files.count == 1 + sum(1 for _ in {file for item in every.entries for file in item.parts.files()})
    check_fresh(options)
    assert prune_cache(options.cache_dir).count == 0


def test_a_cache_made_with_it_is_the_other_cache_and_more(cached, tiny_world):
    """So a cache is filled with a new objective's targets by encoding these alone."""
    options, _ = cached
    before = CachedDataset(tiny_world / "cache")
    now = CachedDataset(options.cache_dir)
    assert before.keys == now.keys
    for one, other in zip(before.entries, now.entries, strict=True):
        assert other.parts.files()[:-1] == one.parts.files()
        assert other.parts.files()[-1][0] == "target_toy"
    report = cache_dataset(replace(options, targets=(MeanColour(gain=2.0),)), device="cpu")
    assert report.made == {"target_toy": 10}
    assert cache_dataset(options, device="cpu").made == {}
    assert prune_cache(options.cache_dir).count == 10


@pytest.mark.parametrize("checkpointing", [False, True])
def test_it_trains_is_logged_validated_saved_and_resumed_to_the_bit(make_recipe, cached, tmp_path, checkpointing):
    options = [*OPTIONS, *ALL, cached[1], f"gradient_checkpointing={str(checkpointing).lower()}"]
    straight, parts = tmp_path / "straight", tmp_path / "parts"
    train(make_recipe(f"output_dir={straight}", *options), [toy(warmup_steps=1, decay="cosine", decay_steps=4)])
    parts.mkdir()
    (straight / "checkpoint-1").rename(parts / "checkpoint-1")
    resumed = [toy(warmup_steps=1, decay="cosine", decay_steps=4)]
    train(make_recipe(f"output_dir={parts}", "resume_from_checkpoint=latest", *options), resumed)
    for name in ("adapter/pytorch_lora_weights.safetensors", PROJECTORS, "training/optimizer.safetensors"):
        left, right = (load_file(folder / "checkpoint-2" / name) for folder in (straight, parts))
        assert left.keys() == right.keys()
        assert all(torch.equal(left[key], right[key]) for key in left), name
    assert [row for row in rows(straight) if row["step"] > 1] == rows(parts)
    heads = load_file(straight / PROJECTORS)
    assert {"toy.head.weight", "toy.head.bias"} == {name for name in heads if not name.startswith("heads.")}
    assert len(heads) > 2
    assert not torch.equal(heads["toy.head.weight"], Toy().head.weight)
    training = [row for row in rows(straight) if "train/loss" in row]
    assert [row["train/toy_weight"] for row in training] == [0, 0.5]
    assert [row["train/alignment_weight"] for row in training] == [1, 1]
    assert ["train/toy/error" in row for row in training] == [False, True]  # it has no weight before
    held_out = [row for row in rows(straight) if "validation/loss" in row]
    assert all(row["validation/toy/error"] > 0 and row["validation/positive"] > 0 for row in held_out)
    expected = [
        row["validation/flow"]
        + row["validation/positive"]
        + row["validation/negative"]
        + 0.5 * row["validation/toy/error"]
        for row in held_out
    ]
    assert [row["validation/loss"] for row in held_out] == pytest.approx(expected, rel=1e-5)


def test_it_reaches_the_lora_and_its_head_and_moves_nothing_else(make_recipe, cached, tmp_path):
    recipe = make_recipe("optimizer=adamw", "adapter.lora_dropout=0", "alignment.weight=0", *ALL, cached[1])
    run = build_run(recipe, build_accelerator(recipe, tmp_path), tmp_path, objectives=[toy()])
    before = {name: value.clone() for name, value in run.module.state_dict().items()}
    trained = {name for name, parameter in run.module.named_parameters() if parameter.requires_grad}
    batches = endless_batches(run)
    for _ in range(2):
        values = optimizer_step(run, batches, LossMeter(run.module.logs), SignalWatch())
    assert {"train/toy/error", "train/toy_weight"} < values.keys()
    assert not {"train/positive", "train/alignment_weight"} & values.keys()
    after = run.module.state_dict()
    assert {name for name in before if not torch.equal(before[name], after[name])} == trained


def test_every_part_that_is_off_gives_every_parameter_a_gradient(make_recipe, cached, tmp_path):
    recipe = make_recipe(*ALL, cached[1], "adapter.lora_scope=reference", "adapter.lora_dropout=0")
    run = build_run(recipe, build_accelerator(recipe, tmp_path), tmp_path, objectives=[toy()])
    batch, alone = next(endless_batches(run)), next(endless_batches(run))
    alone.mask[:] = False
    for weights in ({}, {"toy": 0.5}, {"reference": 1.0}, {"reference": 1.0, "toy": 0.5}):
        for shown in (batch, alone):
            run.module.zero_grad()
            output = run.module(shown, run.data.empty_text, generator=torch.Generator(), weights=weights)
            output.loss.backward()
            trained = {name: item for name, item in run.module.named_parameters() if item.requires_grad}
            assert [name for name, item in trained.items() if item.grad is None] == []
            assert bool(trained["objectives.1.head.weight"].grad.any()) == ("toy" in weights)


def test_a_checkpoint_goes_on_with_the_objectives_it_was_trained_with(make_recipe, cached, tmp_path):
    options = [*OPTIONS, *ALL, cached[1], "optimizer=adamw", "max_train_steps=1"]
    train(make_recipe(*options), [toy()])
    resumed = make_recipe(*options, "max_train_steps=2", "resume_from_checkpoint=latest")
    message = "was trained with objective 'toy', this recipe is without it; train with"
    with pytest.raises(UserError, match=message) as told:
        train(resumed)
    assert "\n" not in str(told.value)
    assert '"schedules"' in (tmp_path / "out/checkpoint-1/training/state.json").read_text()
    plain = [f"output_dir={tmp_path / 'plain'}", *options]
    train(make_recipe(*plain))
    assert '"schedules"' not in (tmp_path / "plain/checkpoint-1/training/state.json").read_text()  # as before
    with pytest.raises(UserError, match="was trained without objective 'toy', this recipe is with it"):
        train(make_recipe(*plain, "max_train_steps=2", "resume_from_checkpoint=latest"), [toy()])


def test_a_run_starts_from_heads_of_the_same_objective(make_recipe, cached, tmp_path, capsys):
    options = [*OPTIONS, *ALL, cached[1], "optimizer=adamw", "max_train_steps=1"]
    folder = train(make_recipe(*options), [toy()])
    saved = load_file(tmp_path / "out" / PROJECTORS)
    second = make_recipe(*options, f"init_adapter={folder}", "seed=7")
    run = build_run(second, build_accelerator(second, tmp_path), tmp_path, objectives=[Toy(seed=9)])
    assert torch.equal(run.trained.objectives[1].head.weight, saved["toy.head.weight"])
    build_run(second, build_accelerator(second, tmp_path), tmp_path)  # without it, its heads are left alone
    capsys.readouterr()
    train(make_recipe(*options, f"output_dir={tmp_path / 'plain'}"))
    third = make_recipe(*options, f"init_adapter={tmp_path / 'plain/adapter'}")
    run = build_run(third, build_accelerator(third, tmp_path), tmp_path, objectives=[Toy(seed=9)])
    assert torch.equal(run.trained.objectives[1].head.weight, Toy(seed=9).head.weight)
    assert "no projectors of objective toy lie beside" in capsys.readouterr().err


def test_what_does_not_go_together_is_told_at_once(make_recipe, cached, tmp_path):
    recipe = make_recipe(*ALL, cached[1])
    accelerator = build_accelerator(recipe, tmp_path)
    beyond = Toy(block=7)
    with pytest.raises(ConfigError) as told:
        build_run(recipe, accelerator, tmp_path, objectives=[toy(), beyond])
    assert told.value.problems == [
        "objective toy: video tokens of block 7 are asked for, there are 3 blocks",
        "objectives: 'toy' is there 2 times",
        "logs of objectives: 'toy/error' is there 2 times",
    ]
    plain = make_recipe(*ALL)
    with pytest.raises(UserError, match=f"has no targets for objective toy of {TEACHER!r}; run `refalign cache"):
        build_run(plain, accelerator, tmp_path, objectives=[toy()])
