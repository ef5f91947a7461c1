"""Lines of an index and what `meta.json` says of targets: those of earlier versions, and those that nobody writes."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from seals import seal, unseal

from refalign_adapter.batch import EMBEDDING
from refalign_adapter.data.cache.dataset import CachedDataset
from refalign_adapter.data.cache.entries import IndexEntry, RowParts, entry_of, line_of
from refalign_adapter.data.cache.index import listed_targets, listed_texts
from refalign_adapter.errors import UserError

KEYS = [letter * 32 for letter in "abcdef"]
OLD = (
    f'{{"key": "{KEYS[0]}", "file_name": "a.mp4", "line": 1, "parts": {{"video": "{KEYS[1]}", '
    f'"references": "{KEYS[2]}", "text": "{KEYS[3]}", "teachers": {{"dino": "{KEYS[4]}"}}, "tokens": "{KEYS[5]}"}}, '
    '"shape": [16, 2, 4, 6], "variants": 2, "subjects": [0, 1]}'
)


def test_a_line_of_before_is_read_and_written_as_it_was():
    entry = entry_of(json.loads(OLD))
    assert entry.parts.targets == {"reference": {"dino": KEYS[4]}}
    assert json.dumps(line_of(entry)) == OLD
    without = OLD.replace(f', "tokens": "{KEYS[5]}"', "")
    assert json.dumps(line_of(entry_of(json.loads(without)))) == without


def test_what_came_later_stands_in_a_line_where_there_is_any():
    text = {EMBEDDING: KEYS[3], "encoder_attention_mask": KEYS[5]}
    parts = RowParts(KEYS[1], None, text, {"toy": {"colour": KEYS[4]}})
    entry = IndexEntry(KEYS[0], "a.mp4", 1, parts, (16, 2, 4, 6), 1, ())
    line = json.loads(json.dumps(line_of(entry)))
    assert line["parts"] == {
        "video": KEYS[1],
        "references": None,
        "text": text,
        "teachers": {},
        "targets": {"toy": {"colour": KEYS[4]}},
    }
    assert entry_of(line) == entry
    assert parts.files() == [("video", KEYS[1]), ("text", KEYS[3]), ("text", KEYS[5]), ("target_toy", KEYS[4])]


@pytest.mark.parametrize(
    "changes",
    [
        {"video": None},
        {"text": None},
        {"text": {}},
        {"text": {"encoder_hidden_states": "../../etc"}},
        {"text": {"../up": KEYS[3]}},
        {"text": {"m" * 2000: KEYS[3]}},
        {"text": [KEYS[3]]},
        {"references": None},
        {"teachers": ["dino"]},
        {"teachers": {"dino": "../../etc"}},
        {"targets": {"../up": {"one": KEYS[4]}}},
        {"targets": {"toy": KEYS[4]}},
        {"targets": {"toy": {"one": 5}}},
        {"targets": {"reference": {"one": KEYS[4]}}},
        {"targets": [1]},
        {"another": KEYS[4]},
    ],
    ids=str,
)
def test_parts_that_nobody_writes_are_refused(changes):
    line = json.loads(OLD)
    line["parts"] |= changes
    with pytest.raises((ValueError, TypeError, KeyError, AttributeError)):
        entry_of(line)


def test_meta_of_reference_alignment_alone_is_that_of_before():
    shapes = {"dino": [None, None, 24]}
    assert listed_targets({"reference": {"of": "references", "shapes": shapes}}) == {"teachers": {"dino": 24}}
    assert listed_targets({}) == {"teachers": {}}


def test_meta_of_embeddings_alone_is_that_of_before(cached):
    assert listed_texts({EMBEDDING: torch.empty(1, 24, 32, device="meta")}, 24) == {}
    meta = json.loads((Path(cached[0].cache_dir) / "meta.json").read_text())
    assert "text" not in meta
    assert isinstance(meta["empty_text"], str)


@pytest.mark.parametrize(
    "targets",
    [
        [],
        {"../up": {"of": "video", "shapes": {}}},
        {"reference": {"of": "video", "shapes": {}}},
        {"toy": {"of": "nothing", "shapes": {}}},
        {"toy": {"of": "video"}},
        {"toy": {"of": "video", "shapes": {"one": 3}}},
        {"toy": {"of": "video", "shapes": {"one": []}}},
        {"toy": {"of": "video", "shapes": {"one": [None]}}},
        {"toy": {"of": "video", "shapes": {"one": [0, 3]}}},
        {"toy": {"of": "video", "shapes": {"one": [None] * 9 + [3]}}},
    ],
    ids=str,
)
def test_targets_that_nobody_writes_are_a_damaged_cache(cached, tmp_path, targets):
    copy = shutil.copytree(cached[0].cache_dir, tmp_path / "cache")
    meta = unseal(copy)
    (copy / "meta.json").write_text(json.dumps({**meta, "targets": targets}))
    seal(copy)
    with pytest.raises(UserError, match="is damaged or edited; run `refalign cache"):
        CachedDataset(copy)
