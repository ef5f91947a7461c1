"""Batches without end, in an order that can be taken up anywhere, with and without workers."""

import itertools
import json
from collections import Counter

import pytest
import torch

from refalign_adapter.data.cache.build import cache_dataset
from refalign_adapter.errors import UserError
from refalign_adapter.recipes.cache_options import options_of
from refalign_adapter.recipes.file import load_recipe
from refalign_adapter.training.datasource import batches_of_equals, open_data
from refalign_adapter.training.setup import build_accelerator


@pytest.fixture
def make_data(make_recipe, tmp_path):
    def make(*overrides):
        recipe = make_recipe(*overrides)
        return open_data(recipe, build_accelerator(recipe, tmp_path))

    return make


def test_order_goes_on_where_it_was_left_over_the_end_of_a_pass(make_data):
    data = make_data()
    length = len(data.sampler)
    keys = [batch.keys for batch in itertools.islice(data.training_batches(0, 0), 3 * length)]
    assert len({key for batch in keys for key in batch}) == 7  # ten rows, three of them held out
    for start in (1, length, length + 2):
        taken_up = data.training_batches(start // length, start % length)
        assert [batch.keys for batch in itertools.islice(taken_up, length)] == keys[start : start + length]
    at_the_end = next(data.training_batches(0, length))
    assert at_the_end.keys == keys[length]


def test_workers_change_nothing(make_data):
    one, other = (itertools.islice(make_data(f"dataloader_num_workers={n}").training_batches(0, 1), 8) for n in (0, 1))
    for left, right in zip(one, other, strict=True):
        assert left.keys == right.keys
        assert torch.equal(left.references, right.references)


def test_augmented_variants_alternate_and_cross_pairs_stay(make_data):
    data = make_data("train_batch_size=1")
    length = len(data.sampler)
    seen = {}
    for batch in itertools.islice(data.training_batches(0, 0), 3 * length):
        seen.setdefault(batch.keys[0], []).append(batch.references)
    kinds = set()
    for first, second, third in seen.values():
        assert torch.equal(first, third)
        kinds.add(torch.equal(first, second))
    assert kinds == {True, False}  # cross pairs have one version, regular pairs two


def test_validation_rows_are_no_training_rows(make_data):
    data = make_data("validation_batches=1")
    assert data.groups == [[0, 1]]
    assert len(data.validation) == 3
    assert not {*data.validation.keys} & {*data.training.keys}
    assert data.validation_batch(0).keys == data.validation.keys[:2]


def test_batches_bring_small_references_and_the_tokens_that_are_kept(economical_world, make_data):
    data = make_data(*economical_world)
    for batch in (next(data.training_batches(0, 0)), data.validation_batch(0)):
        assert batch.latents.shape[-2:] == (6, 6)
        assert batch.references.shape[-2:] == (4, 4)
        assert batch.tokens.shape == (*batch.mask.shape, 2, 2)
        assert torch.equal(batch.tokens.flatten(2).any(-1), batch.mask)


def test_a_cache_of_whole_references_is_refused_where_small_ones_are_trained(economical_world, make_data):
    with pytest.raises(UserError, match=r"made with reference_scale 1.0 instead of 0.5, drop_background False"):
        make_data(*economical_world[1:])


def test_batches_of_equals_keep_order_and_shape():
    assert batches_of_equals(["a", "b", "a", "a", "b"], 2) == [[0, 2], [3], [1, 4]]


def test_rows_with_as_many_references_can_share_batches_and_nothing_is_stretched(make_data):
    together = make_data("train_batch_size=3")
    apart = make_data("train_batch_size=3", "data.bucket_by_references=true")
    masks = [batch.mask for batch in itertools.islice(together.training_batches(0, 0), 8)]
    assert not all(mask.all() for mask in masks)
    counts = set()
    for batch in itertools.islice(apart.training_batches(0, 0), 2 * len(apart.sampler)):
        assert batch.mask.all()
        counts.add(batch.mask.shape[1])
        assert batch.latents.shape[-2:] == batch.references.shape[-2:] == (6, 6)
    assert counts == {1, 2, 3}
    assert all(apart.validation_batch(index).mask.all() for index in range(len(apart.groups)))


def test_sources_are_mixed_by_the_recipes_ratios(tiny_world, tmp_path, make_data):
    clips = tiny_world / "clips"
    lines = (clips / "metadata.jsonl").read_text().splitlines(keepends=True)
    for name, part in (("few", lines[:2]), ("many", lines[2:])):
        (tmp_path / f"{name}.jsonl").write_text("".join(part))
    sources = [{"path": str(tmp_path / f"{name}.jsonl"), "videos": str(clips)} for name in ("few", "many")]
    for name in ("few", "many"):  # references are beside the table
        text = (tmp_path / f"{name}.jsonl").read_text()
        (tmp_path / f"{name}.jsonl").write_text(text.replace('"image": "', f'"image": "{clips}/'))
    overrides = [f"data.cache_dir={tmp_path / 'cache'}", "data.validation_rows=0", "train_batch_size=1"]

    def data(ratios):
        values = [{**source, "ratio": ratio} for source, ratio in zip(sources, ratios, strict=True)]
        return make_data(*overrides, f"data.train_data={json.dumps(values)}")

    recipe = [*overrides, f"data.train_data={json.dumps(sources)}"]
    cache_dataset(options_of(load_recipe(tiny_world / "recipe.yaml", recipe)), device="cpu")
    for ratios, wanted in (((1, 1), {0: 5, 1: 5}), ((1, 4), {0: 2, 1: 8})):
        mixed = data(ratios)
        source_of = dict(zip(mixed.training.keys, mixed.training.sources, strict=True))
        batches = itertools.islice(mixed.training_batches(0, 0), len(mixed.sampler))
        assert Counter(source_of[batch.keys[0]] for batch in batches) == wanted
