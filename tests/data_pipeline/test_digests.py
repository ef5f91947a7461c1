"""Files are hashed once; every kind of change is noticed; several processes may write the notes at once."""

import hashlib
import multiprocessing
import os
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import tiny_data

from refalign_adapter.data.cache import digests as module
from refalign_adapter.data.cache.digests import DIGESTS_NAME, FileDigests
from refalign_adapter.errors import UserError


@pytest.fixture
def hashed(monkeypatch):
    """Names of the files that were read whole; changes count as settled at once."""
    names, original = [], module.file_digest
    monkeypatch.setattr(module, "SETTLED", -1)
    monkeypatch.setattr(module, "file_digest", lambda path: names.append(Path(path).name) or original(path))
    return names


def write(path, content):
    path.write_bytes(content)
    return hashlib.sha256(content).hexdigest()


def test_a_file_is_hashed_once_over_all_runs(tmp_path, hashed):
    expected = write(tmp_path / "a", b"one")
    assert [FileDigests(tmp_path)(tmp_path / "a") for _ in range(3)] == [expected] * 3
    assert hashed == ["a"]
    FileDigests(tmp_path, rehash=True)(tmp_path / "a")
    assert hashed == ["a", "a"]


def same_size(path):
    path.write_bytes(b"two")


def same_size_and_time(path):
    before = path.stat()
    path.write_bytes(b"two")
    os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns))


def another_file_moved_there(path):
    other = path.with_name("other")
    shutil.copy2(path, other)
    before = path.stat()
    other.write_bytes(b"two")
    os.utime(other, ns=(before.st_atime_ns, before.st_mtime_ns))
    os.replace(other, path)


@pytest.mark.parametrize("change", [same_size, same_size_and_time, another_file_moved_there])
def test_a_changed_file_is_noticed(tmp_path, hashed, change):
    write(tmp_path / "a", b"one")
    FileDigests(tmp_path)(tmp_path / "a")
    change(tmp_path / "a")
    assert FileDigests(tmp_path)(tmp_path / "a") == hashlib.sha256(b"two").hexdigest()
    assert hashed == ["a", "a"]
    assert FileDigests(tmp_path)(tmp_path / "a") == hashlib.sha256(b"two").hexdigest()
    assert hashed == ["a", "a"]


def test_a_file_that_has_just_changed_is_not_remembered(tmp_path, hashed, monkeypatch):
    monkeypatch.setattr(module, "SETTLED", 10**12)
    write(tmp_path / "a", b"one")
    for _ in range(2):
        FileDigests(tmp_path)(tmp_path / "a")
    assert hashed == ["a", "a"]
    assert not (tmp_path / DIGESTS_NAME).exists()


def test_torn_and_foreign_lines_are_left_out(tmp_path, hashed):
    expected = write(tmp_path / "a", b"one")
    FileDigests(tmp_path)(tmp_path / "a")
    notes = tmp_path / DIGESTS_NAME
    line = notes.read_bytes()
    notes.write_bytes(b'{"a": 1}\n[1, 2]\n\xff\xfe\n' + line[:-30])
    digests = FileDigests(tmp_path)
    assert digests.known == {}
    digests.tidy()
    assert digests(tmp_path / "a") == expected
    assert notes.read_bytes() == line


def note(folder, number):
    module.SETTLED = -1
    digests = FileDigests(folder)
    for index in range(50):
        digests(folder / f"files/{number}_{index}")


def test_processes_write_their_notes_at_once(tmp_path):
    (tmp_path / "files").mkdir()
    for number in range(3):
        for index in range(50):
            write(tmp_path / f"files/{number}_{index}", f"{number} {index}".encode())
    processes = [multiprocessing.get_context("fork").Process(target=note, args=(tmp_path, n)) for n in range(3)]
    for process in processes:
        process.start()
    for process in processes:
        process.join()
    known = FileDigests(tmp_path).known
    assert {Path(name).name: digest for name, (_, digest) in known.items()} == {
        path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in (tmp_path / "files").iterdir()
    }


def test_a_missing_file_is_one_line(tmp_path):
    with pytest.raises(UserError, match=r"cannot read .*nothing.* \(No such file"):
        FileDigests(tmp_path)(tmp_path / "nothing")


@pytest.mark.parametrize("workers", [0, 2])
def test_a_second_run_reads_no_file_and_notices_the_one_that_changed(
    cached, encoders, build_options, tmp_path, hashed, workers
):
    shutil.copytree(Path(cached[0].train_data).parent, tmp_path / "data")
    places = {"cache_dir": str(tmp_path / "cache"), "train_data": str(tmp_path / "data/metadata.jsonl")}
    options = replace(cached[0], **places, num_workers=workers)
    build_options(options, encoders)
    names = [path.name for path in (tmp_path / "data").rglob("*.*") if path.suffix in (".mp4", ".png", ".jsonl")]
    noted = FileDigests(options.cache_dir).known
    assert sorted(Path(name).name for name in noted) == sorted(names)
    hashed.clear()
    assert not build_options(replace(options, num_workers=0), encoders).made
    assert hashed == []
    tiny_data.write_clip(tmp_path / "data/clips/2.mp4", seed=99)
    assert dict(build_options(replace(options, num_workers=0), encoders).made) == {"video": 1}
    assert hashed == ["2.mp4"]
