"""The manifest: what it gives, and every mistake in it at once."""

import pytest
import tiny_data

from refalign_adapter.data.sources.manifest import load_manifest
from refalign_adapter.errors import ConfigError, UserError


def test_rows_have_resolved_paths_and_subject_numbers(tmp_path):
    manifest = tiny_data.write_data(tmp_path, 3)
    rows = load_manifest(manifest)
    assert [row.clip for row in rows] == [tmp_path / f"clips/{number}.mp4" for number in range(3)]
    assert [row.pair for row in rows] == ["cross", "regular", "cross"]
    assert [row.line for row in rows] == [1, 2, 3]
    assert rows[2].subjects == [0, 1, 1]
    assert rows[2].references[1].mask == tmp_path / "masks/2_1.png"
    assert load_manifest(tmp_path) == rows


def test_defaults_boxes_blank_lines_and_line_separators_in_captions(tmp_path):
    tiny_data.write_clip(tmp_path / "a.mp4")
    tiny_data.write_reference(tmp_path / "a.png")
    line = (
        '{"file_name": "a.mp4", "caption": "one\u2028two", '
        '"references": [{"image": "a.png"}, {"image": "a.png", "box": [0, 1, 2.5, 3]}]}'
    )
    (tmp_path / "metadata.jsonl").write_text(f"\ufeff\n{line}\n\n", encoding="utf-8")
    (row,) = load_manifest(tmp_path, max_references=2)
    assert (row.pair, row.caption, row.line, row.subjects) == ("cross", "one\u2028two", 2, [0, 1])
    assert row.references[0].mask is None
    assert row.references[1].box == (0, 1, 2.5, 3)


def test_every_mistake_is_told_at_once_with_its_line(tmp_path):
    tiny_data.write_clip(tmp_path / "a.mp4")
    tiny_data.write_reference(tmp_path / "a.png")
    good = {"file_name": "a.mp4", "caption": "a", "references": [{"image": "a.png"}]}
    tiny_data.write_manifest(
        tmp_path,
        [
            good,
            {"file_name": "b.mp4", "captoin": "a", "references": {}},
            {**good, "caption": " ", "pair": "both", "references": [{"image": "a.png"}] * 3},
            {**good, "references": [{"image": "x.png", "maks": "a.png", "box": [3, 0, 1, 1], "subject": []}, 5]},
            good,
        ],
    )
    with (tmp_path / "metadata.jsonl").open("a") as file:
        file.write("{not json\n[1]\n")
    with pytest.raises(ConfigError) as caught:
        load_manifest(tmp_path, max_references=2)
    missing = lambda name: f"{str(tmp_path / name)!r} does not exist"  # noqa: E731
    expected = [
        "line 2: captoin is no known field; did you mean caption?",
        f"line 2: file_name: {missing('b.mp4')}",
        "line 2: caption must be text, got None",
        "line 2: references must be a list, empty where there are none, got {}",
        "line 3: caption must be text, got ' '",
        "line 3: pair must be one of regular, cross, got 'both'",
        "line 3: references: 3 are more than max_references (2)",
        "line 4: references.0: maks is no known field; did you mean mask?",
        f"line 4: references.0.image: {missing('x.png')}",
        "line 4: references.0.box must be [left, top, right, bottom] in pixels, got [3, 0, 1, 1]",
        "line 4: references.0.subject must be text, got []",
        "line 4: references.1 must be an object such as {'image': 'dog.png'}, got 5",
        "line 5: repeats line 1; remove one of them",
    ]
    assert caught.value.problems[: len(expected)] == expected
    assert [line.split(" (")[0] for line in caught.value.problems[len(expected) :]] == [
        "line 6: is not JSON",
        "line 7: expected an object of fields, got list",
    ]
    assert str(caught.value).startswith(f"{tmp_path / 'metadata.jsonl'}: line 2")


@pytest.mark.parametrize(
    ("content", "problem"),
    [(None, "has no metadata.jsonl; write one with"), ("\n", "has no rows"), (b"\xff", "not UTF-8")],
)
def test_a_manifest_without_rows_is_one_line(tmp_path, content, problem):
    if content is not None:
        (tmp_path / "metadata.jsonl").write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(UserError, match=f"validation_data: .*{problem}") as caught:
        load_manifest(tmp_path, field="validation_data")
    assert "\n" not in str(caught.value)
