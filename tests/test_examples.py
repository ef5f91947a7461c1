"""The examples, run as a user would: as scripts, on small real models."""

import base64
import importlib.util
import json
import os
import shutil
import subprocess
import sys
import threading
import urllib.error
import urllib.request
from http.server import HTTPServer
from pathlib import Path

import av
import pytest
from tiny_data import write_clip, write_reference
from tiny_models import save_tiny_pipeline, tiny_dinov2, tiny_pipeline, tiny_transformer

import refalign_adapter as ra

EXAMPLES = Path(__file__).parents[1] / "examples"


def load(name):
    specification = importlib.util.spec_from_file_location(name, EXAMPLES / f"{name}.py")
    module = importlib.util.module_from_spec(specification)
    specification.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def adapter(tmp_path_factory):
    folder = tmp_path_factory.mktemp("adapter")
    branch = ra.attach(
        tiny_transformer(), ra.RefAlignConfig(attention="joint", r=2, align_layers=2, max_sequence_length=16), seed=0
    )
    return branch.save_pretrained(folder / "adapter")


def frames_of(path):
    with av.open(str(path)) as video:
        return [(frame.height, frame.width) for frame in video.decode(video=0)]


def test_generate(adapter, tmp_path, monkeypatch, capsys):
    base = save_tiny_pipeline(tmp_path / "base")
    write_reference(tmp_path / "a.png")
    size = ["--height", "32", "--width", "48", "--num-frames", "5", "--steps", "1"]
    paths = ["--reference", tmp_path / "a.png", "--output", tmp_path / "out.mp4"]
    arguments = ["generate.py", "--base", base, "--adapter", adapter, "--prompt", "a dog", *size, *paths]
    monkeypatch.setattr(sys, "argv", list(map(str, arguments)))
    load("generate").main()
    assert frames_of(tmp_path / "out.mp4") == [(32, 48)] * 5


def test_serve(adapter, tmp_path):
    pipe = ra.load_adapter(tiny_pipeline(), adapter)
    server = HTTPServer(("127.0.0.1", 0), load("serve").make_handler(pipe, fps=8))
    threading.Thread(target=server.serve_forever, daemon=True).start()
    try:
        write_reference(tmp_path / "a.png")
        image = base64.b64encode((tmp_path / "a.png").read_bytes()).decode()
        request = {"prompt": "a dog", "references": [image], "height": 32, "width": 32, "num_frames": 5}
        address = f"http://127.0.0.1:{server.server_port}"
        body = json.dumps(request | {"num_inference_steps": 1}).encode()
        with urllib.request.urlopen(address, body) as response:
            (tmp_path / "out.mp4").write_bytes(response.read())
        assert frames_of(tmp_path / "out.mp4") == [(32, 32)] * 5
        with pytest.raises(urllib.error.HTTPError, match="400") as caught:
            urllib.request.urlopen(address, json.dumps(request | {"height": 33}).encode())
        assert "height must be a multiple of 16, got 33" in caught.value.read().decode()
        with pytest.raises(urllib.error.HTTPError, match="400") as caught:
            urllib.request.urlopen(address, json.dumps({"promt": "a dog"}).encode())
        assert "unknown fields ['promt']" in caught.value.read().decode()
    finally:
        server.shutdown()
        server.server_close()


def test_alignment_loss(capsys):
    load("alignment_loss").main()
    totals = [float(line.split("total ")[1].split()[0]) for line in capsys.readouterr().out.splitlines()]
    assert len(totals) == 5
    assert totals[-1] < totals[0] / 2


def own_clips(folder):
    for number in range(3):
        write_clip(folder / f"clip{number}.mp4", seed=number, frames=5)
        write_reference(folder / f"clip{number}_0-rex.png", seed=number)
        (folder / f"clip{number}.txt").write_text(f"a dog runs {number}\n")
    write_reference(folder / "clip0_1.png", seed=9)
    return folder


def test_train_on_folder_writes_a_manifest_or_tells_what_is_missing(tmp_path):
    module = load("train_on_folder")
    folder = own_clips(tmp_path)
    rows = [json.loads(line) for line in module.write_manifest(folder).read_text().splitlines()]
    assert [row["file_name"] for row in rows] == ["clip0.mp4", "clip1.mp4", "clip2.mp4"]
    assert [item["subject"] for item in rows[0]["references"]] == ["rex", "clip0_1"]
    assert rows[1]["caption"] == "a dog runs 1"
    (folder / "clip1.txt").unlink()
    (folder / "clip2_0-rex.png").unlink()
    with pytest.raises(SystemExit, match=r"clip1\.mp4 needs clip1\.txt[\s\S]*clip2\.mp4 needs"):
        module.write_manifest(folder)


def test_train_on_folder_reads_names_and_captions_as_they_come(tmp_path):
    """One clip's name may begin another's; cameras write .MP4; Windows' editors put a mark before the text."""
    module = load("train_on_folder")
    for name in ("dog.mp4", "dog_2.mp4", "C.MP4", "dog_0.png", "dog_2_0.png", "C_0.PNG", "cat_0.png"):
        (tmp_path / name).touch()
    for name in ("dog", "dog_2", "C"):
        (tmp_path / f"{name}.txt").write_text(f"this is {name}\n", encoding="utf-8-sig")
    rows = [json.loads(line) for line in module.write_manifest(tmp_path).read_text().splitlines()]
    assert {row["file_name"]: row["caption"] for row in rows} == {
        "C.MP4": "this is C",
        "dog.mp4": "this is dog",
        "dog_2.mp4": "this is dog_2",
    }
    assert [[item["image"] for item in row["references"]] for row in rows] == [
        ["C_0.PNG"],
        ["dog_0.png"],
        ["dog_2_0.png"],
    ]


@pytest.mark.slow
def test_train_on_folder_trains(tmp_path):
    folder = own_clips(tmp_path / "clips")
    changes = {
        "max_train_steps": 2,
        "train_batch_size": 1,
        "gradient_accumulation_steps": 1,
        "gradient_checkpointing": "false",
        "dataloader_num_workers": 0,
        "lr_warmup_steps": 0,
        "validation_steps": "null",
        "adapter.r": 2,
        "adapter.align_layers": 2,
        "adapter.max_sequence_length": 16,
        "adapter.teachers": f"[{tiny_dinov2(tmp_path / 'teacher')}]",
        "data.height": 32,
        "data.width": 32,
        "data.num_frames": 5,
        "data.fps": 8,
        "data.validation_rows": 0,
        "data.num_workers": 0,
    }
    base = save_tiny_pipeline(tmp_path / "base")
    named = ["--clips", folder, "--base", base, "--output", tmp_path / "out"]
    overrides = [f"{name}={value}" for name, value in changes.items()]
    command = [sys.executable, EXAMPLES / "train_on_folder.py", *named, "--", *overrides]
    environment = {**os.environ, "ACCELERATE_USE_CPU": "true"}
    result = subprocess.run(list(map(str, command)), capture_output=True, text=True, env=environment)
    assert result.returncode == 0, result.stderr
    adapter = tmp_path / "out" / "adapter"
    assert ra.RefAlignConfig.load(adapter).r == 2
    shutil.rmtree(tmp_path / "out" / "cache")
