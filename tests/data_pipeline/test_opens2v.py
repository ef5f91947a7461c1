"""OpenS2V-5M as published: the records' masks, the selection of subjects, regular and cross pairs."""

import copy
import json
import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import tiny_data

from refalign_adapter.data.sources.manifest import load_manifest
from refalign_adapter.data.sources.masks import decode_mask, encode_mask
from refalign_adapter.data.sources.opens2v import Unusable, read_clip
from refalign_adapter.data.sources.readers import opens2v_cross
from refalign_adapter.data.sources.selection import Candidate, select_subjects
from refalign_adapter.errors import UserError

DATA = Path(__file__).parent.parent / "data"
KEY = "gm1252760410-365677148_part2_step1-0-95_step2-0-95_step3_step4_step5"
OTHER_KEY = KEY.replace("step1-", "step122-")
RECORD = json.loads((DATA / "opens2v_regular_part.json").read_text())[KEY]
VIDEO = RECORD["metadata"]["path"]


@pytest.fixture(scope="module")
def videos(tmp_path_factory):
    """A folder with the record's video, as large as its masks."""
    folder = tmp_path_factory.mktemp("videos")
    tiny_data.write_clip(folder / VIDEO, frames=3, height=720, width=1280)
    return folder


@pytest.fixture
def part(tmp_path):
    """Write a part of records; returns its source's path."""

    def write(**records):
        path = tmp_path / "part.json"
        path.write_text(json.dumps(records))
        return str(path)

    return write


def changed(**paths):
    """The record with values at dotted places replaced; None deletes them."""
    record = copy.deepcopy(RECORD)
    for place, value in paths.items():
        *sections, name = place.split("__")
        target = record
        for section in sections:
            target = target[section]
        if value is None:
            del target[name]
        else:
            target[name] = value
    return record


def square(top, left, side):
    mask = np.zeros((20, 20), bool)
    mask[top : top + side, left : left + side] = True
    return encode_mask(mask)


def test_selection_by_scores_names_overlap_and_area():
    candidates = [
        Candidate("small", square(0, 0, 3), aesthetic=5.0),
        Candidate("large", square(0, 5, 9), aesthetic=4.5),
        Candidate("large again", square(0, 5, 9), gme=0.9),
        Candidate("matching", square(10, 0, 5), aesthetic=1.0, gme=0.6),
        Candidate("poor", square(10, 8, 9), aesthetic=4.49, gme=0.59),
        Candidate(" Park", square(0, 0, 20), aesthetic=9.0),
        Candidate("unscored", square(0, 0, 20)),
        Candidate("tiny", square(19, 19, 1), aesthetic=9.0),
    ]
    assert select_subjects(candidates, background=["park "]) == [1, 3, 0]
    assert select_subjects(candidates, background=["park"], max_subjects=9) == [1, 3, 0, 7]
    assert select_subjects(candidates, background=["park"], max_subjects=9, max_overlap=1.0) == [1, 2, 3, 0, 7]
    assert select_subjects(candidates, min_aesthetic=8.0, min_gme=1.0) == [5, 7]
    assert select_subjects([]) == []


def test_scores_alone_pick_scenery_and_the_rule_picks_the_person(videos):
    clip = read_clip(RECORD, [videos])
    candidates = [subject.candidate for subject in clip.subjects]
    names = lambda **rule: [candidates[index].name for index in select_subjects(candidates, **rule)]  # noqa: E731
    assert names(max_overlap=1.0) == ["green grass", "park", "park"]
    assert names() == ["green grass", "person", "grassy area"]
    assert names(background=clip.background) == ["person"]


def test_a_regular_row_is_the_record(part, videos):
    (row,) = load_manifest({"path": part(a=RECORD), "format": "opens2v_regular", "videos": str(videos)})
    assert (row.pair, row.clip, row.segment) == ("regular", videos / VIDEO, (0, 95))
    assert row.caption == RECORD["metadata"]["face_cap_qwen"].strip()
    assert row.crop == (0, 0, 1280, 720)
    (reference,) = row.references
    assert (reference.image, reference.frame, reference.crop) == (videos / VIDEO, 0, row.crop)
    left, top, right, bottom = RECORD["annotation"]["ann_frame_data"]["annotations"][1]["bbox"]  # mask 2 is its
    rows, columns = np.nonzero(decode_mask(reference.rle))
    np.testing.assert_allclose(
        [columns.min(), rows.min(), columns.max(), rows.max()], [left, top, right, bottom], atol=25
    )


def test_the_crop_is_x_then_y(part, videos):
    record = changed(metadata__crop=[10, 1200, 20, 700])
    (row,) = load_manifest({"path": part(a=record), "format": "opens2v_regular", "videos": str(videos)})
    assert row.crop == row.references[0].crop == (10, 20, 1200, 700)


def test_records_that_lack_something_are_counted_and_those_that_can_do_without_are_used(part, videos):
    records = [
        changed(metadata__face_cap_qwen=None),
        changed(metadata__path="elsewhere.mp4"),
        changed(annotation__mask_annotation={}),
        changed(annotation=None),
        changed(annotation__ann_frame_data__annotations=[]),
        changed(annotation__ann_frame_data__ann_frame_idx=None),
    ]
    reasons = []
    for record in records[:4] + records[5:]:
        with pytest.raises(Unusable) as caught:
            read_clip(record, [videos])
        reasons.append(str(caught.value))
    assert reasons == [
        "have no caption",
        "have no video here",
        "have no masks",
        "have no annotation",
        "have no annotated frame",
    ]
    source = {"format": "opens2v_regular", "videos": str(videos)}
    with pytest.raises(UserError, match="has no rows that can be used: .*1 have no subject that passes the selection"):
        load_manifest({**source, "path": part(**{str(number): record for number, record in enumerate(records)})})
    sparse = changed(metadata__crop=None, metadata__face_cut=None, metadata__cut=None, word_tags=None)
    (row,) = load_manifest({**source, "path": part(a=records[0], b=sparse), "max_subjects": 2})
    assert (row.line, row.crop, row.segment, len(row.references)) == (2, None, None, 2)
    (row,) = load_manifest({**source, "path": part(a=sparse)}, max_references=1)
    assert len(row.references) == 1


@pytest.fixture
def cross(tmp_path, videos):
    """The published pairs with two parts of the published record; returns the source."""
    shutil.copy(DATA / "opens2v_cross_pairs.json", tmp_path / "cross_pairs.json")
    shutil.copy(DATA / "opens2v_cluster_videos.json", tmp_path / "cluster_videos.json")
    other = changed(metadata__face_cap_qwen="another caption")
    (tmp_path / "dataset1.json").write_text(json.dumps({KEY: RECORD}))
    (tmp_path / "dataset1_cluster.json").write_text(json.dumps({KEY: RECORD, OTHER_KEY: other}))
    return {"path": str(tmp_path / "cross_pairs.json"), "format": "opens2v_cross", "videos": str(videos)}


def test_cross_rows_take_their_subjects_from_the_other_clip(cross, caplog):
    rows = load_manifest(cross)
    assert {row.caption for row in rows} == {"another caption", RECORD["metadata"]["face_cap_qwen"].strip()}
    assert {row.pair for row in rows} == {"cross"}
    regular = read_clip(RECORD, [Path(cross["videos"])])
    masks = {subject.key: subject.candidate.mask for subject in regular.subjects}
    for row in rows:
        (reference,) = row.references  # the background is left out, and person, individual and woman are one
        assert reference.rle in [masks[key] for key in ("2", "11", "15")]
    assert "pairs are one clip in two parts" in caplog.text


def test_thresholds_of_pairs(cross, tmp_path):
    pairs = json.loads(Path(cross["path"]).read_text())
    ((cluster, listed),) = pairs.items()
    pair = next(item for item in listed if item["cur_class_id"] == "2" and item["cur_id"].endswith(OTHER_KEY))

    def rows_with(**values):
        Path(cross["path"]).write_text(json.dumps({cluster: [{**pair, **values}]}))
        try:
            return len(load_manifest(cross))
        except UserError as error:
            return str(error).rpartition(": ")[2]

    assert rows_with(text_similarity=0.6, image_similarity=0.61) == 2
    assert rows_with(text_similarity=0.59) == "1 pairs are not alike enough"
    assert rows_with(image_similarity=0.6) == "1 pairs are not alike enough"
    assert rows_with(cur_id=f"dataset2/{KEY}", aft_id=f"dataset1/{KEY}") == "1 pairs are one clip in two parts"
    assert rows_with(cur_id="dataset1/stranger") == "1 pairs are not of their cluster"
    assert rows_with(cur_class_id="9", aft_class_id="9") == "2 clips have no subject that passes the selection"
    assert rows_with(text_similarity=None) == "1 pairs lack a key"


def test_parts_that_are_missing_are_said(cross, tmp_path, caplog):
    (tmp_path / "dataset1.json").unlink()
    assert load_manifest(cross)
    assert "1 clips are in a part that is not here (dataset1)" in caplog.text
    with pytest.raises(UserError, match=r"parts: .* has no \.json of a regular part"):
        load_manifest({**cross, "parts": str(tmp_path / "nowhere")})


def test_a_part_is_read_record_by_record(videos, tmp_path):
    """Published parts are larger than memory: what comes after the rows that are asked for is not even looked at."""
    path = tmp_path / "part.json"
    source = {"path": str(path), "format": "opens2v_regular", "videos": str(videos)}
    whole = json.dumps({"a": RECORD, "b": RECORD, "c": RECORD})[:-1]
    path.write_text(whole + "," + " " * 10**6 + '"d": {cut off')
    assert len(load_manifest({**source, "max_rows": 2})) == 2
    with pytest.raises(UserError, match=r"train_data: path: .* is not readable JSON \(.+\)"):
        load_manifest(source)
    for text in ("[1]", "", "\n"):
        path.write_text(text)
        with pytest.raises(UserError, match="must be a JSON object that maps names to records"):
            load_manifest(source)
    path.unlink()
    with pytest.raises(UserError, match="does not exist"):
        load_manifest(source)


def test_parts_without_clips_that_are_used_are_not_read(cross, tmp_path, monkeypatch):
    (tmp_path / "dataset7.json").write_text("no JSON at all")
    opened = []
    read = opens2v_cross.read_records
    monkeypatch.setattr(opens2v_cross, "read_records", lambda path: opened.append(path.stem) or read(path))
    assert load_manifest(cross)
    assert sorted(opened) == ["cluster_videos", "cross_pairs", "dataset1", "dataset1_cluster"]


def test_a_candidates_scores_may_be_whole_numbers():
    assert select_subjects([replace(Candidate("a", square(0, 0, 3)), aesthetic=5)]) == [0]
