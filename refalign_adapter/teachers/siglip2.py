"""SigLIP 2 (arXiv 2502.14786) and SigLIP (arXiv 2303.15343) at fixed resolution: one architecture, no class token."""

from .base import Teacher


class SigLIP2Teacher(Teacher):
    """google/siglip2-base-patch16-256, google/siglip-base-patch16-224 and kin, whole or vision part alone."""

    model_types = ("siglip", "siglip_vision_model")
    model_class = "SiglipVisionModel"
    default_mean = default_std = (0.5, 0.5, 0.5)
    run_options = {"interpolate_pos_encoding": True}  # learned ones, to the grid


TEACHER = SigLIP2Teacher
