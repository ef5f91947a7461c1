"""A cache that is damaged, or that anyone may have written: one line or a row left out, and `refalign cache` mends."""

import errno
import json
import os
import random
import socket
from dataclasses import replace
from pathlib import Path
from shutil import copytree, rmtree

import pytest
import tiny_data
import tiny_models
import torch
from seals import seal, unseal

from refalign_adapter.data.cache import digests, part_file
from refalign_adapter.data.cache.build import build_cache
from refalign_adapter.data.cache.dataset import UnreadableRowError, open_cache
from refalign_adapter.data.cache.digests import DIGESTS_NAME, FileDigests
from refalign_adapter.data.cache.encoders import load_encoders
from refalign_adapter.data.cache.freshness import check_fresh
from refalign_adapter.data.cache.index import read_index
from refalign_adapter.data.cache.lock import LOCK_NAME
from refalign_adapter.data.cache.options import CacheOptions
from refalign_adapter.data.cache.part_file import checksum, read_tensor
from refalign_adapter.data.cache.parts import DAMAGED, CacheGoneError, Expected, PartStore
from refalign_adapter.data.cache.verify import prune_cache, verify_cache
from refalign_adapter.data.sources.manifest import load_manifest
from refalign_adapter.errors import ConfigError, ReadError, UserError
from refalign_adapter.hashes import file_digest

LISTS = ("meta.json", "index-train.jsonl", "files-train.jsonl")
KINDS = ("video", "references", "text", "teacher", "tokens")

pytestmark = pytest.mark.timeout(60)  # a pipe that is opened would never end


@pytest.fixture(scope="module", autouse=True)
def _at_once():
    """Files are remembered however new they are: nobody changes them twice within a tick here."""
    with pytest.MonkeyPatch.context() as settled:
        settled.setattr(digests, "SETTLED", 0)
        yield


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    """Options of a finished cache of two rows with every kind of part, and its encoders."""
    folder = tmp_path_factory.mktemp("world")
    options = CacheOptions(
        base_model=str(tiny_models.save_tiny_pipeline(folder / "base")),
        cache_dir=str(folder / "cache"),
        train_data=str(tiny_data.write_data(folder / "data", 2)),
        height=32,
        width=48,
        num_frames=5,
        fps=8,
        max_sequence_length=24,
        teachers=(str(tiny_models.tiny_dinov2(folder / "teacher")),),
        text_encoder_dtype="fp32",
        drop_background=True,
    )
    encoders = load_encoders(options)
    build(options, encoders)
    return options, encoders


@pytest.fixture
def options(world, tmp_path):
    """Options of a copy of the cache."""
    copytree(world[0].cache_dir, tmp_path / "cache")
    return replace(world[0], cache_dir=str(tmp_path / "cache"))


def build(options, encoders):
    rows = {split: load_manifest(path, max_references=None) for split, path in options.manifests.items()}
    return build_cache(options, rows, encoders)


def tell(options):
    """What training tells of a cache that it opens and reads once: each line of it."""
    told = []
    try:
        dataset = open_cache(options)
        check_fresh(options)
    except UserError as error:
        return [str(error)]
    for index in range(len(dataset)):
        try:
            dataset[index]
        except UnreadableRowError as error:
            told.append(str(error))
    return told


def parts_of(cache):
    return {path.name: path.read_bytes() for path in sorted(Path(cache).rglob("*.safetensors"))}


def path_of(options, part, row=0):
    entry = read_index(options.cache_dir, "train")[row]
    key = next(key for name, key in entry.parts.files() if name == part)
    return PartStore(options.cache_dir).path(part, key)


def files_of(cache):
    return sorted(path for path in Path(cache).rglob("*") if path.is_file() and path.name != LOCK_NAME)


DAMAGES = {
    "the first byte": lambda content: flipped(content, 0),
    "a byte of its head": lambda content: flipped(content, 30),
    "its middle": lambda content: flipped(content, len(content) // 2),
    "its end": lambda content: flipped(content, len(content) - 2),
    "half": lambda content: content[: len(content) // 2],
    "nothing": lambda content: b"",
}


def flipped(content, place):
    return content[:place] + bytes([content[place] ^ 1]) + content[place + 1 :]


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_flipped_or_torn_byte_in_every_file_is_told_and_mended(world, options, damage):
    before, known = parts_of(options.cache_dir), FileDigests(options.cache_dir).known.keys()
    files = files_of(options.cache_dir)
    assert len(files) == 4 + len(before) == 4 + 2 * len(KINDS) + 1
    for path in files:
        whole = path.read_bytes()
        path.write_bytes(DAMAGES[damage](whole))
        told = tell(options)
        assert all(len(line.splitlines()) == 1 and "run `refalign cache" in line for line in told), told
        if path.name == DIGESTS_NAME:  # what it says is found out again
            assert not told
        elif not told:  # not of the values: where a checksum itself was hit, or spaces that mean nothing
            assert damage in ("its middle", "a byte of its head"), path
            if path.suffix == ".safetensors":
                values = read_tensor(path)[1]
                path.write_bytes(whole)
                assert torch.equal(values, read_tensor(path)[1])
            path.write_bytes(whole)
        build(options, world[1])
        assert tell(options) == [], path
        assert parts_of(options.cache_dir) == before, path
        assert verify_cache(options).count == len(before)
    remembered = FileDigests(options.cache_dir).known
    assert remembered.keys() >= known
    assert all(digest == file_digest(path) for path, (_, digest) in remembered.items())


def test_a_cache_run_alone_takes_the_values_of_a_part_on_trust(world, options):
    """As docs/data.md says: it reads headers; `--verify`, or a run that reads the part, finds the rest."""
    path = path_of(options, "video")
    path.write_bytes(flipped(path.read_bytes(), -2))
    assert not build(options, world[1]).made
    with pytest.raises(ConfigError, match="its checksum differs"):
        verify_cache(options)
    assert dict(build(options, world[1]).made) == {"video": 1}


def test_a_cache_of_before_there_were_checksums_is_taken_as_it_is(world, options):
    unseal(Path(options.cache_dir))
    notes = Path(options.cache_dir) / DIGESTS_NAME
    notes.write_text("".join(json.dumps(json.loads(line)[:5]) + "\n" for line in notes.read_text().splitlines()))
    assert len(FileDigests(options.cache_dir).known) == len(notes.read_text().splitlines())
    assert tell(options) == []
    assert not build(options, world[1]).made
    assert "checksum" in json.loads((Path(options.cache_dir) / "meta.json").read_text())


def test_an_edited_index_is_found_out(options):
    path = Path(options.cache_dir) / "index-train.jsonl"
    lines = path.read_text().splitlines()
    for edited in (lines[::-1], lines[:1], [lines[0].replace('"line": 1', '"line": 2'), lines[1]]):
        path.write_text("\n".join(edited) + "\n")
        (line,) = tell(options)
        assert "is damaged (its checksum is not the one in meta.json" in line
        assert line.endswith("run `refalign cache --config …` to make it anew")
    path.unlink()
    assert tell(options) == [f"cache_dir: {str(path)!r} is gone; run `refalign cache --config …`"]


@pytest.fixture
def no_files(tmp_path):
    """Kind -> puts one in a path's place."""
    (tmp_path / "loop").symlink_to("loop")
    sockets = []

    def bound(path):
        sockets.append(socket.socket(socket.AF_UNIX))
        sockets[-1].bind(str(tmp_path / "s"))
        (tmp_path / "s").rename(path)

    yield {
        "pipe": os.mkfifo,
        "socket": bound,
        "device": lambda path: path.symlink_to("/dev/zero"),
        "folder": lambda path: path.mkdir(),
        "pipe behind a link": lambda path: (
            os.mkfifo(tmp_path / f"pipe of {path.name}"),
            path.symlink_to(tmp_path / f"pipe of {path.name}"),
        ),
        "link to itself": lambda path: path.symlink_to(tmp_path / "loop"),
    }
    for each in sockets:
        each.close()


NO_FILES = ("pipe", "socket", "device", "folder", "pipe behind a link", "link to itself")


@pytest.mark.parametrize("kind", NO_FILES)
def test_what_is_no_file_is_one_line_and_never_waited_for(world, options, no_files, kind):
    before = parts_of(options.cache_dir)
    for path in (path_of(options, "video"), path_of(options, "text", 1), *(Path(options.cache_dir, n) for n in LISTS)):
        path.unlink()
        no_files[kind](path)
        (line,) = tell(options)
        assert len(line.splitlines()) == 1
        assert str(path) in line
        if path.is_dir():  # a folder may be anybody's
            assert path.name in LISTS
            path.rmdir()
        build(options, world[1])
        assert tell(options) == []
    assert parts_of(options.cache_dir) == before


@pytest.mark.parametrize("kind", NO_FILES)
def test_locks_and_notes_that_are_no_files(world, options, no_files, kind):
    cache = Path(options.cache_dir)
    for name in (DIGESTS_NAME, LOCK_NAME):
        (cache / name).unlink()
        no_files[kind](cache / name)
        assert tell(options) == []
        if name == LOCK_NAME:
            with pytest.raises(UserError, match=r"cache/\.lock'") as told:
                build(options, world[1])
            assert len(str(told.value).splitlines()) == 1
        else:  # only files that are hashed again
            build(options, world[1])
        (cache / name).rmdir() if kind == "folder" else (cache / name).unlink()
        build(options, world[1])


@pytest.mark.parametrize("number", [errno.EACCES, errno.EIO, errno.ESTALE, errno.EMFILE])
def test_what_the_system_withholds_is_left_as_it_is(world, options, monkeypatch, number):
    path, before = path_of(options, "video"), parts_of(options.cache_dir)
    dataset = open_cache(options)

    def withhold(name, *arguments, **keywords):
        if str(name) == str(path):
            raise OSError(number, os.strerror(number), str(name))
        return open(name, *arguments, **keywords)

    with monkeypatch.context() as withheld:
        withheld.setattr(part_file, "open", withhold, raising=False)
        reason = os.strerror(number)
        with pytest.raises(UnreadableRowError) as told:
            dataset[0]
        assert f"{str(path)!r} cannot be read ({reason}), which is the system's word" in str(told.value)
        assert "refalign cache" not in str(told.value)
        dataset[1]
        with pytest.raises(ConfigError) as listed:
            verify_cache(options)
        assert "1 of" in listed.value.problems[1]
        assert "not given by the system and may be whole" in listed.value.problems[1]
        with pytest.raises(ConfigError, match=rf"line 1: .*cannot be read \({reason}\)"):
            build(options, world[1])
    assert parts_of(options.cache_dir) == before
    assert dataset[0].latents.shape == dataset[1].latents.shape  # it is given again
    assert not list(Path(options.cache_dir).rglob(f"*{DAMAGED}*"))


def test_a_cache_that_is_gone_is_told_as_such(options):
    dataset = open_cache(options)
    dataset[0]
    os.rename(options.cache_dir, f"{options.cache_dir}-away")
    for _ in range(2):
        with pytest.raises(CacheGoneError) as told:
            dataset[0]
    assert str(told.value) == (
        f"cache_dir: {options.cache_dir!r} cannot be read any more (meta.json: No such file or directory); look after "
        "that folder or disk"
    )
    with pytest.raises(UserError, match="there is no finished cache"):
        open_cache(options)
    with pytest.raises(CacheGoneError):
        PartStore(options.cache_dir).problem("video", "a" * 32, Expected((1,), None))
    assert isinstance(told.value, ReadError)


def header(**values):
    described = {"dtype": "BF16", "shape": [16, 2, 4, 6], "data_offsets": [0, 1536]}
    return {"data": described | values}


def part(content, tensor=None, *, length=None):
    """A file of this header, or text, and 1,536 bytes of values."""
    text = content if isinstance(content, bytes) else json.dumps(content).encode()
    values = bytes(1536) if tensor is None else tensor.view(torch.uint8).numpy().tobytes()
    return (len(text) if length is None else length).to_bytes(8, "little") + text + values


def with_values(value):
    tensor = torch.zeros(16, 2, 4, 6, dtype=torch.bfloat16)
    tensor[3, 1, 2, 4] = value
    return part({**header(), "__metadata__": {"crc32": checksum(tensor)}}, tensor)


HOSTILE = {
    "no bytes of a header": part(header(), length=0),
    "a header as long as the world": part(header(), length=2**63),
    "a header beyond the file": part(header(), length=4000),
    "a header of which half is values": part(header(), length=200),
    "a header that is large": part(b" " * 2**20 + b"{}"),
    "no JSON": part(b"{data}"),
    "not text": part(b"\xff\xfe" * 40),
    "deep": part(b"[" * 60_000),
    "a list": part([header()]),
    "twice": part(b'{"data": 1, "data": 2}'),
    "no tensor": part({}),
    "another name": part({"../../data": header()["data"]}),
    "two tensors": part({**header(), "more": header()["data"]}),
    "a number for a tensor": part({"data": 5}),
    "NaN": part(b'{"data": NaN}'),
    "an unknown type": part(header(dtype="F4")),
    "a list for a type": part(header(dtype=["BF16"] * 1000)),
    "another type": part(header(dtype="F16")),
    "a type of other size": part(header(dtype="F32")),
    "another shape": part(header(shape=[16, 2, 6, 4])),
    "no dimensions": part(header(shape=[])),
    "a shape without values": part(header(shape=[16, 0, 4, 6])),
    "a huge shape": part(header(shape=[2**39] * 8)),
    "numbers beyond all": part(header(shape=[10**400], data_offsets=[0, 10**400])),
    "many dimensions": part(header(shape=[1] * 5000)),
    "a negative shape": part(header(shape=[-16, -2, 4, 6])),
    "fractions": part(header(shape=[16.0, 2, 4, 6])),
    "truths": part(header(shape=[True, 32, 4, 6])),
    "offsets beyond the file": part(header(data_offsets=[0, 2**60])),
    "offsets back to front": part(header(data_offsets=[1536, 0])),
    "offsets into the header": part(header(data_offsets=[-64, 1472])),
    "no offsets": part(header(data_offsets=None)),
    "metadata that are a list": part({**header(), "__metadata__": ["crc32"]}),
    "a checksum that is a list": part({**header(), "__metadata__": {"crc32": [[]] * 100}}),
    "a checksum that is a number": part({**header(), "__metadata__": {"crc32": 0}}),
    "more behind the values": part(header()) + b"more",
    "not a number": with_values(torch.nan),
    "infinity": with_values(-torch.inf),
}


@pytest.mark.parametrize("case", HOSTILE)
def test_a_part_that_anyone_may_have_written(options, case):
    path = path_of(options, "video")
    path.write_bytes(HOSTILE[case])
    (line,) = tell(options)
    assert line.startswith(f"cache: train line 1 (clips/0.mp4): {str(path)!r} ")
    assert len(line.splitlines()) == 1
    assert len(line) < 800
    assert not path.exists()
    assert path.with_suffix(DAMAGED).exists()


def test_parts_that_are_right_whatever_else_their_metadata_say(options):
    zeros = torch.zeros(16, 2, 4, 6, dtype=torch.bfloat16)
    path = path_of(options, "video")
    for metadata in ({}, {"crc32": checksum(zeros), "megatron_core": "evil", "../x": [1, {"y": None}]}):
        path.write_bytes(part({**header(), "__metadata__": metadata}, zeros))
        assert torch.equal(open_cache(options)[0].latents, zeros)
    tokens = path_of(options, "tokens")
    shape = list(read_tensor(tokens)[1].shape)
    count = len(tokens.read_bytes()) - 8 - int.from_bytes(tokens.read_bytes()[:8], "little")
    text = json.dumps({"data": {"dtype": "BOOL", "shape": shape, "data_offsets": [0, count]}}).encode()
    tokens.write_bytes(len(text).to_bytes(8, "little") + text + b"\x07" * count)
    (line,) = tell(options)
    assert "holds values that are neither true nor false" in line


def test_names_in_an_index_are_never_paths_and_never_lines(options, tmp_path):
    path = Path(options.cache_dir) / "index-train.jsonl"
    first, second = (json.loads(line) for line in path.read_text().splitlines())
    for key in ("../../x", "/etc/passwd", "a" * 31, "A" * 32, "a" * 32 + "\n", "..", "", 5, None, ["a" * 32]):
        for name in ("video", "text", "tokens"):
            if (name, key) != ("tokens", None):
                wrong = {**first, "parts": {**first["parts"], name: key}}
                path.write_text(json.dumps(wrong) + "\n" + json.dumps(second) + "\n")
                seal(Path(options.cache_dir))
                (line,) = tell(options)
                assert "is damaged (a row's" in line
                assert len(line.splitlines()) == 1
    named = {**first, "file_name": "a\nerror: all is lost\x1b[2J" + "b" * 10_000}
    path.write_text(json.dumps(named) + "\n" + json.dumps(second) + "\n")
    seal(Path(options.cache_dir))
    path_of(options, "video").unlink()
    (line,) = tell(options)
    assert len(line.splitlines()) == 1
    assert "\x1b" not in line
    assert len(line) < 1000


def test_links_out_of_the_folder_lead_to_no_change_outside(options, tmp_path):
    outside = tmp_path / "outside"
    outside.mkdir()
    theirs = outside / "model.safetensors"
    theirs.write_bytes(b"theirs")
    cache = Path(options.cache_dir)
    path = path_of(options, "video")
    path.unlink()
    path.symlink_to(theirs)
    assert len(tell(options)) == 1  # it is no part
    assert path.with_suffix(DAMAGED).is_symlink()
    path.with_suffix(DAMAGED).unlink()
    for file in (cache / "video").iterdir():
        file.rename(outside / file.name)
    (cache / "video").rmdir()
    (cache / "video").symlink_to(outside)  # as one whose disk is too small may do
    (outside / f"{'f' * 32}.safetensors").write_bytes(b"an older part")
    assert prune_cache(cache).count == 1
    assert theirs.read_bytes() == b"theirs"
    assert len(list(outside.iterdir())) == 2


def test_meta_of_any_form(options):
    path = Path(options.cache_dir) / "meta.json"
    whole = json.loads(path.read_text())
    changed = [
        {**whole, name: value} for name in whole for value in (None, 5, "x", [], {}, {"a": [[]]}, 10**400, True)
    ]
    texts = [json.dumps(value) for value in changed if value != whole]
    texts += ["[" * 100_000, '{"a":' * 100_000, "{}", "null", '{"format": 1, "format": 1}', "\ufeff\ufeff", "NaN"]
    texts += [json.dumps({name: value for name, value in whole.items() if name != left}) for left in whole]
    for text in texts:
        path.write_text(text)
        told = tell(options)
        assert len(told) == 1, text[:200]
        assert len(told[0].splitlines()) == 1
        assert "run `refalign cache" in told[0]


def test_any_bytes_in_any_list(options):
    generator = random.Random(0)
    for _ in range(60):
        path = Path(options.cache_dir) / generator.choice(LISTS)
        whole = path.read_bytes()
        content = bytearray(whole)
        for _ in range(generator.randrange(1, 4)):
            content[generator.randrange(len(content))] = generator.randrange(256)
        path.write_bytes(bytes(content))
        told = tell(options)
        assert len(told) == (bytes(content) != whole) or path.name == "meta.json"  # there, spaces mean nothing
        assert all(len(line.splitlines()) == 1 for line in told)
        path.write_bytes(whole)
    rmtree(options.cache_dir)
    assert len(tell(options)) == 1
