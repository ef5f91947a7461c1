"""What is written is there whole or not at all."""

import errno
import os
import signal
import subprocess
import sys
import textwrap

import pytest

from refalign_adapter import atomic
from refalign_adapter.atomic import atomic_file, atomic_folder
from refalign_adapter.errors import UserError, WriteError
from refalign_adapter.exchange import exchange


def names(folder):
    return sorted(path.name for path in folder.iterdir())


def write_half(writer, name, error):
    with writer as temporary:
        (temporary / name).write_text("half")
        raise error


def test_file_appears_when_the_block_ends(tmp_path):
    target = tmp_path / "new" / "clip.mp4"
    with atomic_file(target) as temporary:
        assert temporary.parent == target.parent
        assert temporary.suffix == ".mp4"
        temporary.write_bytes(b"frames")
        assert not target.exists()
    assert target.read_bytes() == b"frames"
    assert names(target.parent) == ["clip.mp4"]


@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt])
def test_file_is_untouched_when_the_block_fails(tmp_path, error):
    target = tmp_path / "config.json"
    target.write_text("old")
    with pytest.raises(error):
        write_half(atomic_file(target), "", error)
    assert target.read_text() == "old"
    assert names(tmp_path) == ["config.json"]


def test_folder_appears_when_the_block_ends(tmp_path):
    target = tmp_path / "runs" / "adapter"
    with atomic_folder(target) as temporary:
        (temporary / "weights").write_text("new")
        assert not target.exists()
    assert names(target) == ["weights"]
    assert names(target.parent) == ["adapter"]


def test_folder_replaces_its_own_files_and_keeps_the_users(tmp_path):
    target = tmp_path / "adapter"
    (target / "notes").mkdir(parents=True)
    (target / "notes" / "mine.txt").write_text("mine")
    (target / "weights").write_text("old")
    with atomic_folder(target) as temporary:
        assert names(temporary) == []
        (temporary / "weights").write_text("new")
        assert (target / "weights").read_text() == "old"
    assert names(target) == ["notes", "weights"]
    assert (target / "weights").read_text() == "new"
    assert (target / "notes" / "mine.txt").read_text() == "mine"
    assert names(tmp_path) == ["adapter"]


def test_folder_behind_a_link_is_replaced_in_its_place(tmp_path):
    (tmp_path / "real").mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "real")
    with atomic_folder(tmp_path / "link") as temporary:
        (temporary / "weights").write_text("new")
    assert (tmp_path / "link").is_symlink()
    assert (tmp_path / "real" / "weights").read_text() == "new"


@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt])
def test_folder_is_untouched_when_the_block_fails(tmp_path, error):
    target = tmp_path / "adapter"
    target.mkdir()
    (target / "weights").write_text("old")
    with pytest.raises(error):
        write_half(atomic_folder(target), "weights", error)
    assert (target / "weights").read_text() == "old"
    assert names(tmp_path) == ["adapter"]


def test_folder_comes_back_when_the_swap_fails(tmp_path, monkeypatch):
    target = tmp_path / "adapter"
    target.mkdir()
    (target / "weights").write_text("old")
    replace = os.replace

    def fail_on_new(source, destination):
        if str(source).endswith(".tmp"):
            raise OSError(errno.ENOSPC, "")
        replace(source, destination)

    monkeypatch.setattr(os, "replace", fail_on_new)
    monkeypatch.setattr(atomic, "exchange", lambda *_: False)  # a file system that cannot
    with pytest.raises(WriteError, match="No space left on device"), atomic_folder(target) as temporary:
        (temporary / "weights").write_text("new")
    assert (target / "weights").read_text() == "old"
    assert names(tmp_path) == ["adapter"]


def test_folder_refuses_a_file_in_its_place(tmp_path):
    (tmp_path / "adapter").write_text("mine")
    with pytest.raises(UserError, match="is a file; choose a folder"), atomic_folder(tmp_path / "adapter"):
        pass
    assert (tmp_path / "adapter").read_text() == "mine"
    assert names(tmp_path) == ["adapter"]


@pytest.mark.parametrize("writer", ["atomic_file", "atomic_folder"])
def test_killed_writer_leaves_the_old_version(tmp_path, writer):
    target = tmp_path / "target"
    content = target if writer == "atomic_file" else target / "weights"
    content.parent.mkdir(exist_ok=True)
    content.write_text("old")
    code = f"""
        import os, signal, sys
        from refalign_adapter.atomic import {writer}
        with {writer}(sys.argv[1]) as temporary:
            (temporary if {writer == "atomic_file"} else temporary / "weights").write_text("half")
            os.kill(os.getpid(), signal.SIGKILL)
    """
    result = subprocess.run([sys.executable, "-c", textwrap.dedent(code), str(target)], check=False)
    assert result.returncode == -signal.SIGKILL
    assert content.read_text() == "old"


@pytest.mark.parametrize("can_exchange", [True, False])
def test_a_folder_that_is_replaced_keeps_the_users_files_and_links(tmp_path, monkeypatch, can_exchange):
    if not can_exchange:
        monkeypatch.setattr(atomic, "exchange", lambda *_: False)
    target = tmp_path / "adapter"
    (target / "notes" / "deep").mkdir(parents=True)
    (target / "notes" / "deep" / "mine.txt").write_text("mine")
    (target / "link").symlink_to("notes")
    (target / "weights").write_text("old")
    with atomic_folder(target) as temporary:
        (temporary / "weights").write_text("new")
    assert (target / "weights").read_text() == "new"
    assert (target / "link" / "deep" / "mine.txt").read_text() == "mine"
    assert (target / "link").is_symlink()
    assert names(tmp_path) == ["adapter"]


def test_two_folders_change_places(tmp_path):
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
        (tmp_path / name / name).touch()
    if not exchange(tmp_path / "a", tmp_path / "b"):
        pytest.skip("this file system exchanges no paths")
    assert (names(tmp_path / "a"), names(tmp_path / "b")) == (["b"], ["a"])
    assert not exchange(tmp_path / "a", tmp_path / "absent")
    assert names(tmp_path) == ["a", "b"]


@pytest.mark.parametrize("umask", [0o022, 0o077, 0o002])
def test_files_get_the_mode_of_the_umask_whatever_their_writer_chose(tmp_path, umask):
    before = os.umask(umask)
    try:
        with atomic_file(tmp_path / "a") as temporary:
            temporary.unlink()
            os.close(os.open(temporary, os.O_CREAT | os.O_WRONLY, 0o600))
        with atomic_folder(tmp_path / "folder") as temporary:
            (temporary / "below").mkdir()
            os.close(os.open(temporary / "below" / "b", os.O_CREAT | os.O_WRONLY, 0o600))
    finally:
        os.umask(before)
    modes = [(tmp_path / name).stat().st_mode & 0o777 for name in ("a", "folder/below/b")]
    assert modes == [0o666 & ~umask] * 2
    assert (tmp_path / "folder").stat().st_mode & 0o777 == 0o777 & ~umask


ENDINGS = [
    (errno.ENOSPC, "No space left on device", "free some space"),
    (errno.EDQUOT, "Disk quota exceeded", "free some of your quota"),
    (errno.EROFS, "Read-only file system", "choose a folder that is not read-only"),
    (errno.ENOENT, "No such file or directory", "its folder is gone; make it again or choose another"),
    (errno.EIO, "Input/output error", "look after that disk"),
]


@pytest.mark.parametrize(("number", "reason", "advice"), ENDINGS)
def test_a_write_that_fails_is_one_line(tmp_path, number, reason, advice):
    from safetensors import SafetensorError

    for error in (OSError(number, ""), SafetensorError(f"Error while serializing: I/O error (os error {number})")):
        for writer, name in ((atomic_file, ""), (atomic_folder, "weights")):
            with pytest.raises(WriteError) as told:
                write_half(writer(tmp_path / "target"), name, error)
            assert str(told.value) == f"cannot write {str(tmp_path / 'target')!r} ({reason}); {advice}"
            assert names(tmp_path) == []
