"""Rows without references on their way from a table to a batch: legal at every station, alone and beside others."""

import csv
import json
from dataclasses import replace
from shutil import copytree

import pytest
import tiny_data
import torch
from seals import seal

from refalign_adapter.data.cache.collate import collate
from refalign_adapter.data.cache.dataset import CachedDataset
from refalign_adapter.data.cache.verify import prune_cache, verify_cache
from refalign_adapter.data.check.check import check_data
from refalign_adapter.data.check.contact_sheet import write_contact_sheets
from refalign_adapter.data.check.summary import summarize
from refalign_adapter.data.sources.manifest import load_manifest
from refalign_adapter.errors import UserError
from refalign_adapter.estimate.disk import HEADER, row_bytes
from refalign_adapter.estimate.shapes import SampleShapes


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    """Six rows: 1, 2, 3 and 1 references, then an empty list of them, then not even that."""
    folder = tmp_path_factory.mktemp("data")
    manifest = tiny_data.write_data(folder, 4, height=32, width=48)
    rows = [json.loads(line) for line in manifest.read_text().splitlines()]
    for number in (4, 5):
        tiny_data.write_clip(folder / f"clips/{number}.mp4", height=32, width=48, seed=number)
        rows.append({"file_name": f"clips/{number}.mp4", "caption": f"nobody is there {number}"})
    rows[4]["references"] = []
    return tiny_data.write_manifest(folder, rows)


@pytest.fixture(scope="module", params=[False, True], ids=["whole", "background dropped"])
def cached(request, options, encoders, build_options, data, tmp_path_factory):
    """(options of their cache, the report of making it)."""
    changed = replace(
        options,
        train_data=str(data),
        cache_dir=str(tmp_path_factory.mktemp("cache")),
        drop_background=request.param,
    )
    return changed, build_options(changed, encoders)


def test_tables_have_them(data):
    rows = load_manifest(data)
    assert [len(row.references) for row in rows] == [1, 2, 3, 1, 0, 0]
    assert [row.pair for row in rows[4:]] == ["cross", "cross"]
    with (data.parent / "rows.csv").open("w", newline="") as file:
        writer = csv.DictWriter(file, ["file_name", "caption", "references"])
        writer.writeheader()
        writer.writerow({"file_name": "clips/4.mp4", "caption": "a", "references": "[]"})
        writer.writerow({"file_name": "clips/5.mp4", "caption": "a", "references": ""})
    assert [row.references for row in load_manifest(data.parent / "rows.csv")] == [(), ()]


def test_the_check_counts_them_and_shows_them(options, data, tmp_path):
    options = replace(options, train_data=str(data))
    check = check_data(options)
    assert check.problems == []
    texts = [note.text for note in check.notes if note.kind == "no_references"]
    assert texts == ["references: none in 2 of 6 training rows"]
    sizes = next(table for table in summarize(check) if "number of references" in table.title)
    assert sizes.columns == ("size", "0 references", "1 reference", "2 references", "3 references", "all")
    assert sizes.rows == [("5x32x48", 2, 2, 1, 1, 6)]
    write_contact_sheets(tmp_path / "sheets", check, options, sheets=6)
    page = next((tmp_path / "sheets").rglob("1.html")).read_text()
    assert "nobody is there 4" in page
    assert page.count('class="reference"') == 7


def test_the_cache_has_no_reference_part_of_them(cached):
    options, report = cached
    assert report.rows == {"train": 6}
    assert report.made["video"] == 6
    assert report.made["references"] == report.made["teacher"] == 4
    entries = CachedDataset(options.cache_dir).entries
    assert [part for part, _ in entries[4].parts.files()] == ["video", "text"]
    assert (entries[4].parts.references, entries[4].parts.targets, entries[4].subjects) == (None, {}, ())
    assert verify_cache(options).count == 1 + len({file for entry in entries for file in entry.parts.files()})
    assert prune_cache(options.cache_dir).count == 0


def test_a_second_run_makes_nothing(cached, encoders, build_options):
    options, _ = cached
    assert build_options(options, encoders).made == {}


def test_batches_of_them_alone_have_no_references(cached):
    options, _ = cached
    dataset = CachedDataset(options.cache_dir)
    assert dataset.reference_counts == [1, 2, 3, 1, 0, 0]
    batch = collate([dataset[4], dataset[5]], variants=[3, 4])
    assert batch.references.shape == (2, 16, 0, 4, 6)
    assert batch.mask.shape == batch.subjects.shape == (2, 0)
    assert batch.targets == {}
    assert batch.tokens is None
    assert batch.to("cpu", torch.float16).references.dtype == torch.float16


def test_beside_others_they_are_padded(cached):
    options, _ = cached
    dataset = CachedDataset(options.cache_dir)
    (teacher,) = options.teachers
    for order in ([4, 1], [1, 4]):
        samples = [dataset[row] for row in order]
        batch, place = collate(samples), order.index(1)
        assert batch.mask[place].tolist() == [True, True]
        assert batch.mask[1 - place].tolist() == [False, False]
        assert batch.subjects[1 - place].tolist() == [-1, -1]
        assert torch.equal(batch.references[place].transpose(0, 1), samples[place].references[0])
        assert not batch.references[1 - place].any()
        targets = batch.targets["reference"][teacher]
        assert torch.equal(targets[place], samples[place].targets["reference"][teacher][0])
        assert not targets[1 - place].any()
        if options.drop_background:
            assert torch.equal(batch.tokens[place], samples[place].tokens[0])
            assert not batch.tokens[1 - place].any()


def test_an_entry_with_subjects_and_no_references_is_damaged(cached, tmp_path):
    options, _ = cached
    copy = copytree(options.cache_dir, tmp_path / "cache")
    index = copy / "index-train.jsonl"
    lines = [json.loads(line) for line in index.read_text().splitlines()]
    for changes in ({"subjects": [0]}, {"parts": {**lines[4]["parts"], "references": "a" * 32}}):
        index.write_text("".join(json.dumps(line) + "\n" for line in [*lines[:4], {**lines[4], **changes}]))
        seal(copy)
        with pytest.raises(UserError, match="is damaged .*subjects"):
            CachedDataset(copy)


def test_the_estimate_counts_no_files_for_them(options):
    text = {
        "encoder_hidden_states": torch.empty(1, 24, 32, dtype=torch.bfloat16, device="meta"),
        "encoder_attention_mask": torch.empty(1, 24, dtype=torch.bool, device="meta"),
    }
    shapes = SampleShapes(
        (16, 2, 4, 6), text, (16, 4, 6), {"reference": {"t": (2, 3, 8)}, "toy": {"t": (2, 3)}}, (2, 3),
        torch.bfloat16, of_video=("toy",),
    )  # fmt: skip
    sizes = row_bytes(replace(options, drop_background=True), shapes, 0, 1)
    assert sizes == {
        "video": 16 * 2 * 4 * 6 * 2 + HEADER,
        "references": 0,
        "text": 24 * 32 * 2 + 24 + 2 * HEADER,
        "teacher": 0,
        "target_toy": 6 * 2 + HEADER,
    }
    assert shapes.batch(2, 0, "meta").references.shape == (2, 16, 0, 4, 6)
