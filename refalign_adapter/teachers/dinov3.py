"""DINOv3 ViT (arXiv 2508.10104): the paper's teacher, gated on the Hub. Rotary positions, so any size by itself."""

from .base import Teacher


class DINOv3Teacher(Teacher):
    """facebook/dinov3-vitb16-pretrain-lvd1689m and kin: one class token, then the registers that the config counts."""

    model_types = ("dinov3_vit",)
    model_class = "DINOv3ViTModel"
    class_tokens = 1
    tiny_config = Teacher.tiny_config | {"num_register_tokens": 3}


TEACHER = DINOv3Teacher
