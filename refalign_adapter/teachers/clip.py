"""CLIP's vision encoder (arXiv 2103.00020). Its `last_hidden_state` comes before the final norm, which only its pooled
class token passes through."""

from torch import Tensor
from transformers.utils import ModelOutput

from .base import Teacher


class CLIPTeacher(Teacher):
    """openai/clip-vit-large-patch14 and kin, whole or vision part alone: one class token."""

    model_types = ("clip", "clip_vision_model")
    model_class = "CLIPVisionModel"
    class_tokens = 1
    default_mean = (0.48145466, 0.4578275, 0.40821073)
    default_std = (0.26862954, 0.26130258, 0.27577711)
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


TEACHER = CLIPTeacher
