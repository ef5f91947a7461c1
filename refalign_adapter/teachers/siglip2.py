"""SigLIP 2 (arXiv 2502.14786) and SigLIP (arXiv 2303.15343) at fixed resolution: one architecture, no class token."""

from torch import Tensor
from transformers.utils import ModelOutput

from .base import Teacher


class SigLIP2Teacher(Teacher):
    """google/siglip2-base-patch16-256, google/siglip-base-patch16-224 and kin, whole or vision part alone."""

    model_types = ("siglip", "siglip_vision_model")
    model_class = "SiglipVisionModel"
    default_mean = default_std = (0.5, 0.5, 0.5)
    tiny_config = {
        "hidden_size": 32,
        "intermediate_size": 64,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "patch_size": 4,
        "image_size": 24,
    }

    def run_model(self, pixels: Tensor, output_hidden_states: bool) -> ModelOutput:
        """As the contract says; learned positions are interpolated to the grid."""
        return self.model(
            pixel_values=pixels, output_hidden_states=output_hidden_states, interpolate_pos_encoding=True
        )


TEACHER = SigLIP2Teacher
