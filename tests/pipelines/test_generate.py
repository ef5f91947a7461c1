"""`refalign generate` below its command line: one video, many, resumed, shared out, and what is told beforehand."""

import hashlib
import io
import json
import os
import re
import subprocess
import sys

import numpy as np
import pytest
import torch
from tiny_adapter import SIZE, picture, save_tiny_adapter
from tiny_models import save_tiny_pipeline

import refalign_adapter as ra
from refalign_adapter.commands import app as cli
from refalign_adapter.generation import generate, options
from refalign_adapter.generation.generate import OPTIONS_NAME, generate_many, generate_one, seed_of
from refalign_adapter.generation.options import GenerateOptions, check_models, load_pipeline
from refalign_adapter.media.video import read_video

SMALL = {**SIZE, "num_inference_steps": 1, "fps": 8, "device": "cpu"}


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    return save_tiny_pipeline(tmp_path_factory.mktemp("base"))


@pytest.fixture
def given(base, adapter):
    return GenerateOptions(str(base), str(adapter), **SMALL)


@pytest.fixture
def no_models(monkeypatch):
    """Loading weights fails the test."""

    def load(*_):
        pytest.fail("models were loaded")

    monkeypatch.setattr(generate, "load_pipeline", load)


@pytest.fixture
def prompts(tmp_path):
    for seed in range(2):
        picture(seed).save(tmp_path / f"{seed}.png")
    rows = [
        {"key": f"video_{index}", "prompt": f"subject {index}", "references": ["0.png", "1.png"][: index % 2 + 1]}
        for index in range(3)
    ]
    path = tmp_path / "prompts.jsonl"
    path.write_text("\n".join(map(json.dumps, rows)))
    return path


def change(given, **changes):
    return GenerateOptions(**vars(given) | changes)


@pytest.fixture
def made(monkeypatch):
    """What is written, before compression: file name -> its frames, latest last."""
    frames, write = {}, generate.write_video

    def record(path, array, fps):
        frames.setdefault(path.name, []).append(array)
        write(path, array, fps)

    monkeypatch.setattr(generate, "write_video", record)
    return frames


def test_one_video(given, made, tmp_path):
    image, output = tmp_path / "a.png", tmp_path / "new" / "out.mp4"
    picture().save(image)
    assert generate_one(given, "a cat", [str(image)], output) == output
    generate_one(given, "a cat", [image], output)
    generate_one(change(given, seed=1), "a cat", [image], output)
    first, again, other = made["out.mp4"]
    assert np.array_equal(first, again)
    assert np.abs(first - other).max() > 1e-3
    assert np.abs(read_video(output, **SIZE) / 255 - other).mean() < 0.05
    assert [item.name for item in output.parent.iterdir()] == ["out.mp4"]


@pytest.mark.parametrize(("terminal", "shown"), [(False, True), (True, False), (True, True)])
def test_one_bar_for_a_batch_of_videos_on_a_terminal_alone(given, prompts, tmp_path, monkeypatch, terminal, shown):
    told = io.StringIO()
    told.isatty = lambda: terminal
    monkeypatch.setattr(sys, "stderr", told)
    generate_many(change(given, num_inference_steps=2), prompts, tmp_path / "out", show_bar=shown)
    if not (terminal and shown):
        assert told.getvalue() == ""
        return
    assert set(re.findall(r"(\d+)/(\d+) \[", told.getvalue())) <= {(str(step), "6") for step in range(7)}
    assert re.search(r"video_2: 100%.* 6/6 \[", told.getvalue())
    assert told.getvalue().count("\n") == 1


def test_many_resumed_and_alone_are_the_same(given, prompts, made, tmp_path):
    told = []
    paths = generate_many(given, prompts, tmp_path / "out", told.append)
    assert [path.name for path in paths] == ["video_0.mp4", "video_1.mp4", "video_2.mp4"]
    assert told[0] == "0 of 3 videos exist, 3 to generate here"
    assert told[1:] == [f"{number}/3 {path}" for number, path in enumerate(paths, 1)]
    assert len({frames[0].tobytes() for frames in made.values()}) == 3

    paths[1].unlink()
    kept = [paths[0].read_bytes(), paths[2].read_bytes()]
    assert generate_many(given, prompts, tmp_path / "out") == [paths[1]]
    assert [paths[0].read_bytes(), paths[2].read_bytes()] == kept
    first, again = made["video_1.mp4"]
    assert np.array_equal(first, again)


def test_a_finished_folder_loads_no_models(given, prompts, tmp_path, no_models):
    for index in range(3):
        (tmp_path / f"video_{index}.mp4").touch()
    (tmp_path / OPTIONS_NAME).write_text(json.dumps(generate._describe(given)))
    told = []
    assert generate_many(given, prompts, tmp_path, told.append) == []
    assert told == ["3 of 3 videos exist, 0 to generate here"]


def test_a_folder_made_with_something_else_is_refused(given, prompts, tmp_path, no_models):
    (tmp_path / "video_0.mp4").touch()
    with pytest.raises(ra.UserError, match="holds other videos of these keys; choose another folder"):
        generate_many(given, prompts, tmp_path)
    (tmp_path / OPTIONS_NAME).write_text(json.dumps(generate._describe(given)))
    with pytest.raises(ra.UserError, match="holds videos made with seed 0, now 3; choose another folder"):
        generate_many(change(given, seed=3), prompts, tmp_path)
    retrained = save_tiny_adapter(tmp_path / "retrained", lora_alpha=2)
    with pytest.raises(ra.UserError, match="made with adapter .*; adapter_sha256 "):
        generate_many(change(given, adapter=str(retrained)), prompts, tmp_path)


def test_the_way_guidance_is_run(given, made, tmp_path):
    image = tmp_path / "a.png"
    picture().save(image)
    part = {"guidance_interval": (0.0, 0.5)}
    for changes in [{}, {"batch_guidance": True}, part, part, {"guidance_refresh": 3}]:
        generate_one(change(given, num_inference_steps=3, **changes), "a cat", [image], tmp_path / "out.mp4")
    plain, batched, within, again, refreshed = made["out.mp4"]
    np.testing.assert_allclose(batched, plain, atol=1e-5)
    assert np.abs(within - plain).max() > 1e-3
    assert np.array_equal(within, again)
    assert np.abs(refreshed - plain).max() > 1e-4


def test_the_command_line_hands_guidance_on(monkeypatch):
    seen = []
    monkeypatch.setattr(generate, "generate_one", lambda options, *_, show_bar: seen.append(options))
    command = [
        "generate",
        "--base",
        "b",
        "--adapter",
        "a",
        "--output",
        "o.mp4",
        "--prompt",
        "x",
        "--reference",
        "r.png",
    ]
    for more in ([], ["--guidance-interval", "0.1", "0.6", "--batch-guidance", "--guidance-refresh", "3"]):
        with pytest.raises(SystemExit) as stopped:
            cli.main([*command, *more])
        assert not stopped.value.code
    found = [(options.guidance_interval, options.guidance_refresh, options.batch_guidance) for options in seen]
    assert found == [((0.0, 1.0), 1, False), ((0.1, 0.6), 3, True)]


def test_a_folder_is_resumed_with_the_same_guidance_only(given, prompts, tmp_path, no_models):
    for index in range(3):
        (tmp_path / f"video_{index}.mp4").touch()
    described = generate._describe(given)
    (tmp_path / OPTIONS_NAME).write_text(json.dumps(described))
    assert generate_many(change(given, guidance_interval=[0.0, 1.0], batch_guidance=True), prompts, tmp_path) == []
    with pytest.raises(ra.UserError, match=r"made with guidance_interval \[0.0, 1.0\], now \[0.2, 1.0\]"):
        generate_many(change(given, guidance_interval=(0.2, 1.0)), prompts, tmp_path)
    with pytest.raises(ra.UserError, match=r"made with guidance_refresh 1, now 2"):
        generate_many(change(given, guidance_refresh=2), prompts, tmp_path)
    del described["guidance_interval"], described["guidance_refresh"]
    (tmp_path / OPTIONS_NAME).write_text(json.dumps(described))
    assert generate_many(given, prompts, tmp_path) == []


def test_an_interrupted_run_leaves_whole_files_only(given, prompts, tmp_path, monkeypatch):
    write = generate.write_video

    def interrupted(path, *arguments, **options):
        if path.name == "video_1.mp4":
            raise KeyboardInterrupt
        write(path, *arguments, **options)

    monkeypatch.setattr(generate, "write_video", interrupted)
    with pytest.raises(KeyboardInterrupt):
        generate_many(given, prompts, tmp_path / "out")
    assert sorted(item.name for item in (tmp_path / "out").iterdir()) == [OPTIONS_NAME, "video_0.mp4"]
    monkeypatch.setattr(generate, "write_video", write)
    assert len(generate_many(given, prompts, tmp_path / "out")) == 2


SHARED = """\
import json, sys
import numpy as np
from accelerate import PartialState
from refalign_adapter.generation import generate
generate.write_video = lambda path, frames, fps: np.save(path.open("wb"), frames)
written = generate.generate_many(generate.GenerateOptions(**json.loads(sys.argv[1])), sys.argv[2], sys.argv[3])
print(PartialState().process_index, sorted(path.name for path in written), flush=True)
"""


@pytest.mark.slow
def test_two_processes_share_the_rows_and_make_the_same_videos(given, prompts, made, tmp_path):
    script = tmp_path / "run.py"
    script.write_text(SHARED)
    command = [sys.executable, "-m", "accelerate.commands.launch", "--multi_gpu", "--num_processes", "2"]
    environment = os.environ | {"ACCELERATE_USE_CPU": "true", "OMP_NUM_THREADS": str(torch.get_num_threads())}
    arguments = [str(script), json.dumps(vars(given)), str(prompts), str(tmp_path / "two")]
    done = subprocess.run([*command, *arguments], env=environment, capture_output=True, text=True, timeout=240)
    assert done.returncode == 0, done.stderr[-3000:]
    assert sorted(line for line in done.stdout.splitlines() if line[:2] in ("0 ", "1 ")) == [
        "0 ['video_0.mp4', 'video_2.mp4']",
        "1 ['video_1.mp4']",
    ]
    generate_many(given, prompts, tmp_path / "one")
    for name, (frames,) in made.items():
        np.testing.assert_allclose(np.load(tmp_path / "two" / name), frames, atol=1e-5)


def test_seeds_of_keys():
    assert seed_of(0, "a") == seed_of(0, "a")
    assert len({seed_of(seed, key) for seed in (0, 1) for key in "abc"}) == 6
    assert all(0 <= seed_of(7, str(key)) < 2**63 for key in range(1000))
    assert seed_of(3, "x") == int(hashlib.sha256(b"3:x").hexdigest()[:16], 16) // 2


def test_every_bad_option_is_told_at_once():
    with pytest.raises(ra.ConfigError) as caught:
        GenerateOptions(
            "b",
            "a",
            height=0,
            num_inference_steps=0,
            fps=0,
            seed=-1,
            dtype="int8",
            offload="all",
            guidance_scale=0,
            guidance_interval=(0.5, 0.2),
            guidance_refresh=0,
        )
    assert [problem.split()[0] for problem in caught.value.problems] == [
        "height",
        "num_inference_steps",
        "fps",
        "seed",
        "dtype",
        "offload",
        "guidance_scale",
        "guidance_interval",
        "guidance_refresh",
    ]


@pytest.mark.parametrize(
    ("prompt", "references", "output", "messages"),
    [
        ("a cat", [], "out.mp4", ["references must name at least one image"]),
        (
            " ",
            ["no.png"],
            "out.gif",
            ["references.0.: 'no.png' does not exist", "prompt must be", "output must be an .mp4"],
        ),
        ("a cat", ["{a}"], "{folder}.mp4", ["is a folder; name a file"]),
        ("a cat", ["{a}"], "{a}/out.mp4", ["output: cannot write to"]),
        ("a cat", ["{a}"] * 9, "out.mp4", ["9 images are too many, at most 8"]),
    ],
)
def test_bad_input_of_one_video_loads_no_models(given, tmp_path, no_models, prompt, references, output, messages):
    picture().save(tmp_path / "a.png")
    (tmp_path / "folder.mp4").mkdir()
    names = {"a": tmp_path / "a.png", "folder": tmp_path / "folder"}
    with pytest.raises(ra.UserError) as caught:
        generate_one(given, prompt, [name.format(**names) for name in references], output.format(**names))
    lines = str(caught.value).splitlines()
    assert len(lines) == len(messages)
    for line, message in zip(lines, messages, strict=True):
        assert re.search(message, line), line


def test_bad_prompt_file_or_folder_loads_no_models(given, prompts, tmp_path, no_models):
    with pytest.raises(ra.UserError, match="output: cannot write to"):
        generate_many(given, prompts, prompts / "below_a_file")
    prompts.write_text('{"key": "a"}')
    with pytest.raises(ra.ConfigError) as caught:
        generate_many(given, prompts, tmp_path / "out")
    assert len(caught.value.problems) == 2
    assert not (tmp_path / "out").exists()


def strange_base(folder, **changes):
    folder.mkdir()
    values = {"_class_name": "WanPipeline", "transformer": ["diffusers", "WanTransformer3DModel"]}
    (folder / "model_index.json").write_text(json.dumps(values | changes))
    return folder


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda folder: folder.mkdir(), "is no diffusers pipeline, it has no model_index.json"),
        (lambda folder: folder.write_text("x"), "is no diffusers pipeline, it has no"),
        (lambda folder: None, "base: folder .* does not exist"),
        (
            lambda folder: strange_base(folder, transformer=["diffusers", "FluxTransformer2DModel"]),
            "is no known DiT; supported",
        ),
        (lambda folder: strange_base(folder, transformer=None), "is no known DiT; supported"),
        (lambda folder: strange_base(folder, boundary_ratio=0.9), "two transformers"),
        (lambda folder: strange_base(folder), "config.json' does not exist"),
        (lambda folder: (strange_base(folder) / "model_index.json").write_text("{"), "is not readable JSON"),
    ],
)
def test_a_base_that_is_none_is_one_line(given, tmp_path, make, message):
    make(tmp_path / "base")
    with pytest.raises(ra.UserError, match=message) as caught:
        check_models(change(given, base=str(tmp_path / "base")))
    assert "\n" not in str(caught.value)


def test_an_adapter_of_another_base_is_told_without_loading_weights(given, tmp_path):
    base = save_tiny_pipeline(tmp_path / "wider", num_attention_heads=4)
    for weights in base.glob("*/*.safetensors"):
        weights.unlink()
    with pytest.raises(ra.UserError, match="made for another base.*: it has num_attention_heads 2, this one has 4"):
        load_pipeline(change(given, base=str(base)))
    with pytest.raises(ra.UserError, match="folder 'nowhere' does not exist"):
        load_pipeline(change(given, adapter="nowhere"))


def test_weights_that_are_missing_are_one_line(given, tmp_path):
    base = save_tiny_pipeline(tmp_path / "base")
    next((base / "transformer").glob("*.safetensors")).unlink()
    with pytest.raises(ra.UserError, match="the transformer of .* has no weights; take a base with") as caught:
        load_pipeline(change(given, base=str(base)))
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"device": "cuda:99"}, "device: 'cuda:99' cannot be used"),
        ({"device": "toaster"}, "device: 'toaster' cannot be used"),
        ({"offload": "model"}, "offload: 'model' needs a GPU"),
    ],
)
def test_devices_that_are_not_there(given, changes, message):
    with pytest.raises(ra.UserError, match=message):
        options.process_device(change(given, **changes))


def test_types_follow_the_device_and_the_vae_stays_in_float32(given):
    pipe = load_pipeline(change(given, dtype="bf16"))
    assert pipe.transformer.dtype == torch.bfloat16
    assert pipe.text_encoder.dtype == torch.bfloat16
    assert pipe.vae.dtype == torch.float32
    assert load_pipeline(given).transformer.dtype == torch.float32
