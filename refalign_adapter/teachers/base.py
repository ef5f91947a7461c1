"""What a frozen vision teacher is, and how its feature grid meets the DiT's.

Shape letters: B batch, H and W image height and width in pixels, h and w the feature grid, T the teacher's width.
"""

import os
from typing import Any, ClassVar, Self

import torch
from torch import Tensor, nn
from torch.nn.functional import interpolate
from transformers import PreTrainedModel
from transformers.utils import ModelOutput

from ..errors import UserError
from ..grids import Grid, check_grid
from ._hub import content_digest, local_folder, read_model, read_processor

IMAGENET_MEAN, IMAGENET_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


class Teacher(nn.Module):
    """A frozen vision encoder: always in eval mode, no gradients, features kept as a 2-D grid.

    A subclass declares the class variables; most need nothing else. What the encoder's config states (width, patch
    size, register tokens) is read from it.

    Class variables:
        model_types: values of `model_type` in a checkpoint's config.json that it serves.
        model_class: name of the transformers class that holds the vision encoder.
        class_tokens: tokens before the patches that the architecture has in every configuration.
        default_mean, default_std: per RGB channel; used where the checkpoint has no preprocessor_config.json.
        any_size: whether `encode` can be asked for any grid.
        run_options: keyword arguments of every call of the model, such as having its positions interpolated.
        tiny_config: keyword arguments of a config that makes a random model small enough for tests.

    Args:
        model: the encoder, a transformers vision model.
        name: Hub id or folder it came from.
        revision: commit hash or content digest of its weights.
        layer: -1 for the model's `last_hidden_state`, any other for `hidden_states[layer]` (0: the embeddings, i: the
            output of block i, before the final norm).
        processor: contents of preprocessor_config.json.

    Raises:
        UserError: a layer the model does not have.
    """

    model_types: ClassVar[tuple[str, ...]]
    model_class: ClassVar[str]
    class_tokens: ClassVar[int] = 0
    default_mean: ClassVar[tuple[float, ...]] = IMAGENET_MEAN
    default_std: ClassVar[tuple[float, ...]] = IMAGENET_STD
    any_size: ClassVar[bool] = True
    run_options: ClassVar[dict[str, Any]] = {}
    tiny_config: ClassVar[dict[str, Any]] = {
        "hidden_size": 32,
        "intermediate_size": 64,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "patch_size": 4,
        "image_size": 24,
    }

    def __init__(
        self,
        model: PreTrainedModel,
        *,
        name: str,
        revision: str | None = None,
        layer: int = -1,
        processor: dict[str, Any] | None = None,
    ):
        super().__init__()
        self.model = model
        self.name, self.revision, self.layer, self.processor = name, revision, layer, processor or {}
        self.eval().requires_grad_(False)
        layers = model.config.num_hidden_layers
        if not -layers - 1 <= layer <= layers:
            raise UserError(f"layer must be in [{-layers - 1}, {layers}] for teacher {name!r}, got {layer}")

    @classmethod
    def from_pretrained(
        cls, name: str, *, revision: str | None = None, dtype: torch.dtype | None = None, layer: int = -1
    ) -> Self:
        """Load from a Hub id or folder onto the CPU; arguments and errors as in `load_teacher`."""
        folder = local_folder(name, revision)
        model = read_model(folder, cls.model_class, dtype or torch.float32)
        version = content_digest(folder) if os.path.isdir(name) else folder.name
        return cls(model, name=name, revision=version, layer=layer, processor=read_processor(folder))

    @property
    def dim(self) -> int:
        """T, the width of a feature."""
        return self.model.config.hidden_size

    @property
    def patch_size(self) -> int:
        """Side of a patch in pixels.

        Raises:
            UserError: the config declares patches that are not square.
        """
        height, width = _pair(self.model.config.patch_size)
        if height != width:
            raise UserError(
                f"teacher: {self.name!r} has patches of {height}×{width} pixels; only square ones are known"
            )
        return height

    @property
    def extra_tokens(self) -> int:
        """Tokens before the patches (class and register tokens) as the model declares them."""
        return self.class_tokens + getattr(self.model.config, "num_register_tokens", 0)

    @property
    def mean(self) -> tuple[float, ...]:
        """What is subtracted per RGB channel."""
        if self.processor.get("do_normalize") is False:
            return (0.0, 0.0, 0.0)
        return tuple(self.processor.get("image_mean") or self.default_mean)

    @property
    def std(self) -> tuple[float, ...]:
        """What is divided by per RGB channel."""
        if self.processor.get("do_normalize") is False:
            return (1.0, 1.0, 1.0)
        return tuple(self.processor.get("image_std") or self.default_std)

    @property
    def scale(self) -> float:
        """Value of white before normalisation: 255 times the declared rescale factor, 1 for all published encoders."""
        if self.processor.get("do_rescale") is False:
            return 255.0
        return 255 * (self.processor.get("rescale_factor") or 1 / 255)

    @property
    def native_grid(self) -> Grid:
        """(h, w) at the size that the processor declares (its crop before its resize), else the model's config."""
        cropped = self.processor.get("do_center_crop") is not False
        size = (cropped and self.processor.get("crop_size")) or self.processor.get("size")
        height, width = _pair(size or self.model.config.image_size)
        return height // self.patch_size, width // self.patch_size

    def train(self, mode: bool = True) -> Self:
        """Stay in eval mode whatever `mode` says: DINOv3, for one, jitters its positions while training."""
        return super().train(False)

    @torch.no_grad()
    def encode(self, images: Tensor, grid: Grid | None = None) -> Tensor:
        """Features of the patches, extra tokens dropped.

        Args:
            images: (B, 3, H, W) RGB in [0, 1], any size, on any device.
            grid: (h, w) wanted, usually the DiT's token grid: the image is resized to exactly that many patches. None,
                or a teacher without `any_size`, encodes at `native_grid`; `resample_grid` takes it to another grid.

        Returns:
            (B, h, w, T) on the teacher's device and in its dtype.

        Raises:
            UserError: images of another shape, type or range; a grid that is not two positive integers.
        """
        _check_images(images)
        grid = self.native_grid if grid is None or not self.any_size else check_grid(grid)
        pixels = self.preprocess(images, grid)
        with torch.autocast(pixels.device.type, enabled=False):
            output = self.run_model(pixels, output_hidden_states=self.layer != -1)
        states = output["last_hidden_state"] if self.layer == -1 else output["hidden_states"][self.layer]
        return states[:, self.extra_tokens :].unflatten(1, grid).contiguous()

    def preprocess(self, images: Tensor, grid: Grid) -> Tensor:
        """Images (B, 3, H, W) in [0, 1] to normalised pixels (B, 3, h · patch, w · patch) of the model's dtype.

        Bicubic with antialiasing and clamped, as PIL resizes.
        """
        size = (grid[0] * self.patch_size, grid[1] * self.patch_size)
        pixels = images.to(self.model.device, torch.promote_types(images.dtype, torch.float32))
        if tuple(pixels.shape[-2:]) != size:
            pixels = interpolate(pixels, size, mode="bicubic", antialias=True).clamp(0, 1)
        mean, std = (pixels.new_tensor(values).view(3, 1, 1) for values in (self.mean, self.std))
        return ((pixels * self.scale - mean) / std).to(self.model.dtype)

    def run_model(self, pixels: Tensor, output_hidden_states: bool) -> ModelOutput:
        """Call the encoder on `pixels` (B, 3, h · patch, w · patch); its states are (B, extra_tokens + h · w, T)."""
        return self.model(pixel_values=pixels, output_hidden_states=output_hidden_states, **self.run_options)

    def fingerprint(self) -> dict[str, Any]:
        """JSON facts that decide the features: caches made under another fingerprint are stale.

        A folder is known by its own name and the content of its files, so a cache survives moving it.
        """
        is_folder = (self.revision or "").startswith("sha256:")
        return {
            "id": os.path.basename(os.path.abspath(self.name)) if is_folder else self.name,
            "revision": self.revision,
            "layer": self.layer,
            "dtype": str(self.model.dtype).removeprefix("torch."),
            "preprocessing": {
                "mean": list(self.mean),
                "std": list(self.std),
                "scale": self.scale,
                "native_grid": list(self.native_grid),
                "resize": "bicubic, antialiased",
            },
        }


def _pair(size: Any) -> tuple[int, int]:
    # Sizes are declared as 224, [224, 224], {"height": 224, "width": 224} or {"shortest_edge": 224, …}.
    if isinstance(size, dict):
        size = (size["height"], size["width"]) if "height" in size else min(size.values())
    height, width = (size, size) if isinstance(size, int) else size
    return int(height), int(width)


def _check_images(images: Tensor) -> None:
    if images.ndim != 4 or images.shape[1] != 3 or not images.is_floating_point():
        raise UserError(f"images must be floating point (B, 3, H, W), got {images.dtype} {tuple(images.shape)}")
    low, high = images.aminmax()
    if not (low >= -0.01 and high <= 1.01):
        raise UserError(f"images must be RGB in [0, 1], got values from {low.item():.3g} to {high.item():.3g}")
