import os
import signal
import subprocess
import sys
import textwrap

import pytest

from refalign_adapter.errors import ConfigError, UserError
from refalign_adapter.files import atomic_file, atomic_folder, read_json, require_writable_folder, write_json


def names(folder):
    return sorted(path.name for path in folder.iterdir())


def write_half(writer, name, error):
    with writer as temporary:
        (temporary / name).write_text("half")
        raise error


def test_writable_folder_is_created_with_its_parents_and_left_empty(tmp_path):
    folder = require_writable_folder(tmp_path / "a" / "b")
    assert folder == tmp_path / "a" / "b"
    assert names(folder) == []
    assert require_writable_folder(str(folder)) == folder


def test_unwritable_folder_is_one_clear_line(tmp_path):
    (tmp_path / "file").write_text("mine")
    for path in (tmp_path / "file", tmp_path / "file" / "below"):
        with pytest.raises(
            UserError, match=r"^output_dir: cannot write to .*file.* \(.+\); choose a writable folder$"
        ):
            require_writable_folder(path, "output_dir")
    assert (tmp_path / "file").read_text() == "mine"


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write anywhere")
def test_read_only_folder_is_refused(tmp_path):
    tmp_path.chmod(0o500)
    with pytest.raises(UserError, match="Permission denied"):
        require_writable_folder(tmp_path / "new")


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
            raise OSError("disk full")
        replace(source, destination)

    monkeypatch.setattr(os, "replace", fail_on_new)
    with pytest.raises(OSError, match="disk full"), atomic_folder(target) as temporary:
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
        from refalign_adapter.files import {writer}
        with {writer}(sys.argv[1]) as temporary:
            (temporary if {writer == "atomic_file"} else temporary / "weights").write_text("half")
            os.kill(os.getpid(), signal.SIGKILL)
    """
    result = subprocess.run([sys.executable, "-c", textwrap.dedent(code), str(target)], check=False)
    assert result.returncode == -signal.SIGKILL
    assert content.read_text() == "old"


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


def test_config_error_names_every_problem_with_its_source():
    problems = ["r must be at least 1, got 0", "attention must be 'joint', got 'both'"]
    assert str(ConfigError(problems)) == "\n".join(problems)
    error = ConfigError(problems, source="train.yaml")
    assert str(error) == f"train.yaml: {problems[0]}\ntrain.yaml: {problems[1]}"
    assert error.problems == problems
    assert error.source == "train.yaml"
    assert isinstance(error, UserError)
    assert issubclass(UserError, ValueError)
