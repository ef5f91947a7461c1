"""A small data set, the encoders and a finished cache, made once per test file that asks for them."""

from dataclasses import replace

import pytest
import tiny_data
import tiny_models

from refalign_adapter.data.cache.build import build_cache
from refalign_adapter.data.cache.encoders import load_encoders
from refalign_adapter.data.cache.options import CacheOptions
from refalign_adapter.data.sources.manifest import load_manifest


@pytest.fixture(scope="module")
def options(tmp_path_factory):
    """Options of a cache of 4 rows (1, 2, 3, 1 references; rows 1 and 3 are regular pairs)."""
    folder = tmp_path_factory.mktemp("cached")
    return CacheOptions(
        base_model=str(tiny_models.save_tiny_pipeline(folder / "base")),
        cache_dir=str(folder / "cache"),
        train_data=str(tiny_data.write_data(folder / "data", 4)),
        height=32,
        width=48,
        num_frames=5,
        fps=8,
        max_references=3,
        reference_variants=2,
        max_sequence_length=24,
        teachers=(str(tiny_models.tiny_dinov2(folder / "teacher")),),
        text_encoder_dtype="fp32",
    )


@pytest.fixture(scope="module")
def encoders(options):
    """The encoders that the options name."""
    return load_encoders(options)


@pytest.fixture(scope="module")
def cached(options, encoders):
    """(options, report) of the finished cache; tests must not change it."""
    return options, build(options, encoders)


@pytest.fixture(scope="module")
def build_options():
    """`build` as a fixture."""
    return build


def build(options, encoders, **changes):
    """Build the cache of the options, changed, with encoders that are loaded already."""
    options = replace(options, **changes)
    rows = {split: load_manifest(path, max_references=None) for split, path in options.manifests.items()}
    return build_cache(options, rows, encoders)
