"""DINOv2 (arXiv 2304.07193): the default teacher, Apache-2.0 and not gated. Takes images of any size by itself."""

from .base import Teacher


class DINOv2Teacher(Teacher):
    """facebook/dinov2-small, -base, -large, -giant: one class token, patch 14."""

    model_types = ("dinov2",)
    model_class = "Dinov2Model"
    class_tokens = 1
    tiny_config = {
        "hidden_size": 32,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "mlp_ratio": 2,
        "patch_size": 4,
        "image_size": 24,
    }


TEACHER = DINOv2Teacher
