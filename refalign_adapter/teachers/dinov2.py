"""DINOv2 (arXiv 2304.07193): the default teacher, Apache-2.0 and not gated. Takes images of any size by itself."""

from .base import Teacher


class DINOv2Teacher(Teacher):
    """facebook/dinov2-small, -base, -large, -giant: one class token, patch 14."""

    model_types = ("dinov2",)
    model_class = "Dinov2Model"
    class_tokens = 1
    tiny_config = Teacher.tiny_config | {"mlp_ratio": 2}


TEACHER = DINOv2Teacher
