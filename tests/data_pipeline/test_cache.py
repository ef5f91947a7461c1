"""The cache: parts are what the encoders give, each is made when and only when it must, none is left half-written."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import tiny_data
import tiny_models
import torch
from safetensors.torch import load_file

from refalign_adapter.batch import EMBEDDING
from refalign_adapter.data.cache.build import build_cache, cache_dataset
from refalign_adapter.data.cache.digests import DIGESTS_NAME
from refalign_adapter.data.cache.encoders import Encoders, load_encoders
from refalign_adapter.data.cache.index import CHECKSUM, SUMS, read_index
from refalign_adapter.data.cache.lock import LOCK_NAME
from refalign_adapter.data.cache.parts import PartStore
from refalign_adapter.data.sources.manifest import load_manifest
from refalign_adapter.errors import ConfigError, UserError
from refalign_adapter.leftovers import HOST
from refalign_adapter.media.canvas import prepare_reference
from refalign_adapter.media.images import read_image, read_mask
from refalign_adapter.media.video import read_video

ALL = {"video": 4, "references": 4, "text": 5, "teacher": 4}  # the fifth text is the empty one


def copy_of(options, folder):
    """The options with cache and data copied into `folder`, so that a test may change them."""
    shutil.copytree(options.cache_dir, folder / "cache")
    shutil.copytree(Path(options.train_data).parent, folder / "data")
    return replace(options, cache_dir=str(folder / "cache"), train_data=str(folder / "data/metadata.jsonl"))


def contents(cache_dir):
    """All files of a cache but its lock and its notes on where the data set's files are: path -> bytes, or JSON."""
    files = [path for path in Path(cache_dir).rglob("*.*") if path.is_file() and path.name != DIGESTS_NAME]
    files = [path for path in files if path.name != LOCK_NAME and not path.name.startswith("files-")]
    found = {str(path.relative_to(cache_dir)): path.read_bytes() for path in files}
    if "meta.json" in found:
        meta = json.loads(found["meta.json"])
        found["meta.json"] = {name: value for name, value in meta.items() if name not in (SUMS, CHECKSUM)}
    return found


def test_parts_are_what_the_encoders_give(cached, encoders):
    options, report = cached
    assert report.rows == {"train": 4}
    assert dict(report.made) == ALL
    store, rows = PartStore(options.cache_dir), load_manifest(options.train_data)
    family, pipe, teacher = encoders.family, encoders.pipe, encoders.teachers[options.teachers[0]]
    for row, entry in zip(rows, read_index(options.cache_dir, "train"), strict=True):
        frames = read_video(row.clip, num_frames=5, height=32, width=48, fps=8)
        video = torch.from_numpy(frames).permute(3, 0, 1, 2)[None] / 127.5 - 1
        latents = family.encode_video(pipe, video)[0]
        assert entry.shape == tuple(latents.shape) == (16, 2, 4, 6)
        assert torch.equal(store.read("video", entry.parts.video), latents.bfloat16())

        text = family.encode_text(pipe, [row.caption], 24)[EMBEDDING][0]
        tokens = min(24, len(row.caption.encode()) + 1)
        assert torch.equal(store.read("text", entry.parts.text[EMBEDDING]), text[:tokens].bfloat16())
        assert text[tokens:].abs().sum() == 0

        references = store.read("references", entry.parts.references)
        features = store.read("teacher", entry.parts.targets["reference"][options.teachers[0]])
        assert entry.variants == len(references) == len(features) == (2 if row.pair == "regular" else 1)
        assert references.shape[1:] == (len(row.references), 16, 4, 6)
        assert features.shape[1:] == (len(row.references), 2, 3, 24)
        if row.pair == "cross":
            canvases = [
                prepare_reference(read_image(item.image), height=32, width=48, mask=read_mask(item.mask))
                for item in row.references
                if item.mask
            ]
            images = torch.stack([torch.from_numpy(np.array(canvas)).permute(2, 0, 1) / 255 for canvas in canvases])
            assert torch.equal(references[0], family.encode_images(pipe, images * 2 - 1).bfloat16())
            assert torch.equal(features[0], teacher.encode(images, (2, 3)).bfloat16())
        else:
            assert not torch.equal(references[0], references[1])


def test_the_report_counts_time_and_bytes(cached):
    options, report = cached
    used = sum(path.stat().st_size for path in Path(options.cache_dir).rglob("*.safetensors"))
    empty = PartStore(options.cache_dir).size(
        "text", json.loads(Path(options.cache_dir, "meta.json").read_text())["empty_text"]
    )
    assert report.bytes == used - empty
    assert report.bytes_per_row == report.bytes / 4
    assert report.seconds > 0
    assert "cached 4 train rows" in report.summary()
    assert "17 parts made, 0 were there" in report.summary()
    encoded = {"VAE", "text encoder", f"teacher {options.teachers[0]}"}
    assert set(report.seconds_of) == {"decoding", *encoded}
    assert all(value > 0 for value in report.seconds_of.values())
    assert sum(report.seconds_of.values()) < report.seconds
    for part in ("video", "references", "text", "teacher"):
        size = sum(path.stat().st_size for path in Path(options.cache_dir, part).glob("*.safetensors"))
        assert report.bytes_per_part()[part] == (size - empty * (part == "text")) / 4
        assert f"{part} {report.bytes_per_part()[part] / 1e6:.3f}" in report.summary()


def test_a_run_without_work_spends_no_time_on_encoders(cached, encoders, build_options):
    report = build_options(cached[0], encoders)
    assert set(report.seconds_of) == {"decoding"}


def test_what_is_there_is_not_made_again_and_runs_agree(cached, encoders, build_options, tmp_path):
    options, _ = cached
    before = contents(options.cache_dir)
    report = build_options(options, encoders)
    assert dict(report.reused) == ALL
    assert not report.made
    assert contents(options.cache_dir) == before
    build_options(options, encoders, cache_dir=str(tmp_path), num_workers=2)
    assert contents(tmp_path) == before


@pytest.mark.parametrize(
    ("changes", "made"),
    [
        ({"num_frames": 9}, {"video": 4}),
        ({"fps": 4}, {"video": 4}),
        ({"height": 48}, {"video": 4, "references": 4, "teacher": 4}),
        ({"keep_background": True}, {"references": 4, "teacher": 4}),
        ({"seed": 1}, {"references": 2, "teacher": 2}),
        ({"reference_variants": 3}, {"references": 2, "teacher": 2}),
        ({"augment_references": False}, {"references": 2, "teacher": 2}),
        ({"max_sequence_length": 20}, {"text": 5}),
        ({"teacher_grid": "native"}, {"teacher": 4}),
        ({"dtype": "fp16"}, ALL),
        ({"max_references": 4}, {}),
        ({"reference_scale": 0.5}, {"references": 4, "teacher": 4}),
        ({"reference_scale": 0.95}, {}),  # rounds to the same canvas
        ({"drop_background": True}, {"tokens": 4}),
    ],
    ids=lambda value: next(iter(value), "nothing"),
)
def test_a_changed_setting_makes_exactly_its_parts_anew(cached, encoders, build_options, tmp_path, changes, made):
    options = copy_of(cached[0], tmp_path)
    assert dict(build_options(options, encoders, **changes).made) == made


def test_a_changed_row_makes_exactly_its_parts_anew(cached, encoders, build_options, tmp_path):
    options = copy_of(cached[0], tmp_path)
    data = Path(options.train_data).parent
    run = lambda: dict(build_options(options, encoders).made)  # noqa: E731
    tiny_data.write_clip(data / "clips/0.mp4", seed=99)
    assert run() == {"video": 1}
    tiny_data.write_reference(data / "references/2_1.png", seed=99)
    assert run() == {"references": 1, "teacher": 1}
    tiny_data.write_reference(data / "other.png", data / "masks/1_0.png", height=40, width=30)
    assert run() == {}  # the same mask again
    shutil.copy(data / "masks/1_0.png", data / "renamed.png")
    manifest = Path(options.train_data)
    manifest.write_text(manifest.read_text().replace("masks/1_0.png", "renamed.png"))
    assert run() == {}
    manifest.write_text(manifest.read_text().replace("thing 3", "something"))
    assert run() == {"text": 1}
    manifest.write_text(manifest.read_text().replace('"regular"', '"cross"'))
    assert run() == {"references": 2, "teacher": 2}


def test_changed_models_make_exactly_their_parts_anew(cached, tmp_path):
    options = copy_of(cached[0], tmp_path)
    base = shutil.copytree(options.base_model, tmp_path / "base")
    run = lambda **changes: dict(cache_dataset(replace(options, **changes)).made)  # noqa: E731
    assert run(base_model=str(base)) == {}  # moved, not changed
    tiny_models.tiny_transformer(seed=5).save_pretrained(base / "transformer")
    assert run(base_model=str(base)) == {}
    vae = tiny_models.tiny_vae()
    with torch.no_grad():
        vae.encoder.conv_in.weight.mul_(1.5)
    vae.save_pretrained(base / "vae")
    assert run(base_model=str(base)) == {"video": 4, "references": 4}
    assert run(text_encoder_dtype="bf16") == {"text": 5}
    assert run(teacher_layer=1) == {"teacher": 4}
    teachers = (*options.teachers, str(tiny_models.tiny_dinov2(tmp_path / "second", hidden_size=16)))
    assert run(teachers=teachers) == {"teacher": 4}
    tiny_models.tiny_dinov2(tmp_path / "second", hidden_size=16, seed=8)
    assert run(teachers=teachers) == {"teacher": 4}
    assert run(teachers=()) == {}


def test_rows_share_equal_parts_and_equal_rows_count_once(cached, encoders, build_options, tmp_path):
    options = copy_of(cached[0], tmp_path)
    rows = [json.loads(line) for line in Path(options.train_data).read_text().splitlines()]
    shutil.copy(tmp_path / "data/clips/0.mp4", tmp_path / "data/copy.mp4")
    other_caption = {**rows[0], "caption": "another"}
    tiny_data.write_manifest(tmp_path / "data", [*rows, {**rows[0], "file_name": "copy.mp4"}, other_caption])
    report = build_options(options, encoders)
    assert dict(report.made) == {"text": 1}
    assert report.rows == {"train": 5}
    assert len({entry.key for entry in read_index(options.cache_dir, "train")}) == 5


def test_a_damaged_part_is_made_again(cached, encoders, build_options, tmp_path):
    options = copy_of(cached[0], tmp_path)
    entry = read_index(options.cache_dir, "train")[2]
    before = contents(options.cache_dir)
    store = PartStore(options.cache_dir)
    os.truncate(store.path("video", entry.parts.video), 300)
    store.path("text", entry.parts.text[EMBEDDING]).write_bytes(b"")
    assert dict(build_options(options, encoders).made) == {"video": 1, "text": 1}
    assert contents(options.cache_dir) == before


def test_unreadable_rows_are_told_together_and_the_others_are_cached(cached, encoders, build_options, tmp_path):
    options = replace(copy_of(cached[0], tmp_path), cache_dir=str(tmp_path / "new"))
    data = Path(options.train_data).parent
    (data / "clips/1.mp4").write_bytes(b"")
    tiny_data.write_clip(data / "clips/2.mp4", frames=3)
    (data / "masks/3_0.png").write_bytes((data / "references/0_0.png").read_bytes()[:50])
    with pytest.raises(ConfigError) as caught:
        build_options(options, encoders)
    manifest = options.train_data
    assert [line.split(" (")[0] for line in caught.value.problems] == [
        f"{manifest} line 2: video: cannot read {str(data / 'clips/1.mp4')!r}",
        f"{manifest} line 3: video: {str(data / 'clips/2.mp4')!r} is too short: 3 frames at 8 frames a second, "
        "5 are needed; lower num_frames or raise fps",
        f"{manifest} line 4: mask: cannot read {str(data / 'masks/3_0.png')!r}",
    ]
    assert len(list((tmp_path / "new/video").iterdir())) == 1
    assert not (tmp_path / "new/meta.json").exists()
    assert not list((tmp_path / "new").glob("index*"))


def test_a_mask_that_does_not_fit_names_its_image(cached, encoders, build_options, tmp_path):
    options = copy_of(cached[0], tmp_path)
    data = Path(options.train_data).parent
    tiny_data.write_reference(data / "other.png", data / "masks/0_0.png", height=41)
    with pytest.raises(ConfigError, match=r"line 1: reference .*0_0\.png': mask: 30x41 pixels do not match"):
        build_options(options, encoders)


def test_sizes_that_do_not_patchify_are_refused_with_the_nearest(options):
    with pytest.raises(ConfigError) as caught:
        load_encoders(replace(options, height=40, width=50, num_frames=8, teachers=()))
    assert caught.value.problems == [
        "num_frames must be a multiple of 4 plus 1, got 8; try 9",
        "height must be a multiple of 16, got 40; try 32",
        "width must be a multiple of 16, got 50; try 48",
    ]


def test_bases_that_do_not_fit_are_one_line(options, tmp_path):
    def refused(match, **changes):
        with pytest.raises(UserError, match=match) as caught:
            load_encoders(replace(options, teachers=(), **changes))
        assert "\n" not in str(caught.value)

    refused("base_model: folder .*nothing' does not exist", base_model=str(tmp_path / "nothing"))
    refused("family must be one of", family="unknown")
    base = tiny_models.save_tiny_pipeline(tmp_path / "base")
    config = json.loads((base / "model_index.json").read_text())
    (base / "model_index.json").write_text(json.dumps({**config, "boundary_ratio": 0.9}))
    refused("Wan 2.2 A14B", base_model=str(base))
    (base / "model_index.json").write_text(json.dumps({**config, "transformer": ["diffusers", "UNet2DModel"]}))
    refused("UNet2DModel is no known DiT", base_model=str(base))
    (base / "model_index.json").write_text(json.dumps(config))
    tiny_models.tiny_transformer(in_channels=20).save_pretrained(base / "transformer")
    refused("takes 20 channels", base_model=str(base))


def test_a_base_from_the_hub_is_known_by_its_commit(options, tmp_path, monkeypatch):
    commit, repository = "0123456789abcdef" * 2 + "01234567", tmp_path / "models--user--tiny"
    tiny_models.save_tiny_pipeline(repository / "snapshots" / commit)
    (repository / "refs").mkdir()
    (repository / "refs/v1").write_text(commit)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    encoders = load_encoders(replace(options, base_model="user/tiny", revision="v1", teachers=()))
    assert encoders.vae == {"id": "user/tiny", "variant": None, "version": commit, "dtype": "fp32"}
    assert encoders.text_encoder == {"id": "user/tiny", "variant": None, "version": commit, "dtype": "fp32"}


def test_options_tell_every_mistake_at_once(options):
    with pytest.raises(ConfigError) as caught:
        replace(options, height=0, fps=-1.0, teacher_grid="square", dtype="int8", reference_scale=1.5)
    assert caught.value.problems == [
        "height must be at least 1, got 0",
        "fps must be positive, got -1.0",
        "reference_scale must be in (0, 1], got 1.5",
        "teacher_grid must be one of match, native, got 'square'",
        "dtype must be one of fp32, fp16, bf16, got 'int8'",
    ]
    with pytest.raises(UserError, match="train_data must name a manifest"):
        cache_dataset(replace(options, train_data=None))


SLOW_RUN = """
import sys
from refalign_adapter.data.cache import prepare
from refalign_adapter.data.cache.build import cache_dataset
from refalign_adapter.data.cache.options import CacheOptions
import json, time

prepared = prepare.RowPreparer.__getitem__
def slowly(self, row):
    time.sleep(0.2)
    return prepared(self, row)
prepare.RowPreparer.__getitem__ = slowly
cache_dataset(CacheOptions(**json.loads(sys.argv[1])))
"""


def test_a_killed_run_leaves_no_bad_row_and_is_taken_up(options, encoders, build_options, tmp_path):
    tiny_data.write_data(tmp_path / "data", 12)
    options = replace(options, train_data=str(tmp_path / "data"), cache_dir=str(tmp_path / "killed"))
    process = subprocess.Popen([sys.executable, "-c", SLOW_RUN, json.dumps(vars(options))], stderr=subprocess.PIPE)
    videos, deadline = tmp_path / "killed/video", time.monotonic() + 120
    while len(list(videos.glob("[!.]*"))) < 3 and process.poll() is None and time.monotonic() < deadline:
        time.sleep(0.02)
    process.send_signal(signal.SIGKILL)
    _, errors = process.communicate()
    done = len(list(videos.glob("[!.]*")))
    assert 3 <= done < 12, errors.decode()
    assert not (tmp_path / "killed/meta.json").exists()
    for path in (tmp_path / "killed").rglob("[!.]*.safetensors"):
        assert load_file(path)["data"].isfinite().all()
    report = build_options(options, encoders)
    assert report.reused["video"] >= done
    assert report.made["video"] == 12 - done
    build_options(options, encoders, cache_dir=str(tmp_path / "whole"))
    whole, resumed = contents(tmp_path / "whole"), contents(tmp_path / "killed")
    assert whole == {name: data for name, data in resumed.items() if not Path(name).name.startswith(".")}


def test_leftovers_of_killed_runs_go_but_not_those_of_a_running_one(cached, encoders, build_options, tmp_path):
    options = copy_of(cached[0], tmp_path)
    dead = subprocess.Popen([sys.executable, "-c", ""])
    dead.wait()
    old, new = (
        Path(options.cache_dir) / f"video/.{name}.{HOST}.{process}.tmp.safetensors"
        for name, process in (("old", dead.pid), ("new", os.getpid()))
    )
    for path in (old, new):
        path.write_bytes(b"x")
    build_options(options, encoders)
    assert not old.exists()
    assert new.exists()


class Placed(torch.nn.Module):
    """A model that tells where it is moved to."""

    def __init__(self, name, moves):
        super().__init__()
        self.name, self.moves = name, moves

    def to(self, device):
        self.moves.append((self.name, str(device)))
        return self


def test_captions_and_clips_are_encoded_one_after_the_other(options, encoders, build_options, tmp_path, monkeypatch):
    """A GPU has the text encoder or the others, never all: moves are told, as there is no GPU here."""
    moves = []
    made = {name: Placed(name, moves) for name in ("text_encoder", "vae", "teacher")}
    pipe = SimpleNamespace(text_encoder=made["text_encoder"], vae=made["vae"], tokenizer=object())
    shared = Encoders(
        encoders.family, pipe, encoders.transformer, {"reference": {"t": made["teacher"]}}, device="cuda"
    )
    for kind in ("text", "text", "images", "images"):
        shared.use(kind)
    assert moves == [
        *[("vae", "cpu"), ("text_encoder", "cuda"), ("teacher", "cpu")],
        *[("text_encoder", "cpu"), ("vae", "cuda"), ("teacher", "cuda")],
    ]
    asked, told = [], []
    monkeypatch.setattr(Encoders, "use", lambda self, kind: asked.append(kind))
    rows = {"train": load_manifest(options.train_data)}
    build_cache(replace(options, cache_dir=str(tmp_path)), rows, encoders, lambda *done: told.append(done))
    assert asked == sorted(asked, reverse=True)
    assert set(asked) == {"text", "images"}
    assert told == [(done, 4, what) for what in ("captions", "rows") for done in range(1, 5)]
    asked.clear()
    build_cache(replace(options, cache_dir=str(tmp_path)), rows, encoders)
    assert asked == []  # all is there: nothing is moved at all
