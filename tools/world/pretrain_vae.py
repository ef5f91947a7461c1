"""The world's tiny VAE: a real `AutoencoderKLWan`, half the frames and a quarter of each side.

Shape letters: B batch, F frames, H and W height and width in pixels.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from diffusers import AutoencoderKLWan
from diffusers.models.autoencoders.autoencoder_kl_wan import WanCausalConv3d, WanResample, unpatchify
from torch import Tensor
from torch.nn import functional

from refalign_adapter.world.scenes import draw_clip

CONFIG: dict[str, Any] = {
    "base_dim": 32,
    "z_dim": 16,
    "dim_mult": [1, 2],
    "num_res_blocks": 1,
    "temperal_downsample": [True],
    "patch_size": 2,
    "in_channels": 12,
    "out_channels": 12,
    "scale_factor_temporal": 2,
    "scale_factor_spatial": 4,
}
KL_WEIGHT = 1e-4
EDGE_WEIGHT = 0.2
STILL_PLACE = "on white"


def draw_world(seed: int, clips: int, size: int, num_frames: int) -> tuple[Tensor, Tensor, list[str], list[str]]:
    """Draw training clips.

    Returns:
        uint8 videos (B, 3, F, H, W), uint8 references (all clips' together, 3, H, W), the clips' captions and
        the references'.
    """
    drawn = [draw_clip(seed, i, split="train", height=size, width=size, num_frames=num_frames) for i in range(clips)]
    videos = torch.from_numpy(np.stack([clip.frames for clip in drawn])).permute(0, 4, 1, 2, 3).contiguous()
    stills = torch.from_numpy(np.stack([np.asarray(image) for clip in drawn for image in clip.references]))
    names = [f"a {subject.kind}, {STILL_PLACE}" for clip in drawn for subject in clip.subjects]
    return videos, stills.permute(0, 3, 1, 2).contiguous(), [clip.caption for clip in drawn], names


def to_signal(pixels: Tensor) -> Tensor:
    """uint8 pixels to float32 in [-1, 1], any shape."""
    return pixels.float() / 127.5 - 1


def train_vae(
    videos: Tensor, stills: Tensor, stages: Sequence[tuple[int, float]], seed: int, log: Callable[[str], None]
) -> AutoencoderKLWan:
    """Train in stages, each of so many steps, of which a share sees stills alone and the rest clips with stills.

    After the first stage the VAE is turned into one of images (`treat_frames_as_images`), from which the others go on.

    Args:
        videos: uint8 (B, 3, F, H, W), F ≥ 5.
        stills: uint8 (B, 3, H, W).
        stages: steps and the share of stills, stage by stage.
    """
    torch.manual_seed(seed)
    generator = torch.Generator().manual_seed(seed)
    vae = AutoencoderKLWan(**CONFIG, latents_mean=[0.0] * CONFIG["z_dim"], latents_std=[1.0] * CONFIG["z_dim"])
    for stage, (steps, still_share) in enumerate(stages):
        if stage == 1:
            treat_frames_as_images(vae)
        _fit(vae, videos, stills, steps, still_share, generator, log)
    return vae.eval().requires_grad_(False)


@torch.no_grad()
def treat_frames_as_images(vae: AutoencoderKLWan) -> None:
    """Zero all temporal taps but the newest, and let two frames share their mean's latent.

    A VAE trained on images then codes clips at once, and only motion within a pair is left to learn.
    """
    for module in vae.modules():
        if isinstance(module, WanCausalConv3d):
            module.weight[:, :, :-1] = 0
    for module in vae.modules():
        if isinstance(module, WanResample) and module.mode.endswith("3d"):
            same = torch.eye(module.dim)
            time_conv: Any = module.time_conv
            weight, down = time_conv.weight, module.mode == "downsample3d"
            weight.zero_()
            time_conv.bias.zero_()
            weight[:, :, 2, 0, 0] = 0.5 * same if down else torch.cat([same, same])
            if down:
                weight[:, :, 1, 0, 0] = 0.5 * same


def _fit(
    vae: AutoencoderKLWan,
    videos: Tensor,
    stills: Tensor,
    steps: int,
    still_share: float,
    generator: torch.Generator,
    log: Callable[[str], None],
) -> None:
    for module in vae.modules():
        if isinstance(module, torch.nn.Conv3d):  # a quarter faster on the CPU
            module.weight.data = module.weight.data.to(memory_format=torch.channels_last_3d)
    optimizer = torch.optim.AdamW(vae.parameters(), lr=2e-3, betas=(0.9, 0.98), weight_decay=1e-4)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 2e-3, total_steps=steps, pct_start=0.05)
    with single_frames_as_images():
        for step in range(steps):
            references = stills[torch.randint(len(stills), (4,), generator=generator)].unsqueeze(2)
            if step < still_share * steps:
                loss = _loss(vae, torch.cat([references, _cuts(videos, 4, 1, generator)]))
            else:
                loss = 0.7 * _loss(vae, _cuts(videos, 2, 5, generator)) + 0.3 * _loss(vae, references)
            optimizer.zero_grad()
            loss.backward()
            torch.nn.utils.clip_grad_norm_(vae.parameters(), 1.0)
            optimizer.step()
            schedule.step()
            if step % 50 == 0:
                log(f"vae step {step}: loss {loss.item():.4f}")


@contextmanager
def single_frames_as_images() -> Iterator[None]:
    """Run causal 3D convolutions on single frames as 2D ones, which is the same and three times cheaper.

    A clip's first frame has only zeros before it, so only the last temporal tap counts.
    """
    plain = WanCausalConv3d.forward

    def forward(self: Any, x: Tensor, cache_x: Tensor | None = None) -> Tensor:
        if cache_x is not None or x.shape[2] > 1 or self.stride[0] > 1:
            return plain(self, x, cache_x)
        padding = (self._padding[2], self._padding[0])
        return functional.conv2d(x.squeeze(2), self.weight[:, :, -1], self.bias, self.stride[1:], padding).unsqueeze(2)

    WanCausalConv3d.forward = forward
    try:
        yield
    finally:
        WanCausalConv3d.forward = plain


def _cuts(videos: Tensor, count: int, num_frames: int, generator: torch.Generator) -> Tensor:
    rows = torch.randint(len(videos), (count,), generator=generator).tolist()
    starts = torch.randint(videos.shape[2] - num_frames + 1, (count,), generator=generator).tolist()
    return torch.stack([videos[row, :, start : start + num_frames] for row, start in zip(rows, starts, strict=True)])


def _loss(vae: Any, pixels: Tensor) -> Tensor:
    """Mean absolute error of pixels and of their differences, and a small KL term. pixels: uint8 (B, 3, F, H, W)."""
    target = to_signal(pixels)
    chunks: list[Tensor] = []
    # `decode` clamps to [-1, 1], which stops gradients; the decoder's own output does not.
    hook = vae.decoder.register_forward_hook(lambda module, inputs, output: chunks.append(output))
    with torch.autocast("cpu", torch.bfloat16):
        posterior = vae.encode(target).latent_dist
        vae.decode(posterior.sample())
    hook.remove()
    error = unpatchify(torch.cat(chunks, dim=2).float(), vae.config.patch_size) - target
    edges = sum(error.diff(dim=axis).abs().mean() for axis in (-1, -2))
    kl = 0.5 * (posterior.mean.float() ** 2 + posterior.var.float() - 1 - posterior.logvar.float()).mean()
    return error.abs().mean() + EDGE_WEIGHT * edges + KL_WEIGHT * kl


@torch.no_grad()
def encode(vae: Any, videos: Tensor, batch_size: int = 32) -> Tensor:
    """uint8 videos (B, 3, F, H, W) to their latents' means (B, C, 1 + (F - 1) / 2, H / 4, W / 4), not normalised."""
    with torch.autocast("cpu", torch.bfloat16):
        parts = [vae.encode(to_signal(part)).latent_dist.mode().float() for part in videos.split(batch_size)]
    return torch.cat(parts)


@torch.no_grad()
def psnr(vae: Any, videos: Tensor) -> float:
    """Peak signal-to-noise ratio in dB of the reconstruction of uint8 videos (B, 3, F, H, W)."""
    target = to_signal(videos)
    error = functional.mse_loss(vae.decode(vae.encode(target).latent_dist.mode()).sample, target)
    return float(10 * torch.log10(4 / error))


def set_latent_statistics(vae: AutoencoderKLWan, latents: Tensor) -> None:
    """Write each channel's mean and standard deviation over latents (B, C, F, H, W) into the VAE's config."""
    mean, std = latents.mean(dim=(0, 2, 3, 4)), latents.std(dim=(0, 2, 3, 4))
    vae.register_to_config(latents_mean=mean.tolist(), latents_std=std.tolist())
