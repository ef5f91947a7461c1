"""A terminal that was closed, or a reader such as `head` that has seen enough: work goes on and ends as it would."""

import json
import os
import pty
import subprocess
import sys
from contextlib import suppress

import pytest
import tiny_data
import yaml
from tiny_adapter import SIZE, picture, save_tiny_adapter
from tiny_models import save_tiny_pipeline

from refalign_adapter.data.cache.verify import verify_cache
from refalign_adapter.media.video import read_video
from refalign_adapter.recipes.cache_options import options_of
from refalign_adapter.recipes.file import load_recipe
from refalign_adapter.training.checkpoint_files import find_checkpoint

pytestmark = pytest.mark.slow  # real commands; `tests/test_signals.py` has the same in small
ENDS = {"terminal": pty.openpty, "pipe": os.pipe}


def left_alone(command, kind, after=0):
    """The exit code of a command whose standard streams lose their other end once `after` bytes are read from them.

    It has no terminal that could send SIGHUP: that of a session of its own is no controlling one.
    """
    ours, theirs = ENDS[kind]()
    environment = {**os.environ, "CUDA_VISIBLE_DEVICES": "", "TERM": "xterm"}
    process = subprocess.Popen(
        [sys.executable, "-m", *map(str, command)],
        env=environment,
        stdin=subprocess.DEVNULL,
        stdout=theirs,
        stderr=theirs,
        start_new_session=True,
    )
    os.close(theirs)
    seen = b""
    with suppress(OSError):
        while len(seen) < after and (more := os.read(ours, 1)):
            seen += more
    os.close(ours)
    try:
        return process.wait(timeout=120)
    finally:
        process.kill()


def train(world, out, *overrides):
    options = ["max_train_steps=2", "checkpointing_steps=1", "optimizer=adamw", "gradient_accumulation_steps=1"]
    options += ["validation_steps=1", *overrides]
    return ["refalign_adapter.train", "--config", world / "recipe.yaml", f"output_dir={out}", *options]


@pytest.mark.parametrize("kind", ENDS)
@pytest.mark.parametrize("after", [0, 200])
def test_training_goes_on(tiny_world, tmp_path, kind, after):
    assert left_alone(train(tiny_world, tmp_path / "out"), kind, after) == 0
    assert (tmp_path / "out/adapter/pytorch_lora_weights.safetensors").is_file()
    assert find_checkpoint(tmp_path / "out", "latest").name == "checkpoint-2"


@pytest.mark.parametrize("kind", ENDS)
def test_a_mistake_in_training_still_exits_with_2(tiny_world, tmp_path, kind):
    assert left_alone(train(tiny_world, tmp_path / "out", "data.height=64"), kind) == 2


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    folder = tmp_path_factory.mktemp("data")
    tiny_data.write_data(folder / "data", 3, height=32, width=48)
    values = {"cache_dir": "none", "train_data": str(folder / "data"), "height": 32, "width": 48, "num_frames": 5}
    recipe = {"pretrained_model_name_or_path": "nowhere/at-all", "output_dir": "out", "data": {**values, "fps": 8.0}}
    (folder / "recipe.yaml").write_text(yaml.safe_dump(recipe))
    return folder


@pytest.mark.parametrize("kind", ENDS)
@pytest.mark.parametrize("after", [0, 1])
def test_a_check_writes_its_report(data, tmp_path, kind, after):
    report = tmp_path / "report"
    command = ["refalign_adapter", "data", "check", "--config", data / "recipe.yaml", "--output", report]
    assert left_alone(command, kind, after) == 0
    assert (report / "index.html").is_file()


@pytest.mark.parametrize("kind", ENDS)
@pytest.mark.parametrize("after", [0, 1])
def test_a_cache_is_finished(tiny_world, tmp_path, kind, after):
    overrides = [f"data.cache_dir={tmp_path / 'cache'}"]
    command = ["refalign_adapter.cache", "--config", tiny_world / "recipe.yaml", *overrides]
    assert left_alone(command, kind, after) == 0
    assert verify_cache(options_of(load_recipe(tiny_world / "recipe.yaml", overrides))).count > 0


@pytest.mark.parametrize("kind", ENDS)
@pytest.mark.parametrize("after", [0, 60])
def test_all_videos_are_made(tmp_path, kind, after):
    picture().save(tmp_path / "a.png")
    rows = [{"key": f"v{index}", "prompt": f"dog {index}", "references": ["a.png"]} for index in range(2)]
    (tmp_path / "prompts.jsonl").write_text("\n".join(map(json.dumps, rows)))
    base, adapter = save_tiny_pipeline(tmp_path / "base"), save_tiny_adapter(tmp_path / "adapter")
    sizes = [f"--{name.replace('_', '-')}={value}" for name, value in SIZE.items()]
    command = [
        *("refalign_adapter", "generate", f"--base={base}", f"--adapter={adapter}", "--num-inference-steps=3"),
        *(f"--prompts={tmp_path / 'prompts.jsonl'}", f"--output={tmp_path / 'out'}", "--device=cpu", *sizes),
    ]
    assert left_alone(command, kind, after) == 0
    for index in range(2):
        assert read_video(tmp_path / f"out/v{index}.mp4", num_frames=5, height=32, width=48).shape[0] == 5
