"""Small adapters with random weights that make a visible difference, and what compares two states of a transformer."""

import json
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from tiny_models import tiny_transformer

import refalign_adapter as ra
from refalign_adapter.export.formats import FORMATS

SIZE = {"height": 32, "width": 48, "num_frames": 5}
"""Of the smallest interesting video: 2 latent frames of 4 x 6, 2 x 3 tokens each."""

CONFIG: dict[str, Any] = {
    "attention": "joint",
    "r": 4,
    "lora_alpha": 8,
    "align_layers": 2,
    "max_sequence_length": 16,
}


OF_DIFFUSERS = {"_hf_peft_config_loaded", "_diffusers_hook", "_safe_fusing", "lora_scale"}
"""Attributes that diffusers' own LoRA loader, `fuse_lora` and `cache_context` leave behind."""


def save_tiny_adapter(folder: str | Path, transformer: Any = None, **changes: Any) -> Path:
    """Write a joint adapter for `tiny_transformer()`, or what `changes` of its config's fields make of it."""
    transformer = tiny_transformer() if transformer is None else transformer
    branch = ra.attach(transformer, ra.RefAlignConfig(**CONFIG | changes), seed=0)
    generator = torch.Generator().manual_seed(1)
    for name, parameter in branch.named_parameters():
        if "lora_B" in name:
            parameter.data = 0.1 * torch.randn(parameter.shape, generator=generator)
    branch.save_pretrained(folder)
    branch.detach()
    return Path(folder)


def weights_of(folder: str | Path) -> Path:
    """The weights file that belongs to the configuration in an adapter folder, whether it is there or not."""
    scope = json.loads((Path(folder) / "refalign_config.json").read_text())["lora_scope"]
    return Path(folder) / FORMATS[scope].file_name


def picture(seed: int = 0, size: tuple[int, int] = (40, 24), mode: str = "RGB") -> Image.Image:
    """Random blocks of colour; `size` is width, height."""
    generator = torch.Generator().manual_seed(seed)
    blocks = torch.randint(0, 256, (3, 4, 3), generator=generator, dtype=torch.uint8).numpy()
    return Image.fromarray(blocks).resize(size, Image.Resampling.NEAREST).convert(mode)


def anatomy(transformer: Any) -> dict[str, Any]:
    """All that a loaded adapter could leave behind."""
    hooks = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_forward_hooks_with_kwargs")
    return {
        "modules": [(name, type(module)) for name, module in transformer.named_modules()],
        "identities": [id(module) for module in transformer.modules()],
        "hooks": [len(getattr(module, kind)) for module in transformer.modules() for kind in hooks],
        "processors": list(map(id, getattr(transformer, "attn_processors", {}).values())),
        "parameters": [(name, p.requires_grad, p.dtype) for name, p in transformer.named_parameters()],
        "attributes": sorted(set(vars(transformer)) - OF_DIFFUSERS),
        "peft": bool(getattr(transformer, "_hf_peft_config_loaded", False)),
        "training": [module.training for module in transformer.modules()],
    }


def velocity(transformer: Any, seed: int = 0) -> torch.Tensor:
    """One call of the transformer on fixed random inputs."""
    generator = torch.Generator().manual_seed(seed)
    draw = lambda *shape: torch.randn(shape, generator=generator).to(transformer.dtype)  # noqa: E731
    arguments = {"hidden_states": draw(1, 16, 2, 4, 6), "encoder_hidden_states": draw(1, 5, 32)}
    with torch.no_grad():
        return transformer(**arguments, timestep=torch.tensor([500.0]), return_dict=False)[0]
