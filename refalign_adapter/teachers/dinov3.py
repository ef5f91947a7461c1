"""DINOv3 ViT (arXiv 2508.10104): the paper's teacher, gated on the Hub. Rotary positions, so any size by itself."""

from .base import Teacher


class DINOv3Teacher(Teacher):
    """facebook/dinov3-vitb16-pretrain-lvd1689m and kin: one class token, then the registers that the config counts."""

    model_types = ("dinov3_vit",)
    model_class = "DINOv3ViTModel"
    class_tokens = 1
    tiny_config = {
        "hidden_size": 32,
        "intermediate_size": 64,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "patch_size": 4,
        "image_size": 24,
        "num_register_tokens": 3,
    }


TEACHER = DINOv3Teacher
