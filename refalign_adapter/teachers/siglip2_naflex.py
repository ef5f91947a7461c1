"""SigLIP 2's NaFlex variants (arXiv 2502.14786, section 2.4): the model takes patches, at any aspect ratio."""

import math

import torch
from torch import Tensor
from transformers.utils import ModelOutput

from ..grids import Grid
from .base import Teacher


class SigLIP2NaFlexTeacher(Teacher):
    """google/siglip2-base-patch16-naflex and kin, whole or vision part alone: no class token."""

    model_types = ("siglip2", "siglip2_vision_model")
    model_class = "Siglip2VisionModel"
    default_mean = default_std = (0.5, 0.5, 0.5)
    tiny_config = Teacher.tiny_config | {"num_patches": 36}

    @property
    def native_grid(self) -> Grid:
        """(h, w) of the square grid that its learned positions form."""
        side = math.isqrt(self.model.config.num_patches)
        return side, side

    def run_model(self, pixels: Tensor, output_hidden_states: bool) -> ModelOutput:
        """As the contract says; pixels are cut into (B, h · w, patch · patch · 3), rows first and channels last."""
        patch = self.patch_size
        grid = (pixels.shape[2] // patch, pixels.shape[3] // patch)
        patches = pixels.unflatten(3, (grid[1], patch)).unflatten(2, (grid[0], patch))
        patches = patches.permute(0, 2, 4, 3, 5, 1).flatten(3).flatten(1, 2)
        return self.model(
            pixel_values=patches,
            pixel_attention_mask=torch.ones(patches.shape[:2], dtype=torch.long, device=pixels.device),
            spatial_shapes=torch.tensor([grid] * len(patches), device=pixels.device),
            output_hidden_states=output_hidden_states,
        )


TEACHER = SigLIP2NaFlexTeacher
