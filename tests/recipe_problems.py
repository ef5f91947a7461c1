"""What is wrong with a recipe."""

import pytest

from refalign_adapter.errors import ConfigError
from refalign_adapter.recipes.file import load_recipe


def problems(path, *overrides, **options):
    """The lines that refuse a recipe with these overrides."""
    with pytest.raises(ConfigError) as caught:
        load_recipe(path, overrides, **options)
    return caught.value.problems
