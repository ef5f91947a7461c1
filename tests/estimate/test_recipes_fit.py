"""The recipes for a small GPU: the figures in their comments are what is estimated."""

import re

import pytest

from refalign_adapter.estimate.memory import training_memory
from refalign_adapter.estimate.setting import Asked, read_setting
from refalign_adapter.recipes.file import load_recipe
from refalign_adapter.recipes.shipped import recipe_path


@pytest.mark.parametrize(
    ("size", "model"),
    [
        ("1.3b", "wan2.1-t2v-1.3b"),
        ("5b", "wan2.2-ti2v-5b"),
        pytest.param("14b", "wan2.1-t2v-14b", marks=pytest.mark.slow),
    ],
)
def test_a_recipe_for_24_gb_takes_what_it_says(wan, size, model):
    path = recipe_path(f"{model}/stage1-24gb")
    told = re.search(r"training takes ([\d.]+) GB", path.read_text())
    assert told is not None
    here = [f"pretrained_model_name_or_path={wan / size}", f"adapter.teachers=[{wan / 'teacher'}]"]
    estimated = training_memory(read_setting(load_recipe(path, here), Asked(processes=1))).gpu.total
    assert float(told[1]) == pytest.approx(estimated / 1e9, abs=0.06)
    assert estimated < 24e9
