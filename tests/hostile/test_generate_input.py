"""What `refalign generate` is asked for: numbers, prompts and folders from anyone, one line each, no model loaded."""

import json
import os

import numpy as np
import pytest
from tiny_adapter import SIZE, picture, save_tiny_adapter
from tiny_models import save_tiny_pipeline

import refalign_adapter as ra
from refalign_adapter.generation import generate
from refalign_adapter.generation.generate import OPTIONS_NAME, generate_many
from refalign_adapter.generation.options import GenerateOptions, check_models, process_device
from refalign_adapter.generation.prompts import read_prompts, reference_problems

ROW = {"key": "a", "prompt": "a dog", "references": ["a.png"]}


@pytest.fixture(scope="module")
def given(tmp_path_factory):
    folder = tmp_path_factory.mktemp("models")
    base, adapter = save_tiny_pipeline(folder / "base"), save_tiny_adapter(folder / "adapter")
    return GenerateOptions(str(base), str(adapter), **SIZE, num_inference_steps=1, fps=8, device="cpu")


def change(given, **changes):
    return GenerateOptions(**vars(given) | changes)


NUMBERS = [
    ("num_inference_steps", 10**12), ("height", 10**9), ("width", -1), ("num_frames", 10**9 + 1), ("fps", 1e-9),
    ("fps", float("nan")), ("fps", float("inf")), ("seed", -1), ("seed", 2**64), ("guidance_scale", float("nan")),
    ("guidance_scale", float("inf")), ("image_guidance_scale", float("nan")), ("max_references", 10**9),
    ("guidance_interval", (float("nan"), 1.0)), ("guidance_refresh", 0), ("guidance_refresh", True),
]  # fmt: skip


@pytest.mark.parametrize(("field", "value"), NUMBERS)
def test_numbers_out_of_bounds(given, field, value):
    with pytest.raises(ra.ConfigError, match=f"^{field} must be ") as caught:
        change(given, **{field: value})
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("device", ["meta", "nonsense", "cuda:99"])
def test_a_device_that_holds_nothing(given, device):
    with pytest.raises(ra.UserError, match=f"^device: {device!r} cannot be used .*; take cpu or cuda"):
        process_device(change(given, device=device))


def test_a_size_that_cannot_be_cut_into_tokens_is_told_before_weights_are_loaded(given):
    with pytest.raises(ra.ConfigError) as caught:
        check_models(change(given, height=50, num_frames=6))
    assert [problem.split()[0] for problem in caught.value.problems] == ["num_frames", "height"]


TABLES = {
    "deep": b"[" * 200_000,
    "UTF-16": json.dumps(ROW).encode("utf-16"),
    "twice": b'{"key": "a", "key": "b", "prompt": "x", "references": ["a.png"]}',
    "surrogate": b'{"key": "a", "prompt": "\\ud800", "references": ["a.png"]}',
    "NaN": b'{"key": NaN, "prompt": "x", "references": ["a.png"]}',
    "long": json.dumps(ROW | {"references": ["a" * 300]}).encode(),
    "URL": json.dumps(ROW | {"references": ["https://example.org/a.png"]}).encode(),
    "true": json.dumps(ROW | {"prompt": True}).encode(),
    "number": json.dumps(ROW | {"references": [1]}).encode(),
    "key": json.dumps(ROW | {"key": "../a"}).encode(),
}


@pytest.mark.parametrize("case", TABLES)
def test_prompt_files_of_any_kind(tmp_path, case):
    picture().save(tmp_path / "a.png")
    (tmp_path / "prompts.jsonl").write_bytes(TABLES[case])
    with pytest.raises(ra.UserError, match="prompts") as caught:
        read_prompts(tmp_path / "prompts.jsonl", 8)
    assert "\n" not in str(caught.value)
    assert len(str(caught.value)) < 600


def test_a_pipe_is_no_prompt_file(tmp_path):
    os.mkfifo(tmp_path / "prompts.jsonl")
    with pytest.raises(ra.UserError, match="a pipe or device, not a file"):
        read_prompts(tmp_path / "prompts.jsonl", 8)


def test_home_is_expanded(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    picture().save(tmp_path / "a.png")
    assert reference_problems(["~/a.png"], tmp_path / "elsewhere", 8) == []
    assert len(reference_problems(["~nobody-of-this-name/a.png"], tmp_path, 8)) == 1


@pytest.fixture
def prompts(tmp_path):
    picture().save(tmp_path / "a.png")
    (tmp_path / "prompts.jsonl").write_text(json.dumps(ROW))
    return tmp_path / "prompts.jsonl"


@pytest.mark.parametrize("text", ["[]", "{", "[" * 200_000, "null"])
def test_a_damaged_options_file(given, prompts, tmp_path, text):
    (tmp_path / "a.mp4").touch()
    (tmp_path / OPTIONS_NAME).write_text(text)
    with pytest.raises(ra.UserError, match="delete (it|this file) and the videos beside it") as caught:
        generate_many(given, prompts, tmp_path)
    assert "\n" not in str(caught.value)
    assert (tmp_path / OPTIONS_NAME).read_text() == text


def test_the_options_file_tells_no_folders(given):
    assert str(os.path.dirname(given.base)) not in json.dumps(generate._describe(given))


def test_leftovers_go_and_a_video_that_is_not_finite_is_named(given, prompts, tmp_path, monkeypatch):
    out = tmp_path / "out"
    out.mkdir()
    (out / ".a.999999999.tmp.mp4").touch()
    frames = np.full((1, 5, 32, 48, 3), np.nan, np.float32)

    class Pipe:
        def __call__(self, *_, **__):
            return type("Made", (), {"frames": frames})

        def set_progress_bar_config(self, **_):
            pass

    monkeypatch.setattr(generate, "load_pipeline", lambda *_: Pipe())
    with pytest.raises(ra.UserError, match="^a: its video is not finite, and is not written") as caught:
        generate_many(given, prompts, out)
    assert "\n" not in str(caught.value)
    assert [path.name for path in out.iterdir()] == [OPTIONS_NAME]
