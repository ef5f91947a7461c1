"""Every reader through one case table. A new format adds a small data set here and nothing else."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import datasets
import pytest
import tiny_data

from refalign_adapter.data.sources.manifest import (
    load_manifest,
    manifest_path,
    source_problems,
    sources_digest,
    sources_of,
)
from refalign_adapter.data.sources.pictures import open_picture
from refalign_adapter.data.sources.readers.base import Reader, known_readers
from refalign_adapter.data.sources.rows import PAIRS
from refalign_adapter.errors import UserError
from refalign_adapter.media.video import read_video

DATA = Path(__file__).parent.parent / "data"


def folder(path: Path) -> dict[str, Any]:
    """Four rows."""
    tiny_data.write_data(path, 4)
    return {"path": str(path)}


def opens2v_record() -> tuple[str, dict[str, Any]]:
    """The published record with its key."""
    ((key, record),) = json.loads((DATA / "opens2v_regular_part.json").read_text()).items()
    return key, record


def opens2v_regular(path: Path) -> dict[str, Any]:
    """The published record, twice."""
    key, record = opens2v_record()
    tiny_data.write_clip(path / "videos" / record["metadata"]["path"], frames=3, height=720, width=1280)
    (path / "part.json").write_text(json.dumps({key: record, f"{key}-2": record}))
    return {"path": str(path / "part.json"), "videos": str(path / "videos")}


def opens2v_cross(path: Path) -> dict[str, Any]:
    """The published pairs, with the published record for each of their clips."""
    key, record = opens2v_record()
    tiny_data.write_clip(path / "videos" / record["metadata"]["path"], frames=3, height=720, width=1280)
    for name in ("cross_pairs", "cluster_videos"):
        shutil.copy(DATA / f"opens2v_{name}.json", path / f"{name}.json")
    for part in ("dataset1", "dataset1_cluster"):
        (path / f"{part}.json").write_text(json.dumps({key: record, key.replace("step1-", "step122-"): record}))
    return {"path": str(path / "cross_pairs.json"), "videos": str(path / "videos")}


def phantom(path: Path) -> dict[str, Any]:
    """Two clips, each with a reference in the other."""
    rows = []
    for number, (name, other) in enumerate((("a", "b"), ("b", "a"))):
        tiny_data.write_clip(path / "videos" / f"{name}.mp4", seed=number)
        item = {"vid": other, "frame_idx": 0.5, "bbox_loc": [[2.0, 3.0, 20.0, 30.0]]}
        pairs = {"a thing": {"obj_from_tgt_video": [{**item, "vid": name}], "refer_result": [[item]]}}
        rows.append({"vid": name, "video_caption": "a thing moves", "cross_pair": json.dumps(pairs)})
    datasets.Dataset.from_list(rows).to_parquet(path / "pairs.parquet")
    datasets.Dataset.from_list([{"vid": name} for name in "ab"]).to_parquet(path / "meta_info.parquet")
    return {"path": str(path), "videos": str(path / "videos")}


CASES: dict[str, Callable[[Path], dict[str, Any]]] = {
    "folder": folder,
    "opens2v_cross": opens2v_cross,
    "opens2v_regular": opens2v_regular,
    "phantom": phantom,
}
"""Format -> writes a data set of at least two rows into a folder and returns its source."""


@pytest.fixture(params=sorted(CASES), scope="module")
def source(request, tmp_path_factory):
    path = tmp_path_factory.mktemp(request.param)
    return {"format": request.param, **CASES[request.param](path)}


def test_every_reader_has_a_case():
    readers = known_readers()
    assert set(readers) == set(CASES)
    assert all(isinstance(reader, Reader) for reader in readers.values())
    assert all(not set(reader.options) & {"path", "format", "ratio"} for reader in readers.values())


def test_rows_are_complete_and_what_they_name_can_be_read(source):
    rows = load_manifest(source)
    assert len(rows) >= 2
    assert len({row.line for row in rows}) == len(rows)
    assert all(row.caption.strip() == row.caption and row.caption for row in rows)
    assert {row.pair for row in rows} <= set(PAIRS)
    for row in rows:
        frames = read_video(row.clip, num_frames=2, height=16, width=16, segment=row.segment, crop=row.crop)
        assert frames.shape == (2, 16, 16, 3)
        assert row.references
        for reference in row.references:
            picture = open_picture(reference)
            if picture.mask is not None:
                assert picture.mask.shape == picture.image.size[::-1]
                assert picture.mask.any()
    assert load_manifest(source) == rows


def test_rows_are_limited_on_request(source):
    rows = load_manifest(source)
    limited = load_manifest({**source, "max_rows": 1})
    assert len(limited) < len(rows)
    assert set(limited) <= set(rows)


def test_a_digest_is_of_what_decides_the_rows(source):
    digest = sources_digest(source)
    assert digest == sources_digest(dict(reversed(source.items())))
    assert digest == sources_digest({**source, "ratio": 3})
    assert digest != sources_digest({**source, "max_rows": 1})
    assert manifest_path(source).is_file()


def test_options_are_typed_and_have_defaults(source):
    options = known_readers()[source["format"]].options
    (complete,) = sources_of(source)
    assert set(complete.options) == set(options)
    for name in options:
        (line,) = source_problems({**source, name: ["wrong"]})
        assert line.startswith(f"train_data.{name} must be ")
    assert list(source_problems({**source, "nothing_like_it": 1}))


def test_a_missing_data_set_is_one_line(source, tmp_path):
    with pytest.raises(UserError) as caught:
        load_manifest({**source, "path": str(tmp_path / "nowhere.jsonl")}, field="validation_data")
    assert "\n" not in str(caught.value)
    assert "validation_data: " in str(caught.value)
    assert "nowhere" in str(caught.value)


def test_a_broken_table_is_one_line(source, tmp_path):
    table = manifest_path(source)
    shutil.copytree(table.parent, tmp_path, dirs_exist_ok=True)
    (tmp_path / table.name).write_text(json.dumps("neither rows nor records"))
    with pytest.raises(UserError) as caught:
        load_manifest({**source, "path": str(tmp_path / table.name)})
    assert "\n" not in str(caught.value)
    assert table.name in str(caught.value)
