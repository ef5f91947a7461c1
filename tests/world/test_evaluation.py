"""The whole of an evaluation at the smallest size: real base, shipped adapter, shipped judge."""

import json
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import WanPipeline

import refalign_adapter as ra
from refalign_adapter.branch.switched_on import branch_of
from refalign_adapter.world.encoding import encode_clips
from refalign_adapter.world.evaluation import Scenes, facts, measure_losses, watch_scenes
from refalign_adapter.world.prepared import prepared_references
from refalign_adapter.world.reading import Judge
from refalign_adapter.world.sampling import Sampling
from refalign_adapter.world.scenes import draw_clip
from refalign_adapter.world.watching import held_out_clips, watch

SIZE: dict[str, Any] = {"height": 64, "width": 64, "num_frames": 9}
QUICK = Sampling(num_inference_steps=2)


@pytest.fixture(scope="module")
def pipe(tmp_path_factory):
    return ra.load_adapter(WanPipeline.from_pretrained(ra.demo_base()), ra.demo_adapter())


@pytest.fixture(scope="module")
def judge():
    return Judge.load()


def test_everything_that_the_report_needs_is_measured(pipe, judge):
    verdicts = watch_scenes(pipe, judge, Scenes(one=2, two=2, same_kind=2), QUICK)
    found = facts(verdicts, measure_losses(pipe, branch_of(pipe.transformer), 2))
    assert json.loads(json.dumps(found)) == found
    assert found["identity"]["n"] == 2
    assert found["identity"]["two"]["n"] == found["identity"]["same_kind"]["n"] == 4
    assert found["identity"]["chance"] == 1 / 16
    assert {"mixing", "diagonal", "same_kind"} <= set(found["confusion"])
    assert set(found["attribution"]) == {"1", "2", "3"}
    losses = found["reference_sensitivity"]
    assert losses["n"] == 6
    assert losses["true"] < losses["none"]


def test_videos_depend_on_seed_and_clip_alone(pipe, judge):
    clips = held_out_clips(3, 1, seed=5, **SIZE)
    together = watch(pipe, judge, clips, QUICK, seeds=(0, 1), batch_size=4)
    assert together.videos.shape == (6, 9, 64, 64, 3)
    assert together.numbers.tolist() == [0, 1, 2, 0, 1, 2]
    alone = watch(pipe, judge, clips, QUICK, seeds=(1,), batch_size=1)
    assert np.abs(alone.videos.astype(int) - together.videos[3:]).max() <= 2  # batches round otherwise
    assert np.abs(together.videos[0].astype(int) - together.videos[3]).mean() > 5


def test_without_references_videos_are_the_bases_own(pipe, judge):
    clips = held_out_clips(1, 2, seed=5, **SIZE)
    bare = Sampling(num_inference_steps=2, references=False)
    ours = watch(pipe, judge, clips, bare, seeds=(0,)).videos[0]
    stock = WanPipeline.from_pretrained(ra.demo_base())
    stock.set_progress_bar_config(disable=True)
    frames = stock(
        clips[0].caption,
        num_inference_steps=2,
        guidance_scale=bare.guidance_scale,
        generator=torch.Generator().manual_seed(0),
        max_sequence_length=pipe.branch.config.max_sequence_length,
        **SIZE,
    ).frames[0]
    assert np.array_equal(ours, (frames * 255 + 0.5).astype(np.uint8))


def test_encoded_clips_are_what_a_cache_would_hold(pipe):
    clips = [draw_clip(3, number, split="eval", **SIZE) for number in range(3)]
    for clip, encoded in zip(clips, encode_clips(pipe, clips, text_tokens=32), strict=True):
        count = len(clip.subjects)
        assert encoded.sample.latents.shape == (16, 5, 16, 16)
        assert encoded.sample.references.shape == (1, count, 16, 16, 16)
        assert encoded.replacements.shape == (count, 16, 16, 16)
        assert encoded.masks.shape == (count, 5, 16, 16)
        own = torch.stack([torch.from_numpy(np.array(image)) for image in prepared_references(clip)])
        again = pipe.vae.encode(own.permute(0, 3, 1, 2).unsqueeze(2).float() / 127.5 - 1).latent_dist.mode()[:, :, 0]
        mean, std = (
            torch.tensor(values).view(-1, 1, 1)
            for values in (pipe.vae.config.latents_mean, pipe.vae.config.latents_std)
        )
        assert torch.allclose(encoded.sample.references[0], (again - mean) / std, atol=1e-4)
        assert (encoded.replacements - encoded.sample.references[0]).abs().mean() > 0.05
