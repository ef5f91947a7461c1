"""DINOv2 with register tokens (arXiv 2309.16588): smoother feature maps. Takes any size by itself."""

from .base import Teacher


class DINOv2WithRegistersTeacher(Teacher):
    """facebook/dinov2-with-registers-base and kin: one class token, then the registers that the config counts."""

    model_types = ("dinov2_with_registers",)
    model_class = "Dinov2WithRegistersModel"
    class_tokens = 1
    tiny_config = Teacher.tiny_config | {"mlp_ratio": 2, "num_register_tokens": 3}


TEACHER = DINOv2WithRegistersTeacher
