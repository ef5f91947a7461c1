"""Prompt files of both kinds; every problem is told at once, before anything is generated."""

import json
from pathlib import Path

import pytest
from tiny_adapter import picture

import refalign_adapter as ra
from refalign_adapter.generation.prompts import Prompt, read_prompts

SAMPLE = Path(__file__).parents[1] / "data" / "opens2v_eval_prompts_sample.json"


@pytest.fixture
def folder(tmp_path):
    for name in ("a.png", "b.png"):
        picture().save(tmp_path / name)
    return tmp_path


def write(folder, *rows):
    path = folder / "prompts.jsonl"
    path.write_text("\n".join(row if isinstance(row, str) else json.dumps(row) for row in rows))
    return path


def problems(path, most=8):
    with pytest.raises(ra.ConfigError) as caught:
        read_prompts(path, most)
    assert caught.value.source == str(path)
    return caught.value.problems


def test_json_lines(folder):
    path = write(
        folder,
        {"key": "one", "prompt": "a dog", "references": ["a.png"]},
        "",
        {"key": "two.x", "prompt": "a cat", "references": ["a.png", str(folder / "b.png")], "negative_prompt": "ugly"},
    )
    assert read_prompts(path, 2) == [
        Prompt("one", "a dog", (folder / "a.png",)),
        Prompt("two.x", "a cat", (folder / "a.png", folder / "b.png"), "ugly"),
    ]


def test_one_row_is_no_opens2v_file(folder):
    path = write(folder, {"key": "one", "prompt": "a dog", "references": ["a.png"]})
    assert [row.key for row in read_prompts(path, 1)] == ["one"]


def test_opens2v_eval(tmp_path):
    records = json.loads(SAMPLE.read_text())
    for record in records.values():
        for name in record["img_paths"]:
            (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
            picture().save(tmp_path / name)
    path = tmp_path / "eval.json"
    path.write_text(SAMPLE.read_text())
    rows = read_prompts(path, 3)
    assert [row.key for row in rows] == list(records)
    assert all(row.prompt == records[row.key]["prompt"] for row in rows)
    assert rows[2].references == tuple(tmp_path / name for name in records["humanobj_1"]["img_paths"])
    assert problems(path, most=2) == [
        f"'{key}': references: 3 images are too many, at most 2; leave some out" for key in ("humanobj_1", "faceobj_1")
    ]


def test_missing_images_of_an_opens2v_file_are_all_told(tmp_path):
    path = tmp_path / "eval.json"
    path.write_text(SAMPLE.read_text())
    found = problems(path)
    assert len(found) == sum(len(record["img_paths"]) for record in json.loads(SAMPLE.read_text()).values())
    assert found[0].startswith("'singleface_1': references[0]: ")
    assert found[0].endswith("Images/singleface/crop_man/2.png' does not exist")


def test_a_repeated_key_of_an_opens2v_file_is_seen(folder):
    record = '{"prompt": "a", "img_paths": ["a.png"]}'
    path = folder / "eval.json"
    path.write_text(f'{{"one": {record}, "one": {record}}}')
    assert problems(path) == ["'one': key 'one' is that of 'one' too; keys must be distinct"]


def test_every_problem_is_told_at_once(folder):
    (folder / "text.png").write_text("no image")
    good = {"prompt": "a dog", "references": ["a.png"]}
    path = write(
        folder,
        good | {"key": "one"},
        good | {"key": "one"},
        good | {"key": "../two"},
        good,
        good | {"key": "three", "prompt": " "},
        good | {"key": "four", "references": ["a.png", "text.png", "c.png"]},
        good | {"key": "five", "references": []},
        good | {"key": "six", "references": "a.png"},
        good | {"key": "seven", "promt": "x", "negative_prompt": 3},
        "{",
        "[1]",
        good | {"key": ".hidden"},
        good | {"key": "x" * 201},
    )
    found = problems(path)
    expected = [
        "line 10: is not JSON",
        "line 11: expected an object of fields, got list",
        "line 2: key 'one' is that of line 1 too; keys must be distinct",
        "line 3: key '../two' is no safe file name",
        "line 4: key must be text, got None",
        "line 5: prompt must be text, got ' '",
        "line 6: references[1]: ",
        "line 6: references[2]: ",
        "line 7: references must name at least one image",
        "line 8: references must be a list of image files, got 'a.png'",
        "line 9: promt is no known field; did you mean prompt?",
        "line 9: negative_prompt must be text, got 3",
        "line 12: key '.hidden' is no safe file name",
        "line 13: key 'xxxxxxxxxxxxxxxxxxxx'… is longer than 200 bytes",
    ]
    assert len(found) == len(expected)
    for got, start in zip(found, expected, strict=True):
        assert got.startswith(start)


@pytest.mark.parametrize("key", ["a/b", "a\\b", "", "a\nb", "-a", "a:b", "a\0b", 7])
def test_keys_that_are_no_file_names(folder, key):
    found = problems(write(folder, {"key": key, "prompt": "a", "references": ["a.png"]}))
    assert len(found) == 1
    assert "key" in found[0]


@pytest.mark.parametrize("text", ['{\n "a": {\n "prompt": "x",\n}', "hello\nworld"])
def test_what_is_no_prompt_file_is_one_line(folder, text):
    path = folder / "prompts.json"
    path.write_text(text)
    (found,) = problems(path)
    assert found.startswith("holds neither an object of prompts nor one on each line; line 1: is not JSON")


def test_no_file_and_nothing_in_it(folder):
    with pytest.raises(ra.UserError, match="cannot read .* \\(No such file or directory\\)"):
        read_prompts(folder / "nowhere.jsonl", 8)
    with pytest.raises(ra.UserError, match="has no prompts"):
        read_prompts(write(folder, ""), 8)
    (folder / "binary.jsonl").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(ra.UserError, match="UTF-16 text; save it as UTF-8"):
        read_prompts(folder / "binary.jsonl", 8)
