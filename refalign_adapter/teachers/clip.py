"""CLIP's vision encoder (arXiv 2103.00020). Its `last_hidden_state` comes before the final norm, which only its pooled
class token passes through."""

from .base import Teacher


class CLIPTeacher(Teacher):
    """openai/clip-vit-large-patch14 and kin, whole or vision part alone: one class token."""

    model_types = ("clip", "clip_vision_model")
    model_class = "CLIPVisionModel"
    class_tokens = 1
    default_mean = (0.48145466, 0.4578275, 0.40821073)
    default_std = (0.26862954, 0.26130258, 0.27577711)
    run_options = {"interpolate_pos_encoding": True}  # learned ones, to the grid


TEACHER = CLIPTeacher
