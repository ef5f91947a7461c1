"""Sizes: which one a clip goes to, and rows of several sizes in one cache."""

import json
from dataclasses import replace
from pathlib import Path

import av
import numpy as np
import pytest
import tiny_data
import torch
from PIL import Image

from refalign_adapter.data.cache.buckets import BucketBatchSampler
from refalign_adapter.data.cache.collate import collate
from refalign_adapter.data.cache.dataset import open_cache
from refalign_adapter.data.cache.parts import PartStore
from refalign_adapter.data.cache.prepare import RowPreparer, plans_of
from refalign_adapter.data.cache.verify import verify_cache
from refalign_adapter.data.sources.manifest import load_manifest
from refalign_adapter.errors import ConfigError
from refalign_adapter.media.canvas import cover
from refalign_adapter.media.sizes import Size, VideoFacts, choose_size, kept_share, parse_sizes, size_problems
from refalign_adapter.media.video import TooShortError, probe_video, read_video

WIDE, TALL, SQUARE = Size(81, 480, 832), Size(81, 832, 480), Size(81, 608, 608)
SHORT, LARGE = Size(17, 480, 832), Size(81, 720, 1280)


@pytest.mark.parametrize(
    ("height", "width", "frames", "sizes", "expected"),
    [
        (1080, 1920, 100, [TALL, WIDE, SQUARE], WIDE),
        (1920, 1080, 100, [WIDE, TALL, SQUARE], TALL),
        (700, 720, 100, [WIDE, TALL, SQUARE], SQUARE),
        (1080, 1920, 80, [WIDE, TALL, SHORT], SHORT),  # one frame too few
        (1080, 1920, 81, [WIDE, TALL, SHORT], WIDE),
        (1920, 1080, 50, [WIDE, TALL, SHORT], SHORT),  # the only one it is long enough for, whatever its shape
        (1080, 1920, 5, [WIDE, SHORT], SHORT),  # too short for all
        (1080, 1920, 100, [WIDE, LARGE], LARGE),
        (480, 854, 100, [WIDE, LARGE], WIDE),  # not enlarged
        (240, 427, 100, [LARGE, WIDE], WIDE),  # enlarged as little as can be
        (720, 1280, 100, [LARGE, SHORT], LARGE),
    ],
)
def test_a_clip_goes_to_the_size_that_suits_it(height, width, frames, sizes, expected):
    clip = VideoFacts(height, width, frames, 16.0)
    assert choose_size(sizes, clip, None) == expected
    assert choose_size(sizes[::-1], clip, 16.0) == expected


def test_the_share_of_the_picture_that_is_kept_is_that_of_cover():
    picture = np.zeros((90, 160, 3), np.uint8)
    picture[:, :, 0] = np.linspace(0, 255, 160)[None]
    for size in (Size(1, 40, 40), Size(1, 20, 60), Size(1, 60, 20), Size(1, 90, 160)):
        clip = VideoFacts(90, 160, 1, 1.0)
        scale = max(size.height / 90, size.width / 160)
        expected = (size.height / scale) * (size.width / scale) / (90 * 160)
        assert kept_share(size, clip) == pytest.approx(expected)
    ramp = np.asarray(cover(Image.fromarray(picture), 40, 40))[0, :, 0]
    kept = (int(ramp[-1]) - int(ramp[0])) / 255  # of the width, as all of the height stays
    assert kept == pytest.approx(kept_share(Size(1, 40, 40), VideoFacts(90, 160, 1, 1.0)), abs=0.02)


@pytest.mark.parametrize("rate", [8.0, 15.0, 23.976, 24.0, 29.97, 30.0])
@pytest.mark.parametrize("segment", [None, (3, 20)])
def test_a_probe_tells_as_many_frames_as_decoding_gives(tmp_path, rate, segment):
    tiny_data.write_clip(tmp_path / "clip.mp4", frames=23, fps=rate)
    facts = probe_video(tmp_path / "clip.mp4", segment=segment)
    assert facts.num_frames == (23 if segment is None else 17)
    for fps in (None, 4.0, 8.0, 12.0, 16.0, rate, 2 * rate):
        promised = facts.frames_at(fps)
        wanted = {"height": 32, "width": 32, "fps": fps, "segment": segment}
        assert len(read_video(tmp_path / "clip.mp4", num_frames=promised, **wanted)) == promised
        with pytest.raises(TooShortError, match=f"too short: {promised} frames"):
            read_video(tmp_path / "clip.mp4", num_frames=promised + 1, **wanted)


def test_a_probe_sees_the_frames_as_they_are_shown(tmp_path):
    tiny_data.write_clip(tmp_path / "clip.mp4", height=48, width=64)
    assert probe_video(tmp_path / "clip.mp4") == VideoFacts(48, 64, 9, 8.0)
    assert probe_video(tmp_path / "clip.mp4", crop=(10, 8, 30, 48)) == VideoFacts(40, 20, 9, 8.0)
    with av.open(str(tmp_path / "narrow.mkv"), "w") as container:  # its header does not count frames
        stream = container.add_stream("libx264", rate=10)
        stream.height, stream.width, stream.pix_fmt = 48, 32, "yuv420p"
        stream.codec_context.sample_aspect_ratio = 2
        for level in range(7):
            frame = av.VideoFrame.from_ndarray(np.full((48, 32, 3), 30 * level, np.uint8), format="rgb24")
            container.mux(stream.encode(frame))
        container.mux(stream.encode())
    assert probe_video(tmp_path / "narrow.mkv") == VideoFacts(48, 64, 7, 10.0)


def test_sizes_of_a_recipe_are_read_or_refused():
    assert list(map(str, parse_sizes(["81x480x832", "17x64x64", "81x480x832"]))) == ["81x480x832", "17x64x64"]
    assert list(size_problems(["81x480x832"], "data.buckets")) == []
    assert list(size_problems(["81x480", "0x8x8"], "data.buckets")) == [
        "data.buckets.0 must be frames x height x width such as 81x480x832, got '81x480'",
        "data.buckets.1 must be frames x height x width such as 81x480x832, got '0x8x8'",
    ]
    assert list(size_problems([], "data.buckets")) == [
        "data.buckets must name at least one size such as 81x480x832, got []; null = one size"
    ]


SIZES = (Size(9, 32, 48), Size(5, 48, 32), Size(5, 32, 48))


@pytest.fixture(scope="module")
def mixed(options, encoders, build_options, tmp_path_factory):
    """Options of a cache of a wide, a tall, a short wide and a square clip, and its report."""
    folder = tmp_path_factory.mktemp("mixed")
    manifest = tiny_data.write_data(folder / "data", 4, frames=9, height=64, width=96)
    tiny_data.write_clip(folder / "data/clips/1.mp4", frames=9, height=96, width=64, seed=1)
    tiny_data.write_clip(folder / "data/clips/2.mp4", frames=6, height=64, width=96, seed=2)
    changed = replace(options, train_data=str(manifest), cache_dir=str(folder / "cache"), buckets=SIZES)
    return changed, build_options(changed, encoders)


def test_rows_are_cached_at_their_sizes(mixed, encoders):
    options, report = mixed
    dataset = open_cache(options)
    family, pipe = encoders.family, encoders.pipe
    expected = [SIZES[0], SIZES[1], SIZES[2], SIZES[0]]
    rows = load_manifest(options.train_data)
    for sample, row, size in zip(map(dataset.__getitem__, range(4)), rows, expected, strict=True):
        frames = read_video(
            row.clip, num_frames=size.num_frames, height=size.height, width=size.width, fps=options.fps
        )
        latents = family.encode_video(pipe, encoders_input(frames))[0].bfloat16()
        assert sample.latents.equal(latents)
        assert sample.references.shape[-2:] == latents.shape[-2:]
        grid = encoders.token_grid(options.at(size))
        assert all(features.shape[2:4] == grid for features in sample.targets["reference"].values())
    assert report.made["video"] == 4
    assert verify_cache(options).count > 4
    meta = json.loads((Path(options.cache_dir) / "meta.json").read_text())
    assert meta["options"]["buckets"] == ["9x32x48", "5x48x32", "5x32x48"]


def encoders_input(frames):
    return torch.from_numpy(frames).movedim(-1, 0).unsqueeze(0) / 127.5 - 1


def test_only_rows_of_one_size_share_a_batch(mixed):
    dataset = open_cache(mixed[0])
    sampler = BucketBatchSampler(dataset.shapes, 2, seed=0)
    batches = [batch for batch, _ in zip(sampler, range(len(sampler)), strict=False)]
    assert {tuple(sorted(set(batch))) for batch in batches} == {(0, 3), (1,), (2,)}
    for batch in batches:
        assert collate([dataset[index] for index in batch]).latents.shape[0] == 2


def test_another_bucket_makes_only_the_rows_anew_that_move_to_it(mixed, encoders, build_options):
    options, _ = mixed
    report = build_options(replace(options, buckets=(*SIZES, Size(9, 48, 32))), encoders)
    assert report.made["video"] == 1  # the tall clip is long enough for it
    assert report.reused["video"] == 3
    assert build_options(options, encoders).made["video"] == 0


def test_one_bucket_is_the_same_as_none(options):
    single = replace(options, buckets=(Size(5, 32, 48),))
    assert single == options
    assert single.sizes == (Size(5, 32, 48),)
    several = replace(options, buckets=SIZES)
    assert (several.num_frames, several.height, several.width) == (9, 32, 48)
    assert several.at(SIZES[1]).sizes == (SIZES[1],)


def test_a_clip_whose_header_promises_more_goes_to_a_shorter_size(mixed, encoders, monkeypatch):
    options, _ = mixed
    rows = load_manifest(options.train_data)
    lying = VideoFacts(64, 96, 100, 8.0)
    monkeypatch.setattr("refalign_adapter.data.cache.prepare.probe_video", lambda *_, **__: lying)
    preparer = RowPreparer(plans_of(options, encoders), PartStore(Path(options.cache_dir) / "none"))
    assert preparer[rows[2]].size == SIZES[2]
    assert preparer[rows[2]].frames.shape == (5, 32, 48, 3)
    assert preparer[rows[0]].size == SIZES[0]
    long = replace(options, buckets=(Size(13, 32, 48), Size(17, 32, 48)))
    preparer = RowPreparer(plans_of(long, encoders), PartStore(Path(options.cache_dir) / "none"))
    assert "is too short: 6 frames at 8 frames a second, 13 are needed" in preparer[rows[2]].problem


def test_every_size_must_fit_the_base(options, encoders):
    wrong = replace(options, buckets=(Size(9, 32, 48), Size(8, 32, 50)))
    with pytest.raises(ConfigError) as error:
        encoders.check_sizes(wrong)
    frames, width = error.value.problems
    assert frames.startswith("data.buckets num_frames must be a multiple of")
    assert width.startswith("data.buckets width must be a multiple of")
