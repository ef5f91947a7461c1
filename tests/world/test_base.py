"""What ships with the package: a Wan pipeline and a teacher that stock libraries load and that know the world."""

import json

import numpy as np
import pytest
import torch
from diffusers import WanPipeline
from pretrain import evaluation_videos, normalise
from pretrain_teacher import draw_stills, retrieval_accuracy
from pretrain_vae import encode, psnr
from safetensors.torch import load_file
from transformers import AutoModel

from refalign_adapter.errors import UserError
from refalign_adapter.world.base import ASSETS, pack, unpack_base, unpack_teacher

# Bars a little below what the shipped weights measure.
VIDEO_PSNR = 22.0
STILL_PSNR = 24.0
FLOW_LOSS = 0.35
RETRIEVAL = 0.5


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    return unpack_base(tmp_path_factory.mktemp("world") / "base")


@pytest.fixture(scope="module")
def pipe(base):
    return WanPipeline.from_pretrained(base, use_safetensors=True)


@pytest.fixture(scope="module")
def videos():
    return evaluation_videos(11, 8)


def test_the_assets_are_small():
    assert sum(path.stat().st_size for path in ASSETS.rglob("*") if path.is_file()) < 25e6


def test_a_stock_pipeline_generates_a_clip(pipe):
    pipe.set_progress_bar_config(disable=True)
    video = pipe(
        "a ball rolls to the right, in a meadow",
        height=64,
        width=64,
        num_frames=9,
        num_inference_steps=2,
        guidance_scale=3.0,
        generator=torch.Generator().manual_seed(0),
    ).frames[0]
    assert video.shape == (9, 64, 64, 3)
    assert np.isfinite(video).all()
    assert video.std() > 0.05


def test_the_vae_keeps_clips_and_references_recognisable(pipe, videos):
    assert psnr(pipe.vae, videos) > VIDEO_PSNR
    stills = draw_stills(12, 12, "eval").images[:, :1].transpose(1, 2)
    assert psnr(pipe.vae, stills) > STILL_PSNR


def test_latents_are_normalised_by_the_config(pipe, videos):
    latents = normalise(pipe.vae, encode(pipe.vae, videos))
    assert latents.shape == (8, 16, 5, 16, 16)
    assert abs(latents.mean().item()) < 0.15
    assert latents.std().item() == pytest.approx(1, abs=0.2)


def test_the_transformer_knows_captions(pipe, videos):
    """On clips it never saw, the velocity error is far below that of predicting the mean, about 2."""
    clips = normalise(pipe.vae, encode(pipe.vae, videos))
    noise = torch.randn(clips.shape, generator=torch.Generator().manual_seed(0))
    text, _ = pipe.encode_prompt(
        ["a ball bounces, in a meadow"] * 8, do_classifier_free_guidance=False, max_sequence_length=32
    )
    with torch.no_grad():
        velocity = pipe.transformer(0.5 * (clips + noise), torch.full((8,), 500.0), text, return_dict=False)[0]
    assert (velocity - (noise - clips)).square().mean().item() < FLOW_LOSS


def test_unknown_words_and_empty_prompts_are_fine(pipe):
    ids = pipe.tokenizer(["", "a zebra bounces"], padding="max_length", max_length=8).input_ids
    assert ids[0] == [1] + [0] * 7
    assert ids[1][1] == pipe.tokenizer.unk_token_id


def test_the_teacher_tells_evaluation_subjects_apart(tmp_path):
    folder = unpack_teacher(tmp_path / "teacher")
    teacher = AutoModel.from_pretrained(folder)
    assert type(teacher).__name__ == "Dinov2Model"
    assert len(json.loads((folder / "preprocessor_config.json").read_text())["image_mean"]) == 3
    accuracy, by_pixels = retrieval_accuracy(teacher.eval(), draw_stills(13, 100, "eval"))
    assert accuracy > RETRIEVAL
    assert by_pixels < 0.2


def test_packing_a_folder_is_the_inverse_of_unpacking(base, tmp_path):
    pack(base, "base", tmp_path)
    shipped, packed = (load_file(folder / "base.safetensors") for folder in (ASSETS, tmp_path))
    assert shipped.keys() == packed.keys()
    assert all(torch.equal(shipped[key], packed[key]) for key in shipped)


def test_unpacking_into_an_impossible_place_is_one_clear_line(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="cannot write .*; a file is in the way, choose another folder"):
        unpack_base(tmp_path / "file" / "base")
