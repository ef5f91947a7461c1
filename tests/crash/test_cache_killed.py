"""A cache that is filled by runs which are killed or asked to stop at any moment ends as one that nobody disturbed."""

import json
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import yaml
from listening import wait_until_it_listens
from tiny_data import write_data
from tiny_models import save_tiny_pipeline, tiny_dinov2

from refalign_adapter.data.cache.digests import DIGESTS_NAME
from refalign_adapter.data.cache.lock import LOCK_NAME
from refalign_adapter.data.cache.verify import verify_cache
from refalign_adapter.errors import ConfigError, UserError
from refalign_adapter.leftovers import remove_leftovers
from refalign_adapter.recipes.cache_options import options_of
from refalign_adapter.recipes.file import load_recipe

ROWS = 12


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    """A recipe with data, base and teacher, and the cache of an undisturbed run."""
    folder = tmp_path_factory.mktemp("world")
    save_tiny_pipeline(folder / "base")
    tiny_dinov2(folder / "teacher")
    write_data(folder / "data", ROWS)
    values = {
        "pretrained_model_name_or_path": str(folder / "base"),
        "output_dir": str(folder / "out"),
        "adapter": {"r": 4, "align_layers": 1, "teachers": [str(folder / "teacher")], "max_sequence_length": 16},
        "data": {
            "train_data": str(folder / "data"),
            "cache_dir": str(folder / "undisturbed"),
            "height": 32,
            "width": 48,
            "num_frames": 5,
            "fps": 8,
        },
    }
    (folder / "recipe.yaml").write_text(yaml.safe_dump(values))
    assert run(folder, folder / "undisturbed").wait() == 0
    return folder


def run(folder, cache, **options):
    command = [sys.executable, "-m", "refalign_adapter.cache", "--config", folder / "recipe.yaml"]
    return subprocess.Popen(
        [*map(str, command), f"data.cache_dir={cache}"],
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        **options,
    )


def content(cache):
    files = [path for path in Path(cache).rglob("*") if path.is_file() and path.name not in (DIGESTS_NAME, LOCK_NAME)]
    return {str(path.relative_to(cache)): path.read_bytes() for path in files}


def count_parts(cache):
    """Safe while the cache is written: unlike glob, walk passes over folders that have just gone."""
    return sum(name.endswith(".safetensors") for _, _, names in os.walk(cache) for name in names)


def disturb(world, cache, seed, turns):
    """Stop runs at random moments, then let one finish; returns how they ended."""
    generator = random.Random(seed)
    print("seed", seed)
    endings = []
    for number in (signal.SIGKILL, *generator.choices([signal.SIGTERM, signal.SIGHUP, signal.SIGUSR1], k=turns - 1)):
        process = run(world, cache)
        parts = generator.randrange(0, ROWS * 3)
        deadline = time.monotonic() + 60
        while process.poll() is None and time.monotonic() < deadline:
            if count_parts(cache) >= parts:
                time.sleep(generator.random() * 0.05)
                break
            time.sleep(0.002)
        if number != signal.SIGKILL:
            wait_until_it_listens(process)
        process.send_signal(number)
        _, errors = process.communicate(timeout=60)
        endings.append((number, process.returncode, errors))
    assert run(world, cache).wait(timeout=120) == 0
    return endings


def check(world, cache, endings):
    for number, code, errors in endings:
        if number == signal.SIGKILL:
            assert code in (-signal.SIGKILL, 0)
        elif code != 0:  # else it was done before
            assert code == 128 + number, errors
            assert errors.splitlines()[-1] == "interrupted; run the same command again to go on"
            assert "Traceback" not in errors
    assert content(cache) == content(world / "undisturbed")


@pytest.mark.slow
def test_killed_once_and_asked_to_stop_once(world, tmp_path):
    check(world, tmp_path / "cache", disturb(world, tmp_path / "cache", 1, 2))


@pytest.mark.slow
@pytest.mark.timeout(600)
@pytest.mark.parametrize("seed", range(2, 7))
def test_stopped_again_and_again(world, tmp_path, seed):
    check(world, tmp_path / "cache", disturb(world, tmp_path / "cache", seed, 4))


def test_a_torn_or_flipped_byte_in_any_file_of_a_cache_is_never_taken_for_whole(world, tmp_path):
    import shutil

    cache = tmp_path / "cache"
    shutil.copytree(world / "undisturbed", cache)
    options = options_of(load_recipe(world / "recipe.yaml", [f"data.cache_dir={cache}"]))
    generator = random.Random(0)
    files = sorted(path for path in cache.rglob("*.safetensors"))
    for path in [cache / "meta.json", cache / "index-train.jsonl", *generator.sample(files, 12)]:
        whole = path.read_bytes()
        place = len(whole) - 3 if path.suffix == ".safetensors" else whole.index(b'"') + 1
        flipped = whole[:place] + bytes([whole[place] ^ 1]) + whole[place + 1 :]
        for damaged in (flipped, whole[: len(whole) // 2], b""):
            path.write_bytes(damaged)
            with pytest.raises(UserError) as told:
                verify_cache(options)
            lines = told.value.problems if isinstance(told.value, ConfigError) else [str(told.value)]
            assert any(path.name in line or "cache_dir" in line for line in lines), lines
            path.write_bytes(whole)
            path.with_suffix(".damaged").unlink(missing_ok=True)
    assert verify_cache(options).count == len(files)
    remove_leftovers(cache)
    assert json.loads((cache / "meta.json").read_text())["format"] == 1
