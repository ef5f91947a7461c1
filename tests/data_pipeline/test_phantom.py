"""Phantom-Data: its two tables in every spelling that its items may have, and what is found when none fits."""

import json

import datasets
import pytest
import tiny_data

from refalign_adapter.data.sources.manifest import load_manifest
from refalign_adapter.data.sources.pictures import open_picture
from refalign_adapter.data.sources.readers import phantom
from refalign_adapter.data.sources.tables import read_table
from refalign_adapter.errors import UserError

BOX = [96.0, 48.0, 480.0, 384.0]


@pytest.fixture
def write(tmp_path):
    """Write clips a, b and c and the tables with these pairs per row; returns the source."""
    for seed, name in enumerate("abc"):
        tiny_data.write_clip(tmp_path / f"videos/{name}.mp4", frames=4, height=48, width=80, seed=seed)

    def tables(*rows, caption="a woman and a dog", vid="vid", as_json=True):
        pairs = [
            {vid: "a", "video_caption": caption, "cross_pair": json.dumps(row) if as_json else row} for row in rows
        ]
        datasets.Dataset.from_list(pairs).to_parquet(tmp_path / "merged_filtered.parquet")
        clips = [{"vid": name, "youtube_url": "u", "timestamp": "t"} for name in "abcx"]
        datasets.Dataset.from_list(clips).to_parquet(tmp_path / "meta_info_merged.parquet")
        return {"path": str(tmp_path), "format": "phantom", "videos": str(tmp_path / "videos")}

    return tables


def item(vid="b", frame=0.5, **changes):
    return {"vid": vid, "frame_idx": frame, "bbox_loc": [BOX], "bbox_cls": "woman", "scores": 0.9, **changes}


def pair(*results):
    return {"obj_from_tgt_video": [item("a")], "refer_result": [list(results)]}


def test_a_row_has_a_reference_for_each_phrase(write):
    (row,) = load_manifest(write({"a woman": pair(item("b", "0.5")), "a dog": pair(item("x"), item("c", 0))}))
    assert (row.file_name, row.caption, row.pair, row.clip.name) == ("a", "a woman and a dog", "cross", "a.mp4")
    woman, dog = row.references
    assert (woman.subject, woman.image.name, woman.frame, woman.box, woman.long_side) == (
        "a woman",
        "b.mp4",
        0.5,
        tuple(BOX),
        768,
    )
    assert (dog.subject, dog.image.name, dog.frame) == ("a dog", "c.mp4", 0.0)  # clip x is not here
    assert isinstance(dog.frame, float)
    assert open_picture(woman).image.size == (80, 48)  # smaller than 768: left as it is
    (row,) = load_manifest(write({name: pair(item()) for name in "pqrs"}))
    assert [reference.subject for reference in row.references] == ["p", "q", "r"]


@pytest.mark.parametrize(
    "spelled",
    [
        {"vid": "b", "frame_idx": "0.25", "bbox_loc": BOX},
        {"video_id": "b", "frame_index": 0.25, "bbox": dict(zip(("xmin", "ymin", "xmax", "ymax"), BOX, strict=True))},
        {"clip_id": "b", "frame": 0.25, **dict(zip(("x_min", "y_min", "x_max", "y_max"), BOX, strict=True))},
        {"id": "b", "frame_idx": 0.25, "box": [str(side) for side in BOX]},
    ],
)
def test_spellings_of_items(write, spelled):
    (row,) = load_manifest(write({"a woman": {"refer_result": spelled}}, vid="video_id"))
    (reference,) = row.references
    assert (reference.image.stem, reference.frame, reference.box) == ("b", 0.25, tuple(BOX))


def test_structures_in_place_of_json(write):
    (row,) = load_manifest(write({"a woman": {"refer_result": [item()]}}, as_json=False))
    assert row.references[0].image.stem == "b"


@pytest.mark.parametrize(
    ("wrong", "found"),
    [
        (item(frame=31), "found {vid: str b, frame_idx: int 31, bbox_loc: list"),
        ({"clip": "b", "frame_idx": 0.5, "bbox": BOX}, r"found {clip: str b, frame_idx: float 0.5, bbox: list"),
        (item(bbox_loc=[4, 3, 2, 1]), "a box, found"),
        (item(bbox_loc=None), "a box, found"),
        ("b", "found str b"),
    ],
)
def test_what_does_not_fit_is_named_as_found(write, wrong, found):
    with pytest.raises(UserError, match=found) as caught:
        load_manifest(write({"a woman": pair(wrong)}))
    assert "\n" not in str(caught.value)


def test_other_columns_are_named_as_found(write):
    with pytest.raises(UserError, match="expected the columns vid, video_caption and cross_pair, found {clip: str a,"):
        load_manifest(write({"a woman": pair(item())}, vid="clip"))


def test_rows_that_cannot_be_used_are_counted(write, tmp_path):
    with pytest.raises(UserError, match="1 have no reference in a clip that is here"):
        load_manifest(write({"a woman": pair(item("x"))}))
    with pytest.raises(UserError, match="1 have no caption"):
        load_manifest(write({"a woman": pair(item())}, caption=" "))
    source = write({"a woman": pair(item())})
    (tmp_path / "videos/a.mp4").unlink()
    with pytest.raises(UserError, match="1 have no video here"):
        load_manifest(source)


def test_clips_that_are_unknown_are_told_from_clips_that_are_not_here(write, tmp_path, monkeypatch):
    source = write({"a woman": pair(item())})
    clips = tmp_path / "videos/koala.parquet"
    read = []
    monkeypatch.setattr(phantom, "read_table", lambda path, *most: read.append(path.name) or read_table(path, *most))
    datasets.Dataset.from_list([{"vid": "a"}, {"vid": "b"}]).to_parquet(clips)
    assert load_manifest({**source, "clips": str(clips)})
    assert read == ["merged_filtered.parquet"]  # nobody is missing: that table is not needed
    (tmp_path / "videos/a.mp4").unlink()
    with pytest.raises(UserError, match="1 have no video here"):
        load_manifest({**source, "clips": str(clips)})
    datasets.Dataset.from_list([{"vid": "b"}]).to_parquet(clips)
    with pytest.raises(UserError, match="1 are not in the table of clips"):
        load_manifest({**source, "clips": str(clips)})
