"""What files and folders are is told before they are used, and what the system refuses in one line."""

import os
import socket

import pytest

from refalign_adapter.errors import ConfigError, UserError
from refalign_adapter.files import require_regular, require_writable_folder, writing


def names(folder):
    return sorted(path.name for path in folder.iterdir())


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


def test_what_is_no_failed_write_stays_what_it_is(tmp_path):
    from safetensors import SafetensorError

    for error in (KeyError("a"), SafetensorError("header too large"), UserError("r must be 1"), MemoryError()):
        with pytest.raises(type(error)) as raised, writing(tmp_path):
            raise error
        assert raised.value is error


def test_what_is_no_file_is_told_before_it_is_opened(tmp_path):
    (tmp_path / "file").touch()
    (tmp_path / "link").symlink_to("file")
    require_regular(tmp_path / "file")
    require_regular(tmp_path / "link")
    os.mkfifo(tmp_path / "pipe")
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(str(tmp_path / "socket"))
        for name, kind in ((tmp_path / "pipe", "named pipe"), (tmp_path / "socket", "socket"), (tmp_path, "folder")):
            with pytest.raises(ValueError, match=f"a {kind}, not a file"):
                require_regular(name)
        with pytest.raises(ValueError, match="a device, not a file"):
            require_regular("/dev/zero")
    with pytest.raises(FileNotFoundError):
        require_regular(tmp_path / "absent")


def test_config_error_names_every_problem_with_its_source():
    problems = ["r must be at least 1, got 0", "attention must be 'joint', got 'both'"]
    assert str(ConfigError(problems)) == "\n".join(problems)
    error = ConfigError(problems, source="train.yaml")
    assert str(error) == f"train.yaml: {problems[0]}\ntrain.yaml: {problems[1]}"
    assert error.problems == problems
    assert error.source == "train.yaml"
    assert isinstance(error, UserError)
    assert issubclass(UserError, ValueError)
