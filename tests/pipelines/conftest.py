"""Adapter folders for all tests here, and pipelines with one loaded."""

import pytest
from tiny_adapter import save_tiny_adapter
from tiny_models import tiny_pipeline

import refalign_adapter as ra


def load(folder, **overrides):
    """A reference pipeline of its own without a progress bar."""
    pipe = ra.load_adapter(tiny_pipeline(**overrides), folder)
    pipe.set_progress_bar_config(disable=True)
    return pipe


@pytest.fixture(scope="session")
def adapter(tmp_path_factory):
    """A joint adapter's folder; not to be changed."""
    return save_tiny_adapter(tmp_path_factory.mktemp("adapter") / "folder")


@pytest.fixture(scope="session")
def isolated_adapters(tmp_path_factory):
    """Folders of isolated adapters by their LoRA's scope; not to be changed."""
    folder = tmp_path_factory.mktemp("isolated")
    scopes = ("reference", "all")
    return {scope: save_tiny_adapter(folder / scope, attention="isolated", lora_scope=scope) for scope in scopes}


@pytest.fixture
def fresh_pipe(adapter):
    """A joint reference pipeline of the test's own."""
    return load(adapter)


@pytest.fixture
def fresh_isolated(isolated_adapters):
    """An isolated one, reference scope, of the test's own."""
    return load(isolated_adapters["reference"])


@pytest.fixture(scope="module")
def pipe(adapter):
    """A joint reference pipeline for all tests of a file; to be left as it was."""
    return load(adapter)


@pytest.fixture(scope="module", params=["reference", "all"])
def isolated(request, isolated_adapters):
    """An isolated one of either scope for all tests of a file; to be left as it was."""
    return load(isolated_adapters[request.param])


@pytest.fixture(scope="module", params=["joint", "isolated"])
def either(request, adapter, isolated_adapters):
    """A joint one, or an isolated one of reference scope, for all tests of a file; to be left as it was."""
    return load(adapter if request.param == "joint" else isolated_adapters["reference"])
