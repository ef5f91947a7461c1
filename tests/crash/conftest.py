"""The tiny world that training's own tests have."""

import pytest
from tiny_world import make_world


@pytest.fixture(scope="session")
def tiny_world(tmp_path_factory):
    """A folder with `base`, `teacher`, `clips/metadata.jsonl`, `cache` and `recipe.yaml`."""
    return make_world(tmp_path_factory.mktemp("world"))
