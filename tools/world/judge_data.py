"""What the judge learns from: frames and references of the world, plain, as JPEG files and after a VAE.

Looks are of the training split; no clip is one that the teacher or the base has seen (another seed). The VAE's latents
get noise in half of the clips: what a diffusion transformer makes is never quite where the encoder would put it.

Shape letters: P pictures, M subjects in a picture (3 places, the rest empty), F frames, H and W height and width.
"""

import io
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from pretrain_vae import single_frames_as_images, to_signal
from safetensors.torch import load_file, save_file
from torch import Tensor

from refalign_adapter.world.backgrounds import BACKGROUNDS, draw_background
from refalign_adapter.world.motions import Pose
from refalign_adapter.world.scenes import Clip, draw_clip
from refalign_adapter.world.subjects import KINDS, LOOKS, Subject

SEED = 4021
SIZE, NUM_FRAMES, PLACES = 64, 9, 3
SAME_KIND, JPEG, NOISY = 0.4, 0.3, 0.5
NOISE = 0.5
"""At most, of the standard deviation of a latent channel."""
GROUP, EMPTY = 16, 12
"""Clips that are drawn at once, and backgrounds without a subject for so many clips."""


@dataclass(frozen=True)
class Pictures:
    """Pictures and what is in them.

    Attributes:
        images: uint8 (P, H, W, 3).
        owners: uint8 (P, H, W), 0 for the background, else 1 + the place of the subject that is seen there.
        kinds: int64 (P, M), index into `KINDS`.
        looks: int64 (P, M, 5), index into the values of each of `LOOKS`.
        centres: float32 (P, M, 2), x and y in pixels.
        decoded: bool (P,), whether they come out of the VAE.
    """

    images: Tensor
    owners: Tensor
    kinds: Tensor
    looks: Tensor
    centres: Tensor
    decoded: Tensor

    def save(self, path: Path) -> None:
        """Write as one safetensors file."""
        save_file({field.name: getattr(self, field.name).contiguous() for field in fields(self)}, path)

    @classmethod
    def load(cls, path: Path) -> "Pictures":
        """Read what `save` has written."""
        return cls(**load_file(path))


def look_indices(subject: Subject) -> list[int]:
    """The places of a subject's looks among the values of `LOOKS`."""
    return [values.index(value) for values, value in zip(LOOKS, subject.looks, strict=True)]


def draw_pictures(vae: Any, clips: int, seed: int = SEED) -> Pictures:
    """Draw clips of one to three subjects, their references and some empty backgrounds, plain and after a VAE."""
    generator = np.random.default_rng([seed, 1])
    noise = torch.Generator().manual_seed(seed)
    parts: list[Pictures] = []
    for start in range(0, clips, GROUP):
        drawn = [_draw(seed, number, generator) for number in range(start, min(start + GROUP, clips))]
        parts += [_labelled(_jpeg(clip.frames, generator), clip.frame_masks, clip, clip.poses) for clip in drawn]
        for clip, decoded in zip(drawn, _through(vae, [clip.frames for clip in drawn], generator, noise), strict=True):
            parts.append(_labelled(decoded, clip.frame_masks, clip, clip.poses, decoded=True))
        parts += _references(vae, drawn, generator, noise)
        parts.append(_backgrounds(vae, EMPTY, generator, noise))
    joined = {field.name: torch.cat([getattr(part, field.name) for part in parts]) for field in fields(Pictures)}
    return Pictures(**joined)


def through_vae(vae: Any, videos: Tensor, noise: Tensor | None = None) -> Tensor:
    """Videos uint8 (B, F, H, W, 3), encoded and decoded; noise is added to the normalised latents."""
    signal = to_signal(videos).permute(0, 4, 1, 2, 3)
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16), single_frames_as_images():
        latents = vae.encode(signal).latent_dist.mode()
        if noise is not None:
            latents = latents + noise * torch.tensor(vae.config.latents_std).view(1, -1, 1, 1, 1)
        decoded = vae.decode(latents).sample
    return ((decoded.float() + 1) * 127.5 + 0.5).clamp(0, 255).byte().permute(0, 2, 3, 4, 1).contiguous()


def _draw(seed: int, number: int, generator: np.random.Generator) -> Clip:
    same_kind, backgrounds = (generator.random(2) < (SAME_KIND, 0.5)).tolist()
    return draw_clip(
        seed,
        number,
        split="train",
        height=SIZE,
        width=SIZE,
        num_frames=NUM_FRAMES,
        same_kind=same_kind,
        reference_backgrounds=backgrounds,
    )


def _jpeg(frames: np.ndarray, generator: np.random.Generator) -> np.ndarray:
    """Frames as they are, or, for a share of the clips, out of a JPEG file."""
    if generator.random() > JPEG:
        return frames
    quality = int(generator.integers(40, 96))
    coded = []
    for frame in frames:
        file = io.BytesIO()
        Image.fromarray(frame).save(file, "JPEG", quality=quality)
        coded.append(np.asarray(Image.open(file)))
    return np.stack(coded)


def _through(
    vae: Any, videos: list[np.ndarray], generator: np.random.Generator, noise: torch.Generator
) -> list[np.ndarray]:
    pixels = torch.from_numpy(np.stack(videos))
    strength = generator.uniform(0, NOISE, size=len(videos)) * (generator.random(len(videos)) < NOISY)
    frames = 1 + (pixels.shape[1] - 1) // vae.config.scale_factor_temporal
    sides = [side // vae.config.scale_factor_spatial for side in pixels.shape[2:4]]
    added = torch.randn(len(videos), vae.config.z_dim, frames, *sides, generator=noise)
    scaled = added * torch.from_numpy(strength).float().view(-1, 1, 1, 1, 1)
    return list(through_vae(vae, pixels, scaled).numpy())


def _references(vae: Any, drawn: list[Clip], generator: np.random.Generator, noise: torch.Generator) -> list[Pictures]:
    """The clips' references as pictures of one subject, each plain and after the VAE."""
    singles = [(clip, place) for clip in drawn for place in range(len(clip.subjects))]
    plain = [np.asarray(clip.references[place])[None] for clip, place in singles]
    parts = []
    for decoded, versions in ((False, plain), (True, _through(vae, plain, generator, noise))):
        for (clip, place), image in zip(singles, versions, strict=True):
            seen = np.asarray(clip.masks[place])[None, None] > 0
            pose = clip.reference_poses[place]
            parts.append(_labelled(image, seen, clip, [[pose]], first=place, decoded=decoded))
    return parts


def _labelled(
    images: np.ndarray,
    masks: np.ndarray,
    clip: Clip,
    poses: list[list[Pose]],
    *,
    first: int = 0,
    decoded: bool = False,
) -> Pictures:
    """Pictures (F, H, W, 3) of the clip's subjects from `first` on; masks bool (M, F, H, W)."""
    count, (frames, height, width) = len(masks), masks.shape[1:]
    subjects = clip.subjects[first : first + count]
    kinds, looks, centres = torch.zeros(PLACES).long(), torch.zeros(PLACES, 5).long(), torch.zeros(frames, PLACES, 2)
    kinds[:count] = torch.tensor([list(KINDS).index(subject.kind) for subject in subjects])
    looks[:count] = torch.tensor([look_indices(subject) for subject in subjects])
    spots = [[(pose.x * width, pose.y * height) for pose in path] for path in poses]
    centres[:, :count] = torch.tensor(spots).transpose(0, 1)
    owners = (masks * np.arange(1, count + 1, dtype=np.uint8)[:, None, None, None]).max(0)
    copies = (frames, *[-1] * kinds.dim())
    return Pictures(
        torch.from_numpy(np.array(images)),
        torch.from_numpy(owners),
        kinds.expand(copies),
        looks.expand(frames, -1, -1),
        centres,
        torch.full((frames,), decoded),
    )


def _backgrounds(vae: Any, count: int, generator: np.random.Generator, noise: torch.Generator) -> Pictures:
    """Backgrounds without a subject, half of them after the VAE."""
    places = generator.choice(list(BACKGROUNDS), size=count)
    drawn = [draw_background(str(place), generator, 2 * SIZE, 2 * SIZE).reduce(2) for place in places]
    plain = [np.asarray(image)[None] for image in drawn]
    images = np.concatenate([*plain[::2], *_through(vae, plain[1::2], generator, noise)])
    return Pictures(
        torch.from_numpy(images),
        torch.zeros(count, SIZE, SIZE, dtype=torch.uint8),
        torch.zeros(count, PLACES).long(),
        torch.zeros(count, PLACES, 5).long(),
        torch.zeros(count, PLACES, 2),
        torch.arange(count) >= len(plain[::2]),
    )
