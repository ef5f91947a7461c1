"""Sources of a recipe: one or several, their mistakes at once, and the tables they are read from."""

import csv
import json
import logging

import datasets
import pytest
import tiny_data

from refalign_adapter.data.sources.manifest import (
    load_manifest,
    missing_paths,
    source_problems,
    sources_digest,
    sources_of,
)
from refalign_adapter.data.sources.readers.base import Source, known_readers
from refalign_adapter.data.sources.rows import Row
from refalign_adapter.data.sources.tables import is_hub_id, local_path, read_table
from refalign_adapter.errors import ConfigError, UserError
from refalign_adapter.hashes import file_digest


@pytest.fixture
def data(tmp_path):
    """A folder of four rows, its rows as JSON."""
    manifest = tiny_data.write_data(tmp_path / "data", 4)
    return manifest.parent, [json.loads(line) for line in manifest.read_text().splitlines()]


def rows_of(value, **options):
    """Rows without where they stand."""
    return [(row.file_name, row.caption, row.references, row.pair) for row in load_manifest(value, **options)]


def test_csv_and_parquet_give_the_rows_of_json_lines(data, caplog):
    folder, rows = data
    expected = rows_of(folder)
    (folder / "metadata.jsonl").rename(folder / "other.jsonl")
    with (folder / "metadata.csv").open("w", newline="") as file:
        writer = csv.DictWriter(file, ["file_name", "caption", "references", "pair"])
        writer.writeheader()
        writer.writerows({**row, "references": json.dumps(row["references"])} for row in rows)
    assert rows_of(folder) == rows_of(folder / "metadata.csv") == expected
    (folder / "metadata.csv").unlink()
    datasets.Dataset.from_list(rows).to_parquet(folder / "metadata.parquet")
    assert rows_of(folder) == expected
    assert rows_of({"path": str(folder), "max_rows": 3}) == expected[:3]
    assert rows_of(folder / "other.jsonl") == expected


def test_mistakes_in_a_csv_are_told_by_row(data):
    folder, _ = data
    (folder / "t.csv").write_text(
        'file_name,caption,references\nclips/0.mp4,None,"[{""image"": ""references/0_0.png""}]"\n'
        'clips/9.mp4,,"[{}]"\nclips/1.mp4,7,not json\n'
    )
    with pytest.raises(ConfigError) as caught:
        load_manifest(folder / "t.csv")
    assert caught.value.problems == [
        f"row 2: file_name: {str(folder / 'clips/9.mp4')!r} does not exist",
        "row 2: caption must be text, got None",
        "row 2: references.0.image must be a path, got None",
        "row 3: references must be a list, empty where there are none, got 'not json'",
    ]
    lines = (folder / "t.csv").read_text().splitlines()
    (folder / "t.csv").write_text("\n".join(lines[:2]))
    assert load_manifest(folder / "t.csv")[0].caption == "None"


def test_captions_beside_clips_and_references_out_of_them(tmp_path):
    tiny_data.write_clip(tmp_path / "a.mp4")
    (tmp_path / "a.txt").write_text("\ufeffa thing moves\n", encoding="utf-8")
    tiny_data.write_reference(tmp_path / "r.png", tmp_path / "mask.png", height=32, width=32)
    references = [{"frame": 3, "mask": "mask.png", "subject": "it"}, {"frame": 5, "box": [1, 2, 20, 30]}]
    tiny_data.write_manifest(tmp_path, [{"file_name": "a.mp4", "references": references}])
    (row,) = load_manifest(tmp_path)
    assert (row.caption, row.pair) == ("a thing moves", "regular")
    assert [(item.image, item.frame) for item in row.references] == [(tmp_path / "a.mp4", 3), (tmp_path / "a.mp4", 5)]
    references = [{"frame": 3}, {"frame": -1, "box": [0, 0, 1, 1]}, {"frame": 0, "image": "r.png"}, {"frame": 0.5}]
    tiny_data.write_manifest(tmp_path, [{"file_name": "a.mp4", "caption": "a", "references": references}])
    with pytest.raises(ConfigError) as caught:
        load_manifest(tmp_path)
    assert caught.value.problems == [
        "line 1: references.0.frame needs a mask or a box that says what of it is the subject",
        "line 1: references.1.frame must be a frame's number, counted from 0, got -1",
        "line 1: references.2.frame 0 is a frame of the clip and excludes an image, got 'r.png'; leave one out",
        "line 1: references.3.frame must be a frame's number, counted from 0, got 0.5",
    ]


def test_clips_and_captions_without_references_are_one_clear_line(tmp_path):
    for name in "ab":
        tiny_data.write_clip(tmp_path / f"{name}.mp4")
        (tmp_path / f"{name}.txt").write_text("a thing")
    with pytest.raises(UserError, match="has 2 clips and 2 captions but names no references; add a metadata.jsonl"):
        load_manifest(tmp_path)


def test_videos_may_be_elsewhere(data, tmp_path):
    folder, _ = data
    expected = [row.clip.name for row in load_manifest(folder)]
    (folder / "clips").rename(tmp_path / "clips")
    rows = load_manifest({"path": str(folder), "videos": str(tmp_path)})
    assert [row.clip for row in rows] == [tmp_path / "clips" / name for name in expected]


def test_several_sources_are_one_data_set_in_their_order(data, tmp_path):
    folder, _ = data
    other = tiny_data.write_data(tmp_path / "other", 2)
    rows = load_manifest([str(folder), {"path": str(other)}])
    assert [(row.source, row.line) for row in rows] == [(0, 1), (0, 2), (0, 3), (0, 4), (1, 1), (1, 2)]
    (folder / "clips/1.mp4").unlink()
    (other.parent / "clips/0.mp4").unlink()
    with pytest.raises(ConfigError) as caught:
        load_manifest([str(folder), {"path": str(other)}])
    assert caught.value.problems == [
        f"{folder / 'metadata.jsonl'}: line 2: file_name: {str(folder / 'clips/1.mp4')!r} does not exist",
        f"{other}: line 1: file_name: {str(tmp_path / 'other/clips/0.mp4')!r} does not exist",
    ]


def test_every_mistake_in_sources_at_once():
    value = [
        "a",
        {"pat": "b", "ratio": 1},
        {"path": "c", "format": "opensv2", "videos": 3, "ratio": -1, "max_rows": 0},
        4,
    ]
    assert list(source_problems(value, "data.train_data")) == [
        "data.train_data.1.pat is no known field; did you mean data.train_data.1.path?",
        "data.train_data.1.path is required",
        f"data.train_data.2.format must be one of {', '.join(known_readers())}, got 'opensv2'",
        "data.train_data.2.videos must be text, got 3",
        "data.train_data.2.ratio must be a positive number, got -1",
        "data.train_data.2.max_rows must be a positive whole number, got 0",
        "data.train_data.3 must be a path or a mapping with one, got 4",
        "data.train_data: give every source a ratio, or none of them",
    ]
    assert list(source_problems([])) == ["train_data must name at least one source, got []"]
    assert sources_of("a") == sources_of({"path": "a"}) == sources_of(["a"]) == [Source("a")]
    assert missing_paths(["nowhere.jsonl", {"path": "user/name", "videos": "no/such/folder"}]) == [
        "nowhere.jsonl",
        "no/such/folder",
    ]


def test_the_digest_of_a_plain_path_is_its_files(data, tmp_path):
    folder, _ = data
    assert sources_digest(str(folder)) == file_digest(folder / "metadata.jsonl")
    other = tiny_data.write_data(tmp_path / "other", 2)
    both = sources_digest([str(folder), str(other)])
    other.write_text(other.read_text() + "\n")
    assert sources_digest([str(folder), str(other)]) != both


def test_a_data_set_of_the_hub_is_read_from_its_download(data, tmp_path, monkeypatch):
    folder, _ = data
    commit, repository = "0123456789abcdef" * 2 + "01234567", tmp_path / "datasets--user--clips"
    (repository / "snapshots").mkdir(parents=True)
    folder.rename(repository / "snapshots" / commit)
    (repository / "refs").mkdir()
    (repository / "refs/main").write_text(commit)
    (repository / "refs/v1").write_text(commit)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    monkeypatch.setattr("huggingface_hub._snapshot_download.constants.HF_HUB_CACHE", str(tmp_path))
    assert local_path("user/clips") == repository / "snapshots" / commit
    rows = load_manifest({"path": "user/clips", "revision": "v1", "max_rows": 2})
    assert [row.file_name for row in rows] == ["clips/0.mp4", "clips/1.mp4"]
    assert rows[0].clip == repository / "snapshots" / commit / "clips/0.mp4"
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    with pytest.raises(UserError, match="cannot read 'user/nothing': it is not cached and the Hub is switched off"):
        load_manifest("user/nothing")


def test_only_a_user_and_a_name_are_an_id_of_the_hub(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "data/clips").mkdir(parents=True)
    assert is_hub_id("user/na.me-1")
    for path in ("name", "data/clips", "./name", "../name", "a/b/c", "a/b.jsonl", "~/name", str(tmp_path / "x")):
        assert not is_hub_id(path), path


def test_a_damaged_table_is_one_line(tmp_path):
    (tmp_path / "a.parquet").write_text("no parquet")
    (tmp_path / "a.csv").write_bytes(b"\xff\xfe\x00")
    for name in ("a.parquet", "a.csv", "none.csv"):
        with pytest.raises(UserError, match=f"cannot read .*{name}") as caught:
            list(read_table(tmp_path / name))
        assert "\n" not in str(caught.value)


def test_two_columns_of_one_name_are_one_line(tmp_path):
    path = tmp_path / "a.csv"
    path.write_text("file_name,caption,caption,,\na.mp4,one,two,,\n")
    with pytest.raises(UserError, match="csv .its first line names column 'caption' 2 times.; rename") as told:
        list(read_table(path))
    assert "\n" not in str(told.value)
    path.write_text("file_name,caption,,\na.mp4,one,,\n")  # as spreadsheets write it
    assert list(read_table(path)) == [(1, {"file_name": "a.mp4", "caption": "one"})]


@pytest.mark.parametrize("before", ["", "\n", "\ufeff \r\n\t", "\n" * 9000], ids=["at once", "line", "mark", "many"])
def test_a_list_is_read_as_one_wherever_it_begins(tmp_path, before):
    path = tmp_path / "a.json"
    path.write_text(before + '[\n{"a": 1},\n{"a": 2}\n]\n', encoding="utf-8")
    assert list(read_table(path)) == [(1, {"a": 1}), (2, {"a": 2})]
    path.write_text(before + '{"a": 1}\n', encoding="utf-8")
    assert [row for _, row in read_table(path)] == [{"a": 1}]


def test_records_that_a_format_leaves_out_are_counted_and_said(monkeypatch, caplog, tmp_path):
    from refalign_adapter.data.sources.readers import folder
    from refalign_adapter.data.sources.readers.base import Reading

    row = Row("a.mp4", tmp_path / "a.mp4", "a", ())
    reading = Reading([row], [])
    reading.left_out.update({"have no clip": 3, "have no caption": 1})
    monkeypatch.setattr(folder.FolderReader, "read", lambda *_, **__: reading)
    tiny_data.write_manifest(tmp_path, [])
    with caplog.at_level(logging.WARNING):
        assert load_manifest(tmp_path) == [row]
    assert "1 rows; left out: 3 have no clip, 1 have no caption" in caplog.text
    reading.rows.clear()
    with pytest.raises(UserError, match="has no rows that can be used: 3 have no clip, 1 have no caption"):
        load_manifest(tmp_path)
