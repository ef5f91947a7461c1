"""The world's base and adapter by name."""

import numpy as np
import torch
from diffusers import WanPipeline

import refalign_adapter as ra
from refalign_adapter.world.portraits import draw_reference
from refalign_adapter.world.shipped import adapter_named, base_named
from refalign_adapter.world.subjects import Subject


def test_other_names_stay_as_they_are():
    for name in ("./demo", "Wan-AI/Wan2.1-T2V-1.3B-Diffusers", "demo/"):
        assert base_named(name) == adapter_named(name) == name


def test_the_base_is_unpacked_once_and_takes_the_shipped_adapter(tmp_path, monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HOME", str(tmp_path))
    folder = ra.demo_base()
    assert str(folder) == base_named("demo")
    assert folder.is_relative_to(tmp_path)
    before = {path: path.stat().st_mtime_ns for path in folder.rglob("*")}
    assert ra.demo_base() == folder
    assert {path: path.stat().st_mtime_ns for path in folder.rglob("*")} == before

    pipe = ra.load_adapter(WanPipeline.from_pretrained(folder), adapter_named("demo"))
    pipe.set_progress_bar_config(disable=True)
    image = draw_reference(Subject("cat", 7), np.random.default_rng(0), 64, 64).image
    arguments = {"height": 64, "width": 64, "num_frames": 9, "num_inference_steps": 2, "max_sequence_length": 32}
    videos = [
        pipe(
            "a cat sways, in a meadow",
            reference_images=references,
            generator=torch.Generator().manual_seed(0),
            **arguments,
        ).frames[0]
        for references in ([image], None)
    ]
    assert np.isfinite(videos).all()
    assert np.abs(videos[0] - videos[1]).mean() > 0.01
