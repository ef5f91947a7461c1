"""A disk that is full, for every writer: one line with the path, the old version whole, nothing half-written."""

import json
import os

import numpy as np
import pytest
import torch
from small_disk import fill, small_disk
from tiny_adapter import CONFIG
from tiny_models import tiny_transformer

import refalign_adapter as ra
from refalign_adapter.branch.reference_cache import ReferenceCache
from refalign_adapter.data.cache.entries import IndexEntry, RowParts
from refalign_adapter.data.cache.freshness import write_files
from refalign_adapter.data.cache.index import write_index
from refalign_adapter.data.cache.parts import PartStore
from refalign_adapter.errors import WriteError
from refalign_adapter.json_files import write_json
from refalign_adapter.media.video_file import write_video
from refalign_adapter.recipes.shipped import copy_recipe

NOISE = np.random.default_rng(0).integers(0, 256, (24, 96, 96, 3), np.uint8)
ENTRY = IndexEntry("a" * 32, "a.mp4", 1, RowParts("a" * 32, "b" * 32, "c" * 32, {}), (16, 2, 4, 6), 1, (0,))


def adapter(folder):
    branch = ra.attach(tiny_transformer(), ra.RefAlignConfig(**CONFIG), seed=0)
    branch.save_pretrained(folder / "adapter")


def reference_cache(folder):
    keys, values = (tuple(torch.zeros(1, 400, 2, 24) for _ in range(3)) for _ in range(2))
    ReferenceCache(keys, values, None, frames=2, adapter="a", adapter_name="a").save(folder / "refs.safetensors")


WRITERS = {
    "json": (lambda folder: write_json(folder / "a.json", ["x" * 100] * 1000), "a.json"),
    "a part of the cache": (
        lambda folder: PartStore(folder).write("video", "a" * 32, torch.zeros(100_000)),
        "video/" + "a" * 32 + ".safetensors",
    ),
    "an index": (lambda folder: write_index(folder, "train", [ENTRY] * 500), "index-train.jsonl"),
    "a list of files": (
        lambda folder: write_files(folder, "train", [("line 1", {"a" * 80: "b" * 64})] * 500),
        "files-train.jsonl",
    ),
    "a video": (lambda folder: write_video(folder / "a.mp4", NOISE, 8), "a.mp4"),
    "an adapter": (adapter, "adapter"),
    "cached references": (reference_cache, "refs.safetensors"),
    "a recipe": (lambda folder: copy_recipe("wan2.1-t2v-1.3b/stage1", folder / "r.yaml"), "r.yaml"),
}


def everything(folder):
    return {
        str(path.relative_to(folder)): path.read_bytes()
        for path in sorted(folder.rglob("*"))
        if path.is_file() and path.name != "ballast"
    }


@pytest.mark.parametrize("writer", WRITERS)
@pytest.mark.parametrize("before", [False, True], ids=["new", "over an old one"])
def test_a_full_disk_is_one_line_and_leaves_no_half(tmp_path, writer, before):
    if writer == "a recipe" and before:
        pytest.skip("copies are never written over")
    write, name = WRITERS[writer]
    with small_disk(tmp_path / "disk") as disk:
        if before:
            write(disk)
        else:
            (disk / name).parent.mkdir(parents=True, exist_ok=True)
        old = everything(disk)
        ballast = fill(disk)
        with pytest.raises(WriteError) as told:
            write(disk)
        line = str(told.value)
        assert str(disk) in line
        assert "(No space left on device); free some space" in line
        assert len(line.splitlines()) == 1
        assert everything(disk) == old
        ballast.unlink()
        write(disk)
        assert (disk / name).exists()


@pytest.mark.parametrize("writer", [name for name in WRITERS if name != "a recipe"])
def test_a_folder_that_disappears_is_one_line_or_made_again(tmp_path, writer, monkeypatch):
    """Its parent is a file now, as a mount that went away may leave it."""
    write, name = WRITERS[writer]
    (tmp_path / "gone").write_text("")
    with pytest.raises(WriteError, match="a file is in the way, choose another folder") as told:
        write(tmp_path / "gone" / "folder")
    assert len(str(told.value).splitlines()) == 1
    assert sorted(os.listdir(tmp_path)) == ["gone"]


def test_a_metrics_log_says_so_too(tmp_path):
    from accelerate import Accelerator

    from refalign_adapter.training.tracking import RunLog

    with small_disk(tmp_path / "disk") as disk:
        log = RunLog(Accelerator(cpu=True), disk, 0)
        log.write(1, {"train/loss": 1.0})
        fill(disk)

        def write_on():
            for step in range(2, 2000):
                log.write(step, {f"train/{'x' * 200}": 1.0})

        with pytest.raises(WriteError, match=r"metrics.jsonl' \(No space left on device\); free some space"):
            write_on()
        first = (disk / "metrics.jsonl").read_text().splitlines()[0]
        assert json.loads(first) == {"step": 1, "train/loss": 1.0}
