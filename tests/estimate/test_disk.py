"""The size of a cache against a real one."""

import json

import pytest
from tiny_data import write_data

from refalign_adapter.data.cache.build import cache_dataset
from refalign_adapter.estimate.disk import HEADER, assumed_cache_size, cache_size, row_bytes

LONG = ["adapter.max_sequence_length=24", "data.fps=8"]
CASES = {
    "as it is": ["data.dtype=bf16"],
    "augmented variants": ["data.reference_variants=3", "data.dtype=fp16"],
    "economical": [
        "adapter.attention=isolated",
        "adapter.lora_scope=all",
        "adapter.reference_scale=0.5",
        "adapter.drop_background=true",
        "data.teacher_grid=native",
    ],
    "no teacher": ["alignment.weight=0"],
}


@pytest.fixture(scope="module")
def clips(tmp_path_factory):
    """Four rows with 1, 2, 3, 1 references and captions of more than 24 tokens."""
    manifest = write_data(tmp_path_factory.mktemp("clips"), 4)
    rows = [json.loads(line) for line in manifest.read_text().splitlines()]
    captions = [f"{index} is a long caption of many words" for index in range(len(rows))]
    text = "".join(json.dumps({**row, "caption": caption}) + "\n" for row, caption in zip(rows, captions, strict=True))
    manifest.write_text(text)
    return manifest


@pytest.mark.parametrize("case", CASES)
def test_the_size_is_that_of_a_real_cache(setting_of, clips, tmp_path, case):
    setting = setting_of(f"data.train_data={clips}", f"data.cache_dir={tmp_path}", *LONG, *CASES[case])
    size = cache_size(setting.options, setting.shapes, setting.found.all)
    report = cache_dataset(setting.options, device="cpu")
    assert size.rows == sum(report.rows.values()) == 4
    assert set(size.bytes_of) == set(report.bytes_of)
    for part, real in report.bytes_of.items():
        files = 4
        assert abs(size.bytes_of[part] - real) <= 16 * files, part  # a header's length depends on its digits
    assert size.total == pytest.approx(report.bytes, rel=0.01)
    assert size.per_row == size.total / 4


def test_wan_at_480p(wan_setting):
    """The recipe's own words: about 10 MB a row with two references, 4 MB video latents, 5 MB teacher features."""
    setting = wan_setting("1.3b")
    sizes = row_bytes(setting.options, setting.shapes, 2, 1)
    assert sizes["video"] == 16 * 21 * 60 * 104 * 2 + HEADER
    assert sizes["references"] == 2 * 16 * 60 * 104 * 2 + HEADER
    assert sizes["teacher"] == 2 * 30 * 52 * 768 * 2 + HEADER
    assert sizes["text"] == 512 * 4096 * 2 + HEADER
    assert "tokens" not in sizes


def test_rows_that_are_not_known_have_the_most_of_everything(setting_of):
    setting = setting_of("data.reference_variants=3", rows=10)
    one = assumed_cache_size(setting.options, setting.shapes, None)
    assert (one.rows, one.per_row) == (None, one.total)
    ten = assumed_cache_size(setting.options, setting.shapes, 10)
    assert ten.total == 10 * one.total
    assert one.bytes_of == row_bytes(setting.options, setting.shapes, 4, 3)
