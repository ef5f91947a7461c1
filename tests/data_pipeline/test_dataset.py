"""Reading a cache and stacking its samples."""

import json
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import tiny_data
import torch

from refalign_adapter.batch import EMBEDDING, CachedSample
from refalign_adapter.data.cache.collate import collate
from refalign_adapter.data.cache.dataset import CachedDataset, open_cache
from refalign_adapter.data.cache.options import DTYPES
from refalign_adapter.errors import UserError


def test_samples_have_the_documented_shapes_and_need_no_encoder(cached, tmp_path):
    options, _ = cached
    teacher = options.teachers[0]
    base = tmp_path / "base"  # only its name counts: nothing of it is opened
    base.mkdir()
    dataset = open_cache(replace(options, base_model=str(base)))
    assert dataset.shapes == [(16, 2, 4, 6)] * 4
    assert dataset.meta.widths == {"reference": {teacher: 24}}
    assert dataset.meta.max_sequence_length == 24
    assert dataset.meta.empty_text[EMBEDDING].shape == (24, 32)
    assert dataset.meta.empty_text[EMBEDDING][1:].abs().sum() == 0
    assert len(set(dataset.keys)) == len(dataset) == 4
    for index, sample in enumerate(dataset[index] for index in range(4)):
        count, variants = index % 3 + 1, index % 2 + 1
        assert sample.key == dataset.keys[index]
        assert sample.latents.shape == (16, 2, 4, 6)
        assert sample.text[EMBEDDING].shape == (24, 32)
        assert sample.references.shape == (variants, count, 16, 4, 6)
        assert sample.targets["reference"][teacher].shape == (variants, count, 2, 3, 24)
        assert sample.subjects.tolist() == [0, 1, 1][:count]
        assert {sample.latents.dtype, sample.text[EMBEDDING].dtype, sample.references.dtype} == {torch.bfloat16}


def test_rows_choose_and_order(cached):
    options, _ = cached
    keys = CachedDataset(options.cache_dir).keys
    chosen = CachedDataset(options.cache_dir, [keys[2], keys[0]], targets={})
    assert [chosen[0].key, chosen[1].key] == [keys[2], keys[0]]
    assert chosen[0].targets == chosen.meta.widths == {}
    with pytest.raises(UserError, match="rows: 'nothing' is no train row"):
        CachedDataset(options.cache_dir, ["nothing"])


def test_a_validation_manifest_gets_an_index_of_its_own(cached, encoders, build_options, tmp_path):
    options, _ = cached
    data = Path(options.train_data).parent
    lines = Path(options.train_data).read_text().splitlines(keepends=True)
    shutil.copytree(data, tmp_path / "data")
    (tmp_path / "data/metadata.jsonl").write_text("".join(lines[2:]))
    changes = {"cache_dir": str(tmp_path / "cache"), "validation_data": str(tmp_path / "data")}
    report = build_options(options, encoders, **changes)
    assert report.rows == {"train": 4, "validation": 2}
    assert dict(report.made) == {"video": 4, "references": 4, "text": 5, "teacher": 4}
    options = replace(options, **changes)
    assert open_cache(options, split="validation").keys == open_cache(options).keys[2:]
    with pytest.raises(UserError, match="has no validation rows; run `refalign cache --config"):
        open_cache(cached[0], split="validation")


@pytest.mark.parametrize(
    ("changes", "problem"),
    [
        ({"height": 64, "fps": 16}, "was made with height 32 instead of 64, fps 8.0 instead of 16.0"),
        ({"base_model": "other/model"}, "was made with base_model base instead of other/model"),
        (
            {"reference_scale": 0.5, "drop_background": True},
            "was made with reference_scale 1.0 instead of 0.5, drop_background False instead of True",
        ),
        ({"teachers": ("other/teacher",)}, "has no features of 'other/teacher'"),
        ({"cache_dir": "/nowhere"}, "there is no finished cache in '/nowhere'"),
    ],
)
def test_a_cache_that_does_not_fit_is_one_line_that_says_what_to_run(cached, changes, problem):
    with pytest.raises(UserError, match=problem) as caught:
        open_cache(replace(cached[0], **changes))
    assert "refalign cache --config" in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_manifest_that_changed_since_is_told(cached, tmp_path):
    options, _ = cached
    (tmp_path / "metadata.jsonl").write_text(Path(options.train_data).read_text() + "\n")
    with pytest.raises(UserError, match="train_data: it has changed since the cache in .* was made; run `refalign"):
        open_cache(replace(options, train_data=str(tmp_path)))
    assert len(open_cache(replace(options, train_data=None))) == 4


def test_a_change_of_any_source_is_told_and_one_of_their_mixture_is_none(options, encoders, build_options, tmp_path):
    other = tiny_data.write_data(tmp_path / "other", 2, frames=10)
    sources = [{"path": options.train_data, "ratio": 1}, {"path": str(other), "max_rows": 2, "ratio": 1}]
    mixed = replace(options, train_data=sources, cache_dir=str(tmp_path / "cache"))
    build_options(mixed, encoders)
    assert open_cache(mixed).sources == [0, 1, 0, 1, 0, 0]
    assert open_cache(replace(mixed, train_data=[{**source, "ratio": 7} for source in sources])).meta
    for changed in ([*sources[:1]], [sources[0], {**sources[1], "max_rows": 1}]):
        with pytest.raises(UserError, match="train_data: it has changed since"):
            open_cache(replace(mixed, train_data=changed))
    other.write_text(other.read_text() + "\n")
    with pytest.raises(UserError, match="train_data: it has changed since"):
        open_cache(mixed)
    (tmp_path / "other").rename(tmp_path / "moved")  # what is not here cannot be compared
    assert len(open_cache(mixed)) == 6


def test_a_damaged_cache_is_one_line(cached, tmp_path):
    options, _ = cached
    copy = shutil.copytree(options.cache_dir, tmp_path / "cache")
    dataset = CachedDataset(copy)
    dataset.store.path("video", dataset.entries[0].parts.video).write_bytes(b"1234")
    message = r"^cache: train line 1 \(clips/0.mp4\): .* cannot be read .*; run `refalign cache"
    with pytest.raises(UserError, match=message):
        dataset[0]
    index = copy / "index-train.jsonl"
    index.write_text(index.read_text()[:-30])
    with pytest.raises(UserError, match="is damaged .*run `refalign cache"):
        CachedDataset(copy)
    meta = json.loads((copy / "meta.json").read_text())
    (copy / "meta.json").write_text(json.dumps({**meta, "format": 0}))
    with pytest.raises(UserError, match="another version of this package"):
        CachedDataset(copy)
    (copy / "meta.json").write_text("[]")
    with pytest.raises(UserError, match="is damaged"):
        CachedDataset(copy)


def sample(key, count, variants, subjects=None, tokens=False):
    draw = lambda *shape: torch.randn(shape, generator=torch.Generator().manual_seed(count))  # noqa: E731
    return CachedSample(
        key=key,
        latents=draw(2, 3, 4, 5),
        text={EMBEDDING: draw(6, 7)},
        references=draw(variants, count, 2, 4, 5),
        targets={"reference": {"one": draw(variants, count, 2, 3, 8), "two": draw(variants, count, 1, 1, 4)}},
        subjects=torch.tensor(subjects or range(count)),
        tokens=draw(variants, count, 2, 3) > 0 if tokens else None,
    )


def test_collate_pads_references_at_the_end_and_picks_variants():
    samples = [sample("a", 1, 3), sample("b", 3, 1, [0, 1, 0])]
    batch = collate(samples, variants=[5, 4])
    assert batch.keys == ["a", "b"]
    assert batch.mask.tolist() == [[True, False, False], [True, True, True]]
    assert batch.subjects.tolist() == [[0, -1, -1], [0, 1, 0]]
    assert batch.subjects.dtype == torch.int64
    assert torch.equal(batch.latents, torch.stack([item.latents for item in samples]))
    assert torch.equal(batch.text[EMBEDDING], torch.stack([item.text[EMBEDDING] for item in samples]))
    assert batch.references.shape == (2, 2, 3, 4, 5)
    assert torch.equal(batch.references[0, :, 0], samples[0].references[5 % 3, 0])
    assert batch.references[0, :, 1:].abs().sum() == 0
    assert torch.equal(batch.references[1].transpose(0, 1), samples[1].references[0])
    for name, shape in {"one": (2, 3, 2, 3, 8), "two": (2, 3, 1, 1, 4)}.items():
        assert batch.targets["reference"][name].shape == shape
        assert torch.equal(batch.targets["reference"][name][0, 0], samples[0].targets["reference"][name][2, 0])
        assert batch.targets["reference"][name][0, 1:].abs().sum() == 0
        assert torch.equal(batch.targets["reference"][name][1], samples[1].targets["reference"][name][0])
    assert torch.equal(collate(samples).references[0, :, 0], samples[0].references[0, 0])


def test_collate_picks_and_pads_the_references_tokens_along_with_them():
    assert collate([sample("a", 2, 1)]).tokens is None
    samples = [sample("a", 1, 3, tokens=True), sample("b", 3, 1, tokens=True)]
    batch = collate(samples, variants=[5, 4])
    assert batch.tokens.dtype == torch.bool
    assert batch.tokens.shape == (2, 3, 2, 3)
    assert torch.equal(batch.tokens[0, 0], samples[0].tokens[2, 0])
    assert not batch.tokens[0, 1:].any()
    assert torch.equal(batch.tokens[1], samples[1].tokens[0])
    moved = batch.to("meta", torch.float16)
    assert (moved.tokens.device.type, moved.tokens.dtype) == ("meta", torch.bool)
    assert (moved.references.device.type, moved.references.dtype) == ("meta", torch.float16)


@pytest.mark.parametrize("dtype", DTYPES)
def test_the_storage_precision_bounds_the_error(cached, encoders, build_options, tmp_path, dtype):
    options, _ = cached
    exact, stored = (tmp_path / name for name in ("exact", "stored"))
    build_options(options, encoders, cache_dir=str(exact), dtype="fp32")
    build_options(options, encoders, cache_dir=str(stored), dtype=dtype)
    epsilon = torch.finfo(DTYPES[dtype]).eps
    for index in range(4):
        one, other = CachedDataset(exact)[index], CachedDataset(stored)[index]
        pairs = [(getattr(one, name), getattr(other, name)) for name in ("latents", "references")]
        for precise, rounded in [*pairs, (one.text[EMBEDDING], other.text[EMBEDDING])]:
            assert ((precise - rounded.float()).abs() <= epsilon * precise.abs() + 1e-6).all()
