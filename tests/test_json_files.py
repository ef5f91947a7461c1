"""JSON from anyone: any size, depth and encoding, keys twice; always the value or one line."""

import json
import os

import pytest

from refalign_adapter.errors import UserError
from refalign_adapter.json_files import MAX_DEPTH, parse_json, read_json, write_json


def names(folder):
    return sorted(path.name for path in folder.iterdir())


def test_json_round_trip(tmp_path):
    value = {"r": 64, "teachers": ["dinov2"], "base": None, "name": "Läufer"}
    write_json(tmp_path / "config.json", value)
    assert read_json(tmp_path / "config.json") == value
    assert (tmp_path / "config.json").read_text(encoding="utf-8").endswith("\n")


def test_json_that_cannot_be_written_leaves_the_old_file(tmp_path):
    write_json(tmp_path / "config.json", 1)
    with pytest.raises(TypeError):
        write_json(tmp_path / "config.json", object())
    assert read_json(tmp_path / "config.json") == 1
    assert names(tmp_path) == ["config.json"]


def test_unreadable_json_is_one_clear_line(tmp_path):
    with pytest.raises(UserError, match=r"^config: .*absent\.json' does not exist$"):
        read_json(tmp_path / "absent.json", "config")
    (tmp_path / "half.json").write_text('{"r": ')
    (tmp_path / "image.json").write_bytes(b"\x89PNG\xff")
    for path in (tmp_path / "half.json", tmp_path / "image.json", tmp_path):
        with pytest.raises(UserError, match=r"^config: .* is not readable JSON \(.+\)$"):
            read_json(path, "config")


REFUSED = [
    ("[" * 200_000, f"nested more than {MAX_DEPTH} deep"),
    ("[" * (MAX_DEPTH + 1) + "]" * (MAX_DEPTH + 1), f"nested more than {MAX_DEPTH} deep"),
    ('{"a":' * 101 + "1" + "}" * 101, f"nested more than {MAX_DEPTH} deep"),
    ('{"r": 1, "r": 2}', "key 'r' is given twice"),
    ('{"a": {"b": 1, "c": 2, "b": 1}}', "key 'b' is given twice"),
    ("NaN", "NaN is no JSON value; write null, or leave it out"),
    ("[-Infinity]", "-Infinity is no JSON value"),
    ('{"a": "\\ud800"}', "half of a surrogate pair"),
    ('{"\\udc00": 1}', "half of a surrogate pair"),
    ("1" * 5000, "integer string conversion"),
    ("", "Expecting value"),
    ("{", "Expecting property name"),
    ("1 2", "Extra data"),
]


@pytest.mark.parametrize(("text", "reason"), REFUSED, ids=range(len(REFUSED)))
def test_what_is_no_json_by_the_standard_is_one_line(tmp_path, text, reason):
    for content in (text, text.encode()):
        with pytest.raises(ValueError, match=reason):
            parse_json(content)
    (tmp_path / "a.json").write_text(text)
    with pytest.raises(UserError) as told:
        read_json(tmp_path / "a.json", "config")
    assert len(str(told.value).splitlines()) == 1


@pytest.mark.parametrize("text", ['{"a": [1, 2.5, null, true, "\\ud83d\\ude00 Läufer"]}', "[]", '"a"', "-1e3"])
def test_json_gives_what_the_library_gives(text):
    assert parse_json(text) == parse_json(text.encode()) == parse_json(b"\xef\xbb\xbf" + text.encode())
    assert parse_json(text) == json.loads(text)
    assert parse_json("[" * MAX_DEPTH + "]" * MAX_DEPTH) is not None


@pytest.mark.parametrize(("encoding", "reason"), [("utf-16", "UTF-16 text"), ("latin-1", "byte 1 is 0xe4")])
def test_other_encodings_are_named(encoding, reason):
    with pytest.raises(ValueError, match=f"{reason}; save it as UTF-8"):
        parse_json('"ä"'.encode(encoding))


def test_what_never_ends_is_not_opened_and_what_is_huge_not_read(tmp_path):
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(UserError, match=r"is not readable JSON \(a pipe or device, not a file\)"):
        read_json(tmp_path / "pipe", "config")
    with (tmp_path / "huge.json").open("wb") as file:
        file.truncate(2**40)
    with pytest.raises(UserError, match=r"is not readable JSON \(larger than 1,024 KB\)"):
        read_json(tmp_path / "huge.json", "config", max_bytes=2**20)
