"""Tables and rows as people and strangers write them: read as they mean it, or one line a mistake."""

import codecs
import json
import os
import unicodedata

import pytest
from PIL import Image

from refalign_adapter.data.cache.options import CacheOptions
from refalign_adapter.data.check.check import check_data
from refalign_adapter.data.sources.manifest import load_manifest
from refalign_adapter.errors import UserError

ROW = {"file_name": "a.mp4", "caption": "a dog runs about", "references": [{"image": "a.png"}]}


@pytest.fixture
def folder(tmp_path):
    (tmp_path / "a.mp4").write_bytes(b"a clip; it is not opened here")
    Image.new("RGB", (8, 8), "red").save(tmp_path / "a.png")
    return tmp_path


def table(folder, *rows, name="metadata.jsonl", text=None):
    path = folder / name
    path.write_text("".join(json.dumps(row) + "\n" for row in rows) if text is None else text, encoding="utf-8")
    return path


def refused(path):
    with pytest.raises(UserError) as told:
        load_manifest(str(path))
    lines = str(told.value).splitlines()
    assert all(len(line) < 700 for line in lines)
    return lines


ROWS = {
    "a long name": ({"file_name": "a" * 300 + ".mp4"}, "does not exist"),
    "a null byte": ({"file_name": "a\0.mp4"}, "does not exist"),
    "no name": ({"file_name": ""}, "file_name must be a path, got ''"),
    "a number as name": ({"file_name": 5}, "file_name must be a path, got 5"),
    "a truth as caption": ({"caption": True}, "caption must be text, got True"),
    "a list as caption": ({"caption": ["a"]}, "caption must be text, got ['a']"),
    "references as text": ({"references": "a.png"}, "references must be a list, empty where"),
    "a reference as text": ({"references": ["a.png"]}, "references.0 must be an object"),
    "a deep reference": ({"references": [{"image": {"a": {"b": 1}}}]}, "references.0.image must be a path"),
    "an odd pair": ({"pair": ["regular"]}, "pair must be one of regular, cross"),
    "a box without end": ({"references": [{"image": "a.png", "box": [0, 0, 1e999, 5]}]}, ".box must be [left, top"),
    "a box of shares": ({"references": [{"image": "a.png", "box": [0.1, 0.2, 0.6, 0.9]}]}, "looks like shares"),
    "a box of three": ({"references": [{"image": "a.png", "box": [1, 2, 3]}]}, ".box must be [left, top"),
    "a box of truths": ({"references": [{"image": "a.png", "box": [False, 0, True, 5]}]}, ".box must be"),
    "a subject as truth": ({"references": [{"image": "a.png", "subject": True}]}, ".subject must be text, got True"),
    "an unknown field": ({"captoin": 1}, "captoin is no known field; did you mean caption?"),
    "a huge field": ({"references": ["x" * 100_000]}, "references.0 must be an object"),
}


@pytest.mark.parametrize("case", ROWS)
def test_a_rows_mistakes_are_lines(folder, case):
    changes, message = ROWS[case]
    text = json.dumps(ROW | changes).replace("Infinity", "1e999")
    (line,) = refused(table(folder, text=text + "\n"))
    assert message in line
    assert ": line 1: " in line


LINES = {
    "deep": ("[" * 200_000, "nested more than 100 deep"),
    "a key twice": (json.dumps(ROW)[:-1] + ', "caption": "b"}', "key 'caption' is given twice"),
    "NaN": ('{"file_name": "a.mp4", "caption": NaN}', "NaN is no JSON value; write null"),
    "half a surrogate": (json.dumps(ROW | {"caption": "\ud800"}), "half of a surrogate pair"),
    "a list": ("[1]", "expected an object of fields, got list"),
    "a number": ("5", "expected an object of fields, got int"),
    "cut": ('{"file_name": ', "is not JSON"),
}


@pytest.mark.parametrize("case", LINES)
def test_lines_that_are_no_rows_are_told_by_their_number(folder, case):
    line, message = LINES[case]
    path = table(folder, text=json.dumps(ROW) + "\n" + line + "\n")
    (told,) = refused(path)
    assert message in told
    assert ": line 2: " in told


def test_one_json_array_is_a_table(folder):
    second = ROW | {"caption": "another caption of it"}
    path = table(folder, name="rows.json", text=json.dumps([ROW, second], indent=1))
    assert [row.caption for row in load_manifest(str(path))] == [ROW["caption"], second["caption"]]
    path = table(folder, text=json.dumps([ROW, second]))
    assert len(load_manifest(str(folder))) == 2
    path.write_text("[" + json.dumps(ROW))
    assert "as one list" in refused(path)[0]


@pytest.mark.parametrize(("separator", "name"), [(",", "a.csv"), (";", "a.csv"), ("\t", "a.csv"), ("\t", "a.tsv")])
def test_text_tables_keep_every_value_as_it_is_written(folder, separator, name):
    quoted = '"' + json.dumps(ROW["references"]).replace('"', '""') + '"'
    captions = ["007", "1984", "None", "nan", "a, b; c"]
    rows = [separator.join(("a.mp4", f'"{caption}"', quoted)) for caption in captions]
    text = "\n".join([separator.join(("file_name", "caption", "references")), *rows])
    path = table(folder, name=name, text="\ufeff" + text)
    assert [row.caption for row in load_manifest(str(path))] == captions


def test_a_csv_row_with_other_columns_is_told_by_its_number(folder):
    path = table(folder, name="a.csv", text="file_name,caption,references\na.mp4,x\n")
    assert "row 1: has other columns" in refused(path)[0] or "line 1: has other columns" in refused(path)[0]


def test_pipes_and_endless_lines_are_one_line(folder):
    for name in ("pipe.jsonl", "pipe.csv"):
        os.mkfifo(folder / name)
        assert "a pipe or device, not a file" in refused(folder / name)[0]
    with (folder / "long.jsonl").open("wb") as file:
        file.truncate(2**31)
    assert "has more than 16,777,216 characters" in refused(folder / "long.jsonl")[0]


def test_names_that_look_the_same_are_the_same(folder):
    composed, taken_apart = unicodedata.normalize("NFC", "é"), unicodedata.normalize("NFD", "é")
    (folder / f"{taken_apart}.mp4").write_bytes(b"")
    (folder / f"{composed}.png").write_bytes((folder / "a.png").read_bytes())
    row = ROW | {"file_name": f"{composed}.mp4", "references": [{"image": f"{taken_apart}.png"}]}
    (found,) = load_manifest(str(table(folder, row)))
    assert found.clip.is_file()
    assert found.references[0].image.is_file()


CAPTIONS = {
    "UTF-8": ("über den Hügel".encode(), "über den Hügel"),
    "UTF-8 with a mark": (codecs.BOM_UTF8 + "über".encode(), "über"),
    "UTF-16": ("über den Hügel".encode("utf-16"), "über den Hügel"),
    "UTF-16 of Macs": (codecs.BOM_UTF16_BE + "über".encode("utf-16-be"), "über"),
}


@pytest.mark.parametrize("case", CAPTIONS)
def test_caption_files_come_in_the_encodings_people_have(folder, case):
    content, caption = CAPTIONS[case]
    (folder / "a.txt").write_bytes(content)
    row = {name: value for name, value in ROW.items() if name != "caption"}
    (found,) = load_manifest(str(table(folder, row)))
    assert found.caption == caption
    assert found.caption_file == folder / "a.txt"


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("über".encode("latin-1"), r"a.txt' (not UTF-8 text, byte 0 is 0xfc; save it as UTF-8)"),
        (b" \n", "a.txt' is empty"),
        (None, "caption is missing, and there is no "),
    ],
)
def test_caption_files_that_cannot_be_read_are_named(folder, content, message):
    if content is not None:
        (folder / "a.txt").write_bytes(content)
    row = {name: value for name, value in ROW.items() if name != "caption"}
    (line,) = refused(table(folder, row))
    assert message in line
    assert "a.txt" in line


ESCAPES = ["../secret.mp4", "/etc/passwd", "a/../../b.mp4", "~/b.mp4", "..\\b.mp4", "C:\\b.mp4"]


@pytest.mark.parametrize("name", ESCAPES)
def test_a_data_set_of_the_hub_names_nothing_outside_its_folder(folder, monkeypatch, name):
    (folder.parent / "secret.mp4").write_bytes(b"")
    monkeypatch.setattr("refalign_adapter.data.sources.readers.folder.local_path", lambda *_, **__: folder)
    table(folder, ROW | {"file_name": name}, ROW | {"references": [{"image": name}]})
    lines = refused("you/data")
    assert sum("outside the data set's folder, which one from the Hub may not" in line for line in lines) == 2


def test_ones_own_rows_may_and_the_check_says_so(folder, monkeypatch):
    monkeypatch.chdir(folder)
    inside = folder / "data"
    inside.mkdir()
    table(inside, ROW | {"file_name": "../a.mp4", "references": [{"image": str(folder / "a.png")}]})
    (row,) = load_manifest("data")
    assert row.clip.is_file()
    check = check_data(CacheOptions("base", "cache", train_data="data", num_frames=1, height=16, width=16))
    assert [(item.kind, item.text) for item in check.notes if item.kind == "outside"] == [("outside", "'../a.mp4'")]


def test_captions_that_are_cut_are_told(folder, monkeypatch):
    from tiny_models import save_tiny_pipeline

    base = save_tiny_pipeline(folder / "base")
    table(folder, ROW | {"caption": "a word " * 20})
    options = CacheOptions(str(base), "cache", train_data=str(folder), num_frames=1, max_sequence_length=16)
    found = [item.text for item in check_data(options).notes if item.kind == "long_caption"]
    assert found == ["caption: 140 tokens, 16 are seen"]
