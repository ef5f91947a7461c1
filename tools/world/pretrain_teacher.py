"""The world's tiny teacher: a real `Dinov2Model` whose patch features tell subjects apart.

It learns from stills, each subject seen in several poses, scales and lights, on white and before backgrounds: views of
one subject agree and views of different subjects differ (InfoNCE), and every patch on a subject knows its looks.

Shape letters: S subjects, V views, H and W height and width, N patches, C channels.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn
from torch.nn import functional
from transformers import Dinov2Config, Dinov2Model

from refalign_adapter.world.backgrounds import BACKGROUNDS, draw_background
from refalign_adapter.world.portraits import SUPERSAMPLING, draw_reference
from refalign_adapter.world.subjects import KINDS, LOOKS, random_subject

CONFIG: dict[str, Any] = {
    "hidden_size": 128,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "mlp_ratio": 3,
    "patch_size": 8,
    "image_size": 64,
}
MEAN, STD = (0.5, 0.5, 0.5), (0.5, 0.5, 0.5)
PREPROCESSOR = {
    "image_processor_type": "BitImageProcessor",
    "do_convert_rgb": True,
    "do_resize": True,
    "size": {"height": 64, "width": 64},
    "resample": 3,
    "do_center_crop": False,
    "do_rescale": True,
    "rescale_factor": 1 / 255,
    "do_normalize": True,
    "image_mean": list(MEAN),
    "image_std": list(STD),
}
TEMPERATURE = 0.1


@dataclass
class Stills:
    """Views of subjects: images uint8 (S, V, 3, H, W), masks bool (S, V, N), attributes int64 (S, kind and looks)."""

    images: Tensor
    masks: Tensor
    attributes: Tensor


def draw_stills(seed: int, subjects: int, split: str, size: int = 64, views: int = 3) -> Stills:
    """Draw `views` stills of each of `subjects` random subjects: the last before a background, the others on white."""
    generator = np.random.default_rng([seed, 7])
    kinds = list(KINDS)
    images, masks, attributes = [], [], []
    for _ in range(subjects):
        subject = random_subject(generator, split, str(generator.choice(kinds)))
        looks = [values.index(value) for values, value in zip(LOOKS, subject.looks, strict=True)]
        attributes.append([kinds.index(subject.kind), *looks])
        for view in range(views):
            background = None
            if view == views - 1:
                place = str(generator.choice(list(BACKGROUNDS)))
                background = draw_background(place, generator, size * SUPERSAMPLING, size * SUPERSAMPLING)
            portrait = draw_reference(subject, generator, size, size, background)
            images.append(np.asarray(portrait.image))
            masks.append(np.asarray(portrait.mask.resize((size // 8, size // 8), Image.Resampling.BOX)).ravel() > 127)
    pixels = torch.from_numpy(np.stack(images)).permute(0, 3, 1, 2).reshape(subjects, views, 3, size, size)
    covered = torch.from_numpy(np.stack(masks)).reshape(subjects, views, -1)
    return Stills(pixels.contiguous(), covered, torch.tensor(attributes))


def train_teacher(stills: Stills, steps: int, seed: int, log: Callable[[str], None]) -> Dinov2Model:
    """Train the teacher on stills of training subjects; the attribute heads are dropped afterwards."""
    torch.manual_seed(seed)
    generator = torch.Generator().manual_seed(seed)
    model = Dinov2Model(Dinov2Config(**CONFIG))
    sizes = [len(KINDS), *(len(values) for values in LOOKS)]
    heads = nn.Linear(CONFIG["hidden_size"], sum(sizes))
    parameters = [*model.parameters(), *heads.parameters()]
    optimizer = torch.optim.AdamW(parameters, lr=1e-3, weight_decay=0.02)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 1.5e-3, total_steps=steps, pct_start=0.1)
    for step in range(steps):
        rows = torch.randperm(len(stills.images), generator=generator)[:40]
        pair = torch.randperm(stills.images.shape[1], generator=generator)[:2]
        images, masks = stills.images[rows][:, pair].flatten(0, 1), stills.masks[rows][:, pair].flatten(0, 1)
        with torch.autocast("cpu", torch.bfloat16):
            patches = patch_features(model, images)
            scores = heads(patches[masks])
        owners = masks.nonzero()[:, 0] // 2
        looks = _attribute_loss(scores.float(), stills.attributes[rows][owners], sizes)
        views = [pooled(patches.float(), mask).unflatten(0, (-1, 2)) for mask in (masks, torch.ones_like(masks))]
        loss = looks + sum(_info_nce(view[:, 0], view[:, 1]) for view in views)
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        schedule.step()
        if step % 50 == 0:
            log(f"teacher step {step}: loss {loss.item():.3f}, of looks {looks.item():.3f}")
    return model.eval().requires_grad_(False)


def patch_features(model: Dinov2Model, images: Tensor) -> Tensor:
    """Patch tokens (B, N, C) of uint8 images (B, 3, H, W), the class token dropped."""
    mean, std = (torch.tensor(values).view(3, 1, 1) for values in (MEAN, STD))
    return model(pixel_values=(images.float() / 255 - mean) / std).last_hidden_state[:, 1:]


def pooled(patches: Tensor, masks: Tensor) -> Tensor:
    """Unit-length mean (B, C) of the patches (B, N, C) that a mask (B, N) marks."""
    weights = masks.unsqueeze(-1).float()
    return functional.normalize((patches * weights).sum(1) / weights.sum(1).clamp_min(1), dim=-1)


@torch.no_grad()
def retrieval_accuracy(model: Dinov2Model, stills: Stills) -> tuple[float, float]:
    """Share of subjects whose first view is nearest to their own second: by the teacher, by raw pixels."""
    features = pooled(patch_features(model, stills.images[:, :2].flatten(0, 1)), stills.masks[:, :2].flatten(0, 1))
    pixels = functional.normalize(stills.images[:, :2].flatten(0, 1).flatten(1).float() / 255 - 1, dim=-1)
    return _top1(features[0::2], features[1::2]), _top1(pixels[0::2], pixels[1::2])


def _top1(queries: Tensor, gallery: Tensor) -> float:
    nearest = (queries @ gallery.T).argmax(dim=1)
    return float((nearest == torch.arange(len(queries))).float().mean())


def _info_nce(first: Tensor, second: Tensor) -> Tensor:
    scores = first @ second.T / TEMPERATURE
    target = torch.arange(len(scores))
    return 0.5 * (functional.cross_entropy(scores, target) + functional.cross_entropy(scores.T, target))


def _attribute_loss(scores: Tensor, attributes: Tensor, sizes: list[int]) -> Tensor:
    parts = zip(scores.split(sizes, dim=1), attributes.unbind(1), strict=True)
    return torch.stack([functional.cross_entropy(part, target) for part, target in parts]).sum()
