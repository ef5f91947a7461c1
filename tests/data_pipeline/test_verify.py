"""`--verify` finds every kind of damage, the next run mends exactly that; `--prune` deletes exactly the outdated."""

import os
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from refalign_adapter.data.cache.index import read_index
from refalign_adapter.data.cache.lock import deleting, filling
from refalign_adapter.data.cache.parts import Expected, PartStore
from refalign_adapter.data.cache.verify import prune_cache, verify_cache
from refalign_adapter.errors import ConfigError, UserError


@pytest.fixture
def copied(cached, tmp_path):
    """Options of a copy of the cache."""
    shutil.copytree(cached[0].cache_dir, tmp_path / "cache")
    return replace(cached[0], cache_dir=str(tmp_path / "cache"))


def flip(path):
    """One bit of the tensor's last byte."""
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(data)


def rewrite(change):
    """A writer of a part without checksum, its tensor changed."""
    return lambda path: save_file({"data": change(load_file(path)["data"])}, path)


DAMAGES = {
    "missing": (Path.unlink, "is missing"),
    "cut": (lambda path: os.truncate(path, path.stat().st_size - 1), "cannot be read"),
    "empty": (lambda path: path.write_bytes(b""), "cannot be read"),
    "bit": (flip, "is not what was written: its checksum differs"),
    "type": (rewrite(torch.Tensor.half), "holds torch.float16, expected torch.bfloat16"),
    "shape": (rewrite(lambda data: data[:, :1].contiguous()), "is 16 × 1 × 4 × 6, expected 16 × 2 × 4 × 6"),
    "dimensions": (rewrite(lambda data: data.flatten()), "is 768, expected 16 × 2 × 4 × 6"),
    "infinite": (
        rewrite(lambda data: data.masked_fill(data == data.max(), float("inf"))),
        "holds 1 values that are no finite numbers",
    ),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_damage_is_told_and_the_next_run_mends_exactly_that(copied, encoders, build_options, damage):
    change, message = DAMAGES[damage]
    key = read_index(copied.cache_dir, "train")[2].parts.video
    path = PartStore(copied.cache_dir).path("video", key)
    whole = path.read_bytes()
    change(path)
    with pytest.raises(ConfigError) as caught:
        verify_cache(copied)
    line, summary = caught.value.problems
    assert line.startswith(f"train line 3 (clips/2.mp4): {str(path)!r} {message}")
    assert summary.startswith("1 of 17 parts are missing or damaged; run `refalign cache --config …`, which makes")
    assert not path.exists()
    assert dict(build_options(copied, encoders).made) == {"video": 1}
    assert path.read_bytes() == whole
    assert verify_cache(copied).count == 17


def test_every_kind_of_part_is_checked_and_all_problems_are_told(copied):
    done = []
    files = verify_cache(copied, lambda *state: done.append(state))
    assert done == [(number, 17) for number in range(1, 18)]
    assert files.bytes == sum(path.stat().st_size for path in Path(copied.cache_dir).rglob("*.safetensors"))
    store, first = PartStore(copied.cache_dir), read_index(copied.cache_dir, "train")[0]
    for file in first.parts.files():
        flip(store.path(*file))
    with pytest.raises(ConfigError) as caught:
        verify_cache(copied)
    assert len(caught.value.problems) == 5
    assert all("train line 1 (clips/0.mp4)" in line for line in caught.value.problems[:4])
    assert all(
        part in line for part, line in zip(("video", "references", "text"), caught.value.problems, strict=False)
    )


def test_a_part_that_rows_share_is_told_once(copied, encoders, build_options, tmp_path):
    data = shutil.copytree(Path(copied.train_data).parent, tmp_path / "data")
    manifest = data / "metadata.jsonl"
    manifest.write_text(manifest.read_text() + manifest.read_text().splitlines()[0].replace("thing 0", "other") + "\n")
    copied = replace(copied, train_data=str(manifest))
    build_options(copied, encoders)
    store, entries = PartStore(copied.cache_dir), read_index(copied.cache_dir, "train")
    assert entries[0].parts.video == entries[4].parts.video
    store.path("video", entries[0].parts.video).unlink()
    with pytest.raises(ConfigError) as caught:
        verify_cache(copied)
    assert len(caught.value.problems) == 2
    assert caught.value.problems[0].startswith("train line 1 (clips/0.mp4) and 1 more: ")


def test_tokens_are_checked_and_parts_without_checksum_are_read(copied, encoders, build_options):
    copied = replace(copied, drop_background=True)
    build_options(copied, encoders)
    store, entries = PartStore(copied.cache_dir), read_index(copied.cache_dir, "train")
    for part, key in entries[0].parts.files():
        rewrite(lambda data: data)(store.path(part, key))  # as they were before there were checksums
    assert verify_cache(copied).count == 21
    rewrite(lambda data: data.float())(store.path("tokens", entries[1].parts.tokens))
    with pytest.raises(ConfigError, match=r"train line 2 .*holds torch.float32, expected torch.bool"):
        verify_cache(copied)


def test_a_cache_of_other_settings_is_not_verified(copied):
    with pytest.raises(UserError, match="was made with height 32 instead of 64"):
        verify_cache(replace(copied, height=64))


@pytest.mark.parametrize(("dtype", "hint"), [(torch.float16, "set data.dtype=bf16"), (torch.float32, "no finite")])
def test_numbers_that_are_not_finite_are_never_written(tmp_path, dtype, hint):
    with pytest.raises(UserError, match=hint):
        PartStore(tmp_path).write("text", "a" * 32, torch.full((2, 2), torch.inf, dtype=dtype))
    assert PartStore(tmp_path).shape("text", "a" * 32) is None


def test_an_encoder_that_overflows_is_a_problem_of_its_row(copied, encoders, build_options, monkeypatch):
    encode = type(encoders.family).encode_video

    def overflowing(self, pipe, video):
        latents = encode(self, pipe, video)
        return latents * torch.inf if video[0, 0, 0, 0, 0] == marked else latents

    from refalign_adapter.media.video import read_video

    clip = Path(copied.train_data).parent / "clips/1.mp4"
    frames = read_video(clip, num_frames=5, height=32, width=48, fps=8)
    marked = torch.from_numpy(frames).permute(3, 0, 1, 2)[0, 0, 0, 0] / 127.5 - 1
    monkeypatch.setattr(type(encoders.family), "encode_video", overflowing)
    with pytest.raises(ConfigError) as caught:
        build_options(copied, encoders, cache_dir=copied.cache_dir + "2")
    (line,) = caught.value.problems
    assert line.endswith("line 2: cache: the encoder made values for video that are no finite numbers")


def test_pruning_deletes_what_no_index_names(copied, encoders, build_options):
    folder = Path(copied.cache_dir)
    before = {path for path in folder.rglob("*.safetensors")}
    assert prune_cache(folder).count == 0
    build_options(copied, encoders, num_frames=9)
    now = {path for path in folder.rglob("*.safetensors")} - before
    old = [folder / "video" / path.name for path in before if path.parent.name == "video"]
    size = sum(path.stat().st_size for path in old)
    key = read_index(folder, "train")[0].parts.video
    PartStore(folder).set_aside("video", key)
    pruned = prune_cache(folder)
    damaged = folder / "video" / f"{key}.safetensors"
    assert (pruned.count, pruned.bytes) == (5, size + next(iter(now - {damaged})).stat().st_size)
    assert {path for path in folder.rglob("*.*") if path.parent.name == "video"} == now - {damaged}
    assert dict(build_options(copied, encoders, num_frames=9).made) == {"video": 1}
    assert verify_cache(replace(copied, num_frames=9)).count == 17


def test_an_unfinished_cache_or_one_in_use_is_not_pruned(copied, tmp_path):
    files = len(list(Path(copied.cache_dir).rglob("*.safetensors")))
    with filling(copied.cache_dir), filling(copied.cache_dir), pytest.raises(UserError, match="in use by a run"):
        prune_cache(copied.cache_dir)
    with deleting(copied.cache_dir):
        pass
    Path(copied.cache_dir, "meta.json").unlink()
    with pytest.raises(UserError, match="there is no finished cache"):
        prune_cache(copied.cache_dir)
    assert len(list(Path(copied.cache_dir).rglob("*.safetensors"))) == files


def test_expected_shapes_take_any_length_where_none_is_given():
    tensor = torch.zeros(3, 4)
    assert Expected((None, 4), torch.float32).problem(tensor) is None
    assert Expected((None, 5), torch.float32).problem(tensor) == "is 3 × 4, expected any × 5"
    assert "expected any" in Expected((None, 4), torch.float32).problem(tensor[:0])
