"""Text of several tensors: embeddings, a mask and a pooled vector go through the cache as the encoder made them."""

import dataclasses
import json
import shutil
from pathlib import Path

import pytest
import torch
from seals import seal, unseal

from refalign_adapter.batch import EMBEDDING
from refalign_adapter.data.cache.collate import collate
from refalign_adapter.data.cache.dataset import CachedDataset
from refalign_adapter.data.cache.index import read_index
from refalign_adapter.data.cache.parts import PartStore
from refalign_adapter.data.cache.verify import prune_cache, verify_cache
from refalign_adapter.data.sources.manifest import load_manifest
from refalign_adapter.errors import UserError
from refalign_adapter.families.wan import WanFamily

MASK, POOLED = "encoder_attention_mask", "pooled_projections"
LENGTH, WIDTH = 24, 32


class ManyTexts(WanFamily):
    """Its text encoder gives embeddings whose padding is not zero, a mask and a vector for the whole prompt."""

    text_arguments = (EMBEDDING, MASK, POOLED)
    calls = 0

    def no_text(self, transformer, like, tokens=1):
        mask = torch.zeros(len(like), tokens, dtype=torch.bool, device=like.device)
        return {**super().no_text(transformer, like, tokens), MASK: mask, POOLED: like.new_zeros(len(like), 6)}

    def encode_text(self, pipe, prompts, max_sequence_length):
        self.calls += 1
        embeds = super().encode_text(pipe, prompts, max_sequence_length)[EMBEDDING]
        pooled = torch.cat([embeds.mean(1)[:, :4], embeds.new_zeros(len(embeds), 2)], 1)
        return {EMBEDDING: embeds + 1.0, MASK: embeds.ne(0).any(-1), POOLED: pooled}


class Contradicts(ManyTexts):
    """Says another shape than it makes."""

    def no_text(self, transformer, like, tokens=1):
        return super().no_text(transformer, like, tokens) | {POOLED: like.new_zeros(len(like), 7)}


@pytest.fixture(scope="module")
def many(encoders):
    return dataclasses.replace(encoders, family=ManyTexts())


@pytest.fixture(scope="module")
def cached(options, many, build_options, tmp_path_factory):
    options = dataclasses.replace(options, cache_dir=str(tmp_path_factory.mktemp("many") / "cache"))
    return options, build_options(options, many)


def test_every_tensor_comes_back_as_it_was_made(cached, many):
    options, report = cached
    assert dict(report.made)["text"] == 5 * 3  # four captions and the empty one
    assert many.family.calls == 5
    dataset = CachedDataset(options.cache_dir)
    captions = [row.caption for row in load_manifest(options.train_data, max_references=None)]
    for index, caption in enumerate([*captions, ""]):
        made = many.family.encode_text(many.pipe, [caption], LENGTH)
        read = dataset[index].text if caption else dataset.meta.empty_text
        assert list(read) == [EMBEDDING, MASK, POOLED]
        for name in (EMBEDDING, POOLED):
            assert torch.equal(read[name], made[name][0].bfloat16())
        assert torch.equal(read[MASK], made[MASK][0])
        assert read[MASK].dtype == torch.bool


def test_zeros_at_the_end_take_no_room(cached):
    options, _ = cached
    store, parts = PartStore(options.cache_dir), read_index(options.cache_dir, "train")[0].parts
    tokens = int(CachedDataset(options.cache_dir)[0].text[MASK].sum())
    assert 0 < tokens < LENGTH
    assert store.shape("text", parts.text[EMBEDDING]) == (LENGTH, WIDTH)  # none of it is zero
    assert store.shape("text", parts.text[MASK]) == (tokens,)
    assert store.shape("text", parts.text[POOLED]) == (4,)


def test_batches_hold_and_move_all_of_it(cached):
    dataset = CachedDataset(cached[0].cache_dir)
    batch = collate([dataset[0], dataset[1]])
    assert {name: tuple(text.shape) for name, text in batch.text.items()} == {
        EMBEDDING: (2, LENGTH, WIDTH),
        MASK: (2, LENGTH),
        POOLED: (2, 6),
    }
    moved = batch.to("cpu", torch.float32).text
    assert {name: text.dtype for name, text in moved.items()} == {
        EMBEDDING: torch.float32,
        MASK: torch.bool,
        POOLED: torch.float32,
    }


def test_it_is_not_made_twice_and_is_verified_and_kept(cached, many, build_options):
    options, _ = cached
    calls = many.family.calls
    assert "text" not in build_options(options, many).made
    assert many.family.calls == calls
    files = verify_cache(options)
    assert files.count == 4 * 3 + 5 * 3  # clips, references, features; texts
    assert prune_cache(options.cache_dir).count == 0
    assert verify_cache(options) == files


def test_one_missing_tensor_is_made_anew_alone(cached, many, build_options, tmp_path):
    options = dataclasses.replace(cached[0], cache_dir=str(shutil.copytree(cached[0].cache_dir, tmp_path / "copy")))
    entry = read_index(options.cache_dir, "train")[0]
    PartStore(options.cache_dir).path("text", entry.parts.text[MASK]).unlink()
    with pytest.raises(UserError, match="line 1 .*run `refalign cache"):
        CachedDataset(options.cache_dir)[0]
    assert dict(build_options(options, many).made) == {"text": 1}
    verify_cache(options)


def test_a_family_that_contradicts_itself_is_told(options, encoders, build_options, tmp_path):
    contradicting = dataclasses.replace(encoders, family=Contradicts())
    with pytest.raises(UserError, match=r"family: 'wan' encodes text to .*\(1, 6\).*its no_text says .*\(1, 7\)"):
        build_options(options, contradicting, cache_dir=str(tmp_path / "cache"))


@pytest.mark.parametrize(
    "facts",
    [
        [],
        {EMBEDDING: {"shape": [LENGTH, WIDTH], "mask": False}},  # not those of the keys
        {MASK: {"shape": [LENGTH], "mask": 1}},
        {MASK: {"shape": [], "mask": True}},
        {MASK: {"shape": [None], "mask": True}},
        {MASK: {"shape": [2**31 - 1], "mask": True}},
        {MASK: {"shape": [LENGTH]}},
        {MASK: [LENGTH]},
    ],
    ids=str,
)
def test_facts_that_nobody_writes_are_a_damaged_cache(cached, tmp_path, facts):
    copy = Path(shutil.copytree(cached[0].cache_dir, tmp_path / "copy"))
    meta = unseal(copy)
    whole = {**meta["text"], **facts} if isinstance(facts, dict) and MASK in facts else facts
    (copy / "meta.json").write_text(json.dumps({**meta, "text": whole}))
    seal(copy)
    with pytest.raises(UserError, match="is damaged or edited; run `refalign cache"):
        CachedDataset(copy)


def test_a_row_without_one_of_them_is_told(cached, tmp_path):
    copy = Path(shutil.copytree(cached[0].cache_dir, tmp_path / "copy"))
    index = copy / "index-train.jsonl"
    lines = [json.loads(line) for line in index.read_text().splitlines()]
    del lines[2]["parts"]["text"][POOLED]
    index.write_text("".join(json.dumps(line) + "\n" for line in lines))
    seal(copy)
    dataset = CachedDataset(copy)
    assert dataset[1].text.keys() == {EMBEDDING, MASK, POOLED}
    with pytest.raises(UserError, match=f"line 3 .*no features or text of '{POOLED}'; run `refalign cache"):
        dataset[2]
