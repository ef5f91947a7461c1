"""Data sets with one thing wrong each: the exact line, and whether making the cache would have failed too."""

import json
import pickle
import shutil
import wave
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tiny_data
from PIL import Image

from refalign_adapter.data.cache.facts import Facts
from refalign_adapter.data.cache.options import CacheOptions
from refalign_adapter.data.cache.parts import PartStore
from refalign_adapter.data.cache.prepare import Plan, RowPreparer
from refalign_adapter.data.cache.targets import Sizes
from refalign_adapter.data.check.between_rows import CheckedRow, findings_between
from refalign_adapter.data.check.check import DataCheck, check_data
from refalign_adapter.data.check.findings import KINDS
from refalign_adapter.data.check.inspection import ReferenceLook, RowLook, canvas_of, inspect_row
from refalign_adapter.data.check.summary import summarize
from refalign_adapter.data.sources.manifest import load_manifest
from refalign_adapter.data.sources.rows import Reference, Row
from refalign_adapter.errors import ConfigError, UserError
from refalign_adapter.media.sizes import Size
from refalign_adapter.media.video_file import write_video

PART = Path(__file__).parent.parent / "data" / "opens2v_regular_part.json"
Rows = list[dict[str, Any]]
Change = Callable[[Path, Rows], Any]


@pytest.fixture(scope="module")
def template(tmp_path_factory) -> Path:
    """Four rows with nothing wrong: 1, 2, 3, 1 references; rows 2 and 4 are regular pairs."""
    return tiny_data.write_data(tmp_path_factory.mktemp("clean") / "data", 4, height=32, width=48).parent


@pytest.fixture
def data(template, tmp_path, monkeypatch) -> Path:
    """A copy of them that can be changed, named `data` from where the test runs."""
    shutil.copytree(template, tmp_path / "data")
    monkeypatch.chdir(tmp_path)
    return Path("data")


def options_for(**changes: Any) -> CacheOptions:
    values = {"train_data": "data", "height": 32, "width": 48, "num_frames": 5, "fps": 8, "max_references": 3}
    return CacheOptions(base_model="none", cache_dir="none", **{**values, **changes})


def rows_of(data: Path) -> Rows:
    return [json.loads(line) for line in (data / "metadata.jsonl").read_text().splitlines()]


def lines(check: DataCheck) -> list[str]:
    return [finding.line() for finding in check.findings]


def without_video(data: Path, rows: Rows) -> None:
    with wave.open(str(data / "clips/0.mp4"), "wb") as file:
        file.setparams((1, 2, 8000, 0, "NONE", ""))
        file.writeframes(bytes(1600))


def same_file(data: Path, rows: Rows) -> None:
    shutil.copy(data / "references/1_0.png", data / "references/1_1.png")
    shutil.copy(data / "masks/1_0.png", data / "masks/1_1.png")


def same_pixels(data: Path, rows: Rows) -> None:
    same_file(data, rows)
    Image.open(data / "references/1_0.png").save(data / "references/1_1.bmp")
    rows[1]["references"][1]["image"] = "references/1_1.bmp"
    del rows[1]["references"][1]["subject"]


def other_name(data: Path, rows: Rows) -> None:
    rows[2]["references"][0] = {**rows[0]["references"][0], "subject": "Rex"}


def copied_row(data: Path, rows: Rows) -> None:
    for name in ("clips/0.mp4", "references/0_0.png"):
        shutil.copy(data / name, data / name.replace("/0", "/copy"))
    references = [{**rows[0]["references"][0], "image": "references/copy_0.png"}]
    rows.append({**rows[0], "file_name": "clips/copy.mp4", "references": references})


def mask_of(size: tuple[int, int], value: int) -> Change:
    return lambda data, rows: Image.new("L", size, value).save(data / "masks/0_0.png")


def reference(**values: Any) -> Change:
    return lambda data, rows: rows[0]["references"][0].update(values)


def row(**values: Any) -> Change:
    return lambda data, rows: rows[0].update(values)


def bytes_in(name: str) -> Change:
    return lambda data, rows: (data / name).write_bytes(b"nonsense")


MEND = "mend the file, or what the row says of it"
PROBLEMS: dict[str, tuple[Change, str, str]] = {
    "missing image": (
        reference(image="no.png"),
        "table",
        "data/metadata.jsonl line 1: references.0.image: 'data/no.png' does not exist",
    ),
    "caption": (row(caption=""), "table", "data/metadata.jsonl line 1: caption must be text, got ''"),
    "box": (
        reference(box=[9, 1, 2, 3]),
        "table",
        "data/metadata.jsonl line 1: references.0.box must be [left, top, right, bottom] in pixels, got [9, 1, 2, 3]",
    ),
    "no video file": (
        bytes_in("clips/0.mp4"),
        "clip",
        "data/metadata.jsonl line 1: clips/0.mp4: video: cannot read 'data/clips/0.mp4' "
        "(Invalid data found when processing input); replace the file or remove the row",
    ),
    "sound alone": (
        without_video,
        "clip",
        "data/metadata.jsonl line 1: clips/0.mp4: video: 'data/clips/0.mp4' is no clip that is read; make it an MP4: "
        "ffmpeg -i IN OUT.mp4; replace the file or remove the row",
    ),
    "short": (
        lambda data, rows: tiny_data.write_clip(data / "clips/0.mp4", frames=4, height=32, width=48),
        "too_short",
        "data/metadata.jsonl line 1: clips/0.mp4: video: 'data/clips/0.mp4' is too short: 4 frames at 8 frames a "
        "second, 5 are needed; lower num_frames or raise fps",
    ),
    "no image": (
        bytes_in("references/0_0.png"),
        "reference",
        "data/metadata.jsonl line 1: clips/0.mp4: references.0: image: cannot read 'data/references/0_0.png' "
        f"(no image that can be read; PNG, JPEG, WEBP, AVIF, BMP, GIF, TIFF are); {MEND}",
    ),
    "mask of another size": (
        mask_of((9, 8), 255),
        "reference",
        "data/metadata.jsonl line 1: clips/0.mp4: references.0: reference 'data/references/0_0.png': "
        f"mask: 9x8 pixels do not match the image's 30x40; {MEND}",
    ),
    "mask without a mark": (
        mask_of((30, 40), 0),
        "reference",
        "data/metadata.jsonl line 1: clips/0.mp4: references.0: mask: 'data/masks/0_0.png' marks nothing; "
        f"every pixel is black; {MEND}",
    ),
    "box outside": (
        reference(box=[50, 50, 60, 60]),
        "reference",
        "data/metadata.jsonl line 1: clips/0.mp4: references.0: reference 'data/references/0_0.png': "
        f"box: (50, 50, 60, 60) has no pixel of the image of 30x40; {MEND}",
    ),
    "frame the clip does not have": (
        lambda data, rows: rows[0].update(references=[{"frame": 99, "box": [1, 1, 9, 9]}]),
        "reference",
        "data/metadata.jsonl line 1: clips/0.mp4: references.0: video: 'data/clips/0.mp4' has no frame 99; " + MEND,
    ),
    "one file as two subjects": (
        same_file,
        "same_picture",
        "data/metadata.jsonl line 2: clips/1.mp4: references.0 (1_0.png, subject 'subject 0') and references.1 "
        "(1_1.png, subject 'subject 1') show the same picture; the loss would push equal targets apart: "
        "give both one subject name, or leave one out",
    ),
    "the same pixels as two subjects": (
        same_pixels,
        "same_picture",
        "data/metadata.jsonl line 2: clips/1.mp4: references.0 (1_0.png, subject 'subject 0') and references.1 "
        "(1_1.bmp, no subject name) show the same picture; the loss would push equal targets apart: "
        "give both one subject name, or leave one out",
    ),
    "row of other files": (
        copied_row,
        "repeated_row",
        "data/metadata.jsonl line 5: clips/copy.mp4: has the clip, caption and references of "
        "data/metadata.jsonl line 1; remove one of them",
    ),
}


@pytest.fixture
def changed(data):
    """Change the data set by a function of a case table."""

    def apply(*changes: Change) -> None:
        rows = rows_of(data)
        for change in changes:
            change(data, rows)
        tiny_data.write_manifest(data, rows)

    return apply


def test_nothing_is_found_in_a_clean_set(data):
    check = check_data(options_for())
    assert lines(check) == []
    assert check.verdict() == "no problems and no notes in 4 rows"
    assert {checked.look.size for checked in check.rows} == {Size(5, 32, 48)}


def sizes_of(size: Size, options: CacheOptions) -> Sizes:
    video = (size.num_frames, size.height, size.width)
    return Sizes(video, canvas_of(size, options), options.keep_background, (2, 3), (4, 16, 16))


def refused_by_the_cache(options: CacheOptions) -> set[int]:
    """Lines of the rows that making a cache would stop at."""
    facts = Facts({}, {}, {}, {}, None)
    plans = {size: Plan(options.at(size), facts, sizes_of(size, options)) for size in options.sizes}
    assert options.train_data
    preparer = RowPreparer(plans, PartStore("none"))
    return {row.line for row in load_manifest(options.train_data) if preparer[row].problem}


@pytest.mark.parametrize("case", PROBLEMS)
def test_a_problem_is_one_line_and_the_cache_agrees(changed, case):
    change, kind, line = PROBLEMS[case]
    changed(change)
    check = check_data(options_for())
    assert [finding.line() for finding in check.problems] == [line]
    assert check.problems[0].kind == kind
    if kind == "table":
        with pytest.raises(ConfigError):
            load_manifest("data")
    else:
        stops = {"clip", "too_short", "reference"}
        assert refused_by_the_cache(options_for()) == ({1} if kind in stops else set())


def frozen(data: Path, rows: Rows) -> None:
    noise = np.random.default_rng(0).integers(0, 256, (1, 32, 48, 3), np.uint8)
    write_video(data / "clips/0.mp4", np.repeat(noise, 9, 0), 8)


def nearly_still(data: Path, rows: Rows) -> None:
    """A thing of 8 pixels moves in one corner."""
    frames = np.full((9, 32, 48, 3), 90, np.uint8)
    for number, frame in enumerate(frames):
        frame[2:10, number : number + 8] = 255
    write_video(data / "clips/0.mp4", frames, 8)


def picture(colour: tuple[int, int, int], size: tuple[int, int] = (30, 40)) -> Change:
    return lambda data, rows: Image.new("RGB", size, colour).save(data / "references/0_0.png")


def clip(**values: Any) -> Change:
    return lambda data, rows: tiny_data.write_clip(data / "clips/0.mp4", **{"height": 32, "width": 48, **values})


def unmarked(margin: int) -> Change:
    """The clip's own picture without mask and box, with a white margin."""

    def change(data: Path, rows: Rows) -> None:
        pixels = np.full((40, 30, 3), 255, np.uint8)
        inner = pixels[margin : 40 - margin, margin : 30 - margin]
        inner[:] = np.random.default_rng(0).integers(0, 200, inner.shape)
        Image.fromarray(pixels).save(data / "references/0_0.png")
        rows[0].update(pair="regular")
        rows[0]["references"][0].pop("mask", None)

    return change


def frame_with(**values: Any) -> Change:
    return lambda data, rows: rows[0].update(references=[{"frame": 2, "subject": "it", **values}], pair="regular")


def new_caption(data: Path, rows: Rows) -> None:
    rows.append({**rows[0], "caption": "something else is said here"})


def mask_by_alpha(data, rows):
    mask = Image.open(data / "masks/0_0.png")
    white = Image.new("RGB", mask.size, "white")
    white.putalpha(mask.convert("L"))
    white.save(data / "masks/0_0.png")


NOTES: dict[str, tuple[Change, list[tuple[str, str]]]] = {
    "two names": (
        other_name,
        [
            (
                "subject_names",
                "references.0.subject is 'Rex', but the same picture is 'subject 0' in data/metadata.jsonl line 1",
            )
        ],
    ),
    "another caption": (
        new_caption,
        [("repeated_clip", "file_name: the clip of data/metadata.jsonl line 1, with another caption")],
    ),
    "small subject": (
        reference(mask=None, box=[8, 10, 15, 16]),
        [("small_subject", "references.0: 7x6 pixels are enlarged 5.3 times")],
    ),
    "white": (picture((254, 253, 255)), [("blank_reference", "references.0: 100% of the subject is white")]),
    "one colour": (
        picture((10, 200, 30)),
        [("blank_reference", "references.0: all of the subject is one colour, rgb(10, 200, 30)")],
    ),
    "box over the edge": (
        reference(mask=None, box=[5, 5, 90, 35]),
        [("box_outside", "references.0: box [5, 5, 90, 35] leaves the picture of 30x40")],
    ),
    "box rounded over the edge": (reference(mask=None, box=[-0.6, 5, 30.5, 35]), []),
    "whole picture": (
        unmarked(0),
        [("whole_picture", "references.0: all of 30x40 pixels is the subject: there is neither mask nor box")],
    ),
    "cut out already, but augmented": (
        unmarked(4),
        [("whole_picture", "references.0: all of 22x32 pixels is the subject: there is neither mask nor box")],
    ),
    "whole frame": (
        frame_with(box=[0, 0, 48, 31]),
        [("covers_frame", "references.0: mask and box mark 97% of the frame")],
    ),
    "part of a frame": (frame_with(box=[0, 0, 30, 31]), []),
    "enlarged": (
        clip(height=16, width=24),
        [("enlarged_clip", "file_name: 24x16 pixels are enlarged 2.00 times to cover 48x32")],
    ),
    "cropped": (
        clip(height=32, width=96),
        [("cropped_clip", "file_name: 96x32 pixels keep 50% of the picture in 48x32")],
    ),
    "slow": (clip(fps=4), [("low_fps", "file_name: 4 frames a second, data.fps is 8")]),
    "still": (frozen, [("frozen_clip", "file_name: all 5 frames are the same")]),
    "nearly still": (nearly_still, []),
    "a mask in the alpha channel": (mask_by_alpha, [("alpha_mask", "references.0: mask 'data/masks/0_0.png'")]),
    "two words": (row(caption="thing moves"), [("short_caption", "caption: 'thing moves'")]),
    "no spaces": (row(caption="一只狗在海滩上奔跑"), []),
    "shared caption": (
        lambda data, rows: [item.update(caption="a thing moves about") for item in rows[:3]],
        [("common_caption", "caption: 3 of 4 training rows have 'a thing moves about'")],
    ),
    "one subject": (
        lambda data, rows: rows.__setitem__(slice(None), [rows[0]]),
        [
            ("few_subjects", "references: one subject in all training rows (1)"),
            ("one_subject", "references: one subject in each training row (1)"),
        ],
    ),
    "no references in a row": (
        lambda data, rows: rows[0].update(references=[]),
        [("no_references", "references: none in 1 of 4 training rows")],
    ),
}


@pytest.mark.parametrize("case", NOTES)
def test_a_note_is_no_problem(changed, case):
    change, expected = NOTES[case]
    changed(change)
    check = check_data(options_for())
    assert check.problems == []
    assert [(finding.kind, finding.text) for finding in check.notes] == expected


def test_a_white_ground_needs_no_mask_where_nothing_is_augmented(changed):
    changed(unmarked(4))
    assert check_data(options_for(augment_references=False)).findings == []
    changed(unmarked(0))
    assert [item.kind for item in check_data(options_for(augment_references=False)).notes] == ["whole_picture"]


def test_every_kind_is_tested():
    found = {kind for _, kind, _ in PROBLEMS.values()} | {kind for _, notes in NOTES.values() for kind, _ in notes}
    assert found | {"leak", "outside", "long_caption"} == set(KINDS)  # those two: tests/hostile/test_rows_hostile.py


def test_all_problems_at_once_in_worker_processes(changed, data):
    changed(PROBLEMS["no video file"][0], same_file, copied_row, bytes_in("references/2_1.png"), mask_of((9, 8), 255))
    with (data / "metadata.jsonl").open("a") as file:
        file.write("{nonsense\n")
    alone = check_data(options_for())
    counts = Counter(finding.kind for finding in alone.problems)
    # The copied row has the first row's faults too.
    assert counts == {"table": 1, "clip": 2, "reference": 3, "same_picture": 1}
    done = []
    shared = check_data(options_for(), workers=2, progress=lambda *counts: done.append(counts))
    assert lines(shared) == lines(alone)
    assert done == [(number, 5) for number in range(1, 6)]


def test_a_clip_of_both_splits(data, tmp_path):
    other = tiny_data.write_data(tmp_path / "other", 2, height=32, width=48)
    for number in range(2):  # not the clips of `data`, which are drawn alike
        tiny_data.write_clip(other.parent / f"clips/{number}.mp4", height=32, width=48, seed=50 + number)
    assert check_data(options_for(validation_data="other")).problems == []
    shutil.copy(data / "clips/3.mp4", other.parent / "clips/1.mp4")
    (line,) = (finding.line() for finding in check_data(options_for(validation_data="other")).problems)
    assert line == (
        "other/metadata.jsonl line 2: clips/1.mp4: file_name: held out, but also trained on as 'clips/3.mp4' in "
        "data/metadata.jsonl line 4; remove it from one: as it is, validation tells nothing of new clips"
    )


def test_last_rows_that_are_held_out_count_as_validation(data, changed):
    changed(new_caption)
    assert check_data(options_for()).problems == []
    check = check_data(options_for(), held_out=2)
    assert [checked.split for checked in check.rows] == ["train"] * 3 + ["validation"] * 2
    assert [finding.kind for finding in check.problems] == ["leak"]
    assert "data/metadata.jsonl line 1" in check.problems[0].text


def checked_row(line: int, names: list[str | None], pictures: list[str], **values: Any) -> CheckedRow:
    references = tuple(Reference(Path(f"{name}.png"), subject=name) for name in names)
    kept = {"segment": values.pop("segment", None), "line": line}
    look = RowLook("clip", None, None, [ReferenceLook(picture, f"canvas {picture}") for picture in pictures])
    values = {"split": "train", "table": "t", "place": f"t line {line}", "own_names": True, **values}
    return CheckedRow(**values, row=Row("a", Path("a"), f"caption {line}", references, **kept), look=look)


def test_names_count_across_rows_only_where_the_owner_gave_them():
    def kinds(**values):
        rows = [checked_row(1, ["dog"], ["p"], **values), checked_row(2, ["hound"], ["p"], segment=(0, 9), **values)]
        return [finding.kind for finding in findings_between(rows)]

    assert "subject_names" in kinds()
    assert "subject_names" not in kinds(own_names=False)
    numbers = [checked_row(1, ["1"], ["p"]), checked_row(2, ["2"], ["p"], segment=(0, 9))]
    assert "subject_names" not in [finding.kind for finding in findings_between(numbers)]
    views = [checked_row(1, ["dog", "dog", "cat"], ["p", "p", "q"])]
    assert findings_between(views) == []


def test_segments_leak_only_where_they_overlap():
    def leaks(one, other):
        rows = [
            checked_row(1, ["a"], ["p"], segment=one),
            checked_row(2, ["a"], ["p"], segment=other, split="validation"),
        ]
        return [finding.kind for finding in findings_between(rows) if finding.problem] == ["leak"]

    assert leaks((0, 9), (8, 20))
    assert leaks(None, (8, 20))
    assert not leaks((0, 9), (9, 20))


def test_clips_go_to_the_sizes_that_the_cache_takes(data, changed):
    changed(clip(frames=20, height=48, width=32))
    sizes = (Size(5, 32, 48), Size(9, 48, 32), Size(13, 48, 32))
    check = check_data(options_for(buckets=sizes))
    assert [checked.look.size for checked in check.rows] == [sizes[2], *[sizes[0]] * 3]
    assert refused_by_the_cache(options_for(buckets=sizes)) == set()
    (table,) = (table for table in summarize(check) if table.title.startswith("Clips by size"))
    assert table.columns == ("size", "1 reference", "2 references", "3 references", "all")
    assert table.rows == [("5x32x48", 1, 1, 1, 3), ("13x48x32", 1, 0, 0, 1), ("all", 2, 1, 1, 4)]


def test_a_summary_counts_rows_clips_and_what_is_left_out(data, tmp_path):
    ((key, record),) = json.loads(PART.read_text()).items()
    tiny_data.write_clip(tmp_path / "videos" / record["metadata"]["path"], frames=3, height=720, width=1280)
    (tmp_path / "part.json").write_text(json.dumps({key: record, "empty": {}, "other": {"metadata": {}}}))
    part = {"path": "part.json", "format": "opens2v_regular", "videos": "videos"}
    check = check_data(options_for(train_data=[{"path": "data"}, part], num_frames=1))
    assert check.problems == []
    tables = {table.title: table.to_json() for table in summarize(check)}
    rows = [list(row.values()) for row in tables["Rows"]]
    assert rows[0] == ["train", "data/metadata.jsonl", "folder", 4, 2, 2, 2]
    assert rows[1][:6] == ["train", "part.json", "opens2v_regular", 1, 1, 0]
    left_out = tables["Records that the formats' rules leave out"]
    assert [(row["reason"], row["records"]) for row in left_out] == [
        ("have no metadata", 1),
        ("have no annotation", 1),
    ]
    clips = {row["quantity"]: row for row in tables["Clips as they are, after their rows' segment and crop"]}
    assert (clips["width"]["smallest"], clips["width"]["median"], clips["width"]["largest"]) == (48, 48, 1280)
    assert clips["seconds"]["median"] == 1.12
    assert check.rows[4].place == "part.json record 1"


def test_nothing_large_is_kept_of_a_row(data):
    tiny_data.write_clip(data / "clips/0.mp4", frames=40, height=128, width=192)
    found = load_manifest("data")[0]
    assert len(pickle.dumps(inspect_row(found, options_for(num_frames=33, height=128, width=192)))) < 2000


def test_sources_that_cannot_be_read_are_told_before_anything_is_decoded(data):
    with pytest.raises(ConfigError) as caught:
        check_data(options_for(train_data=["data", "nowhere"], validation_data="nothing"))
    assert caught.value.problems == [
        "data.train_data: cannot read 'nowhere' (No such file or directory)",
        "data.validation_data: cannot read 'nothing' (No such file or directory)",
    ]
    with pytest.raises(UserError, match="data.train_data must name the rows to check, got null"):
        check_data(options_for(train_data=None))


def test_a_table_without_a_row_that_can_be_made(data):
    tiny_data.write_manifest(data, [{"file_name": "a"}])
    check = check_data(options_for(), workers=1)
    assert check.rows == []
    assert {finding.kind for finding in check.findings} == {"table"}
    assert [table.title for table in summarize(check)] == ["Rows", "Findings"]
