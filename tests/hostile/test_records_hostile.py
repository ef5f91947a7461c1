"""Published data sets whose records hold anything at all: such a record is left out or told in a line."""

import copy
import json
import os
import random
import shutil
from pathlib import Path

import numpy as np
import pytest

from refalign_adapter.data.sources.manifest import read_source, sources_of
from refalign_adapter.data.sources.masks import check_mask, decode_mask, encode_mask
from refalign_adapter.data.sources.rows import RunLengthMask
from refalign_adapter.data.sources.tables import read_records
from refalign_adapter.errors import UserError

DATA = Path(__file__).parent.parent / "data"
RECORDS = json.loads((DATA / "opens2v_regular_part.json").read_text())
PAIRS = json.loads((DATA / "opens2v_cross_pairs.json").read_text())
((KEY, RECORD),) = RECORDS.items()
ITEM = {"vid": "b", "frame_idx": 0.5, "bbox_loc": [[96.0, 48.0, 480.0, 384.0]]}
PHRASES = {"vid": "a", "video_caption": "a dog runs", "cross_pair": {"a dog": {"refer_result": [[ITEM]]}}}
ODD = [
    *(None, True, 0, -1, 10**30, 1.5, float("nan"), float("inf"), "", "abc", "é" * 5, "\ud800", "o" * 10_000),
    *([], [[]], [[{}]], [1, 2], [10, -5], [float("inf")] * 2, [10**9, 10**9], [float("nan")] * 4, {}, {"a": 1}),
]


def places(value, above=()):
    """Every place in a JSON value, as the keys that lead there."""
    yield above
    items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, item in items:
        yield from places(item, (*above, key))


def mutants(value, count, seed):
    """The value with one place replaced by something odd, `count` times."""
    draw = random.Random(seed)
    for place in draw.choices(list(places(value)), k=count):
        odd, changed = draw.choice(ODD), copy.deepcopy(value)
        if not place:
            yield place, odd, odd
            continue
        target = changed
        for key in place[:-1]:
            target = target[key]
        target[place[-1]] = odd
        yield place, odd, changed


@pytest.fixture
def sources(tmp_path):
    """One writer for each published format: its records in, its source out."""
    videos = tmp_path / "videos"
    for name in (RECORD["metadata"]["path"], "a.mp4", "b.mp4"):
        (videos / name).parent.mkdir(parents=True, exist_ok=True)
        (videos / name).write_bytes(b"a clip; it is not opened here")
    other = copy.deepcopy(RECORD)
    other["metadata"]["face_cap_qwen"] = "another caption"
    (tmp_path / "cross").mkdir()
    shutil.copy(DATA / "opens2v_cluster_videos.json", tmp_path / "cross/cluster_videos.json")
    (tmp_path / "cross/dataset1.json").write_text(json.dumps(RECORDS))
    both = {KEY: RECORD, KEY.replace("step1-", "step122-"): other}
    (tmp_path / "cross/dataset1_cluster.json").write_text(json.dumps(both))

    def written(name, kind):
        def write(value):
            (tmp_path / name).write_text(json.dumps(value))
            return {"path": str(tmp_path / name), "format": kind, "videos": str(videos)}

        return write

    return {
        "opens2v_regular": (RECORDS, written("part.json", "opens2v_regular")),
        "opens2v_cross": (PAIRS, written("cross/cross_pairs.json", "opens2v_cross")),
        "clusters": (json.loads((DATA / "opens2v_cluster_videos.json").read_text()), None),
        "phantom": (PHRASES, written("pairs.jsonl", "phantom")),
    }


def read(source):
    """The rows that a source gives, or None where it is refused in a line."""
    (one,) = sources_of(source, "data.train_data")
    try:
        _, reading = read_source(one, max_references=4, field="data.train_data")
    except UserError as error:
        reading, problems = None, [str(error)]
    else:
        problems = reading.problems
    assert not any("\n" in problem for problem in problems)
    return reading and reading.rows


@pytest.mark.parametrize("kind", ["opens2v_regular", "opens2v_cross", "phantom", "clusters"])
@pytest.mark.parametrize("count", [60, pytest.param(800, marks=pytest.mark.slow)])
def test_records_of_any_values(sources, tmp_path, kind, count):
    value, write = sources[kind]
    if kind == "clusters":
        source = sources["opens2v_cross"][1](PAIRS)
        write = lambda changed: (tmp_path / "cross/cluster_videos.json").write_text(json.dumps(changed)) and source  # noqa: E731
    assert read(write(value))
    for place, odd, changed in mutants(value, count, seed=count):
        try:
            read(write(changed))
        except Exception as error:
            pytest.fail(f"{type(error).__name__}: {error} with {odd!r} at {place}")


def test_records_beside_a_bad_one_stay(sources):
    _, write = sources["opens2v_regular"]
    unread = ("NaN", "Infinity", str(10**30))  # in no JSON that a streaming parser reads: the file is refused
    bad = {f"bad{number}": odd for number, odd in enumerate(ODD) if not any(x in json.dumps(odd) for x in unread)}
    assert len(read(write({**bad, **RECORDS}))) == 1


def test_records_in_a_pipe_are_one_line(tmp_path):
    os.mkfifo(tmp_path / "part.json")
    assert read({"path": str(tmp_path / "part.json"), "format": "opens2v_regular"}) is None


LARGE = {"deep list": "[" * 100_000, "deep object": '{"a":' * 100_000, "open text": '"' + "a" * 17 * 2**20}


@pytest.mark.parametrize("case", LARGE)
def test_records_that_unfold_in_a_parser_are_one_line(tmp_path, case):
    (tmp_path / "part.json").write_text(f'{{"a": {LARGE[case]}')
    with pytest.raises(UserError, match="is not readable JSON") as caught:
        list(read_records(tmp_path / "part.json"))
    assert "\n" not in str(caught.value)


def test_brackets_in_texts_are_not_depth(tmp_path):
    texts = ['[{"' * 200, "\\" * 7, 'a"[' * 90_000, "", ":["] * 30
    records = {f"{text}{number}": [text, {"a": [text]}] for number, text in enumerate(texts)}
    (tmp_path / "part.json").write_text(json.dumps(records))
    assert dict(read_records(tmp_path / "part.json")) == records


RUNS = {
    "damaged": (4, 4, "é"),
    "half of a pair": (4, 4, "\ud800"),
    "too few": (4, 4, "4"),
    "too many": (4, 4, "oooo"),
    "none": (4, 4, ""),
    "ends in the middle": (4, 4, "4P"),
    "never ends": (4, 4, "o" * 100_000),
    "of another size": (5, 4, "444"),
    "of a giant": (10**9, 10**9, "444"),
    "of a size beyond 64 bits": (10**30, 1, "444"),
    "of a negative size": (-4, -4, "444"),
}


@pytest.mark.parametrize("case", RUNS)
@pytest.mark.parametrize("look", [check_mask, decode_mask])
def test_run_lengths_that_do_not_fill_their_size_never_reach_the_decoder(case, look):
    with pytest.raises(UserError, match="mask: the run lengths do not fit") as caught:
        look(RunLengthMask(*RUNS[case]))
    assert "\n" not in str(caught.value)
    assert len(str(caught.value)) < 200


@pytest.mark.parametrize("seed", range(20))
def test_masks_that_pycocotools_wrote_pass(seed):
    draw = np.random.default_rng(seed)
    mask = np.kron(draw.random(draw.integers(1, 9, 2)) < draw.random(), np.ones(draw.integers(1, 90, 2))) > 0
    check_mask(encode_mask(mask))
    assert (decode_mask(encode_mask(mask)) == mask).all()
