"""One adapter folder for all tests here, and pipelines with it loaded."""

import pytest
from tiny_adapter import save_tiny_adapter
from tiny_models import tiny_pipeline

import refalign_adapter as ra


@pytest.fixture(scope="session")
def adapter(tmp_path_factory):
    """An adapter folder; not to be changed."""
    return save_tiny_adapter(tmp_path_factory.mktemp("adapter") / "folder")


@pytest.fixture
def fresh_pipe(adapter):
    """A reference pipeline of the test's own."""
    pipe = ra.load_adapter(tiny_pipeline(), adapter)
    pipe.set_progress_bar_config(disable=True)
    return pipe


@pytest.fixture(scope="module")
def pipe(adapter):
    """A reference pipeline for all tests of a file; to be left as it was."""
    pipe = ra.load_adapter(tiny_pipeline(), adapter)
    pipe.set_progress_bar_config(disable=True)
    return pipe
