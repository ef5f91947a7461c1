"""The script that makes the shipped parts, run for one step a stage on a handful of clips."""

from typing import Any

import pretrain as script
import pytest
import torch
from diffusers import AutoencoderKLWan, WanPipeline
from pretrain_vae import CONFIG, single_frames_as_images, treat_frames_as_images
from transformers import AutoModel


@pytest.mark.slow
def test_the_script_writes_a_pipeline_a_teacher_and_their_packed_files(tmp_path, monkeypatch):
    for name, value in (("TEACHER_SUBJECTS", 41), ("VAE_CLIPS", 2), ("STILLS", 2)):
        monkeypatch.setattr(script, name, value)
    monkeypatch.setattr(script, "VAE_STAGES", ((1, 1.0), (1, 0.0)))
    monkeypatch.setattr(script, "TEXT_TO_VIDEO_STAGES", ((1, 2), (1, 2)))
    monkeypatch.setattr(script, "retrieval_accuracy", lambda *_: (0.0, 0.0))
    monkeypatch.setattr(script, "psnr", lambda *_: 0.0)
    monkeypatch.setattr(script, "evaluation_videos", lambda *_: None)
    script.pretrain(tmp_path, steps=1)
    assert WanPipeline.from_pretrained(tmp_path / "base").vae.config.latents_std != [1.0] * 16
    assert AutoModel.from_pretrained(tmp_path / "teacher").config.hidden_size == 128
    packed = {path.name for path in (tmp_path / "assets").iterdir()}
    assert packed == {"base.json", "base.safetensors", "teacher.json", "teacher.safetensors"}


def test_single_frames_as_images_changes_nothing_but_speed():
    torch.manual_seed(0)
    vae = small_vae()
    clip = torch.rand(1, 3, 5, 16, 16) * 2 - 1
    with torch.no_grad():
        plain = vae.encode(clip).latent_dist.mode()
        with single_frames_as_images():
            fast = vae.encode(clip).latent_dist.mode()
    torch.testing.assert_close(fast, plain, atol=1e-5, rtol=1e-4)


def test_frames_treated_as_images_make_a_resting_clip_of_one_latent():
    torch.manual_seed(0)
    vae = small_vae()
    treat_frames_as_images(vae)
    still = torch.rand(1, 3, 1, 16, 16) * 2 - 1
    with torch.no_grad():
        latents = vae.encode(still.expand(-1, -1, 5, -1, -1)).latent_dist.mode()
        frames = vae.decode(latents).sample
    torch.testing.assert_close(latents, latents[:, :, :1].expand_as(latents), atol=1e-5, rtol=1e-4)
    torch.testing.assert_close(frames, frames[:, :, :1].expand_as(frames), atol=1e-5, rtol=1e-4)


def small_vae() -> Any:
    config = {**CONFIG, "base_dim": 8, "z_dim": 4}
    return AutoencoderKLWan(**config, latents_mean=[0.0] * 4, latents_std=[1.0] * 4).eval()
