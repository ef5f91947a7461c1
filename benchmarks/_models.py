"""A model of any size with random weights, copies of it that share them, and what it is given.

Shape letters: B batch, C latent channels, F latent frames, H and W latent height and width, M references, h and w
latent height and width of a reference, S text tokens, D text width.
"""

from __future__ import annotations

import copy
from typing import Any

import torch
from _setting import Setting, Size
from accelerate import init_empty_weights
from accelerate.utils import set_module_tensor_to_device
from diffusers import LTXVideoTransformer3DModel, WanTransformer3DModel
from torch import Tensor, nn

from refalign_adapter.families.base import Text
from refalign_adapter.families.lookup import load_family
from refalign_adapter.media.canvas import reference_size

TEXT_WIDTH = 4096
"""Of every Wan and of LTX-Video."""


def random_transformer(setting: Setting) -> Any:
    """A model with random weights, frozen, in eval mode; what diffusers keeps in float32 is in float32.

    It is made block by block, so that a model in four bits never needs the memory of one in sixteen.
    """
    size, device, dtype = setting.size, setting.device, setting.dtype
    with init_empty_weights(include_buffers=False):
        transformer = _FAMILIES[size.family](size)
    for block in load_family(transformer).blocks(transformer):
        _fill(block, device, dtype)
        if setting.nf4:
            _quantise(block, device, dtype)
    _fill(transformer, device, dtype)
    vars(transformer)["is_loaded_in_4bit"] = setting.nf4  # by this PEFT knows
    if setting.backend is not None:
        transformer.set_attention_backend(setting.backend)
    transformer.rope.to(device)
    return transformer.eval().requires_grad_(False)


def _wan(size: Size) -> WanTransformer3DModel:
    return WanTransformer3DModel(
        num_attention_heads=size.heads,
        attention_head_dim=size.dim // size.heads,
        in_channels=size.channels,
        out_channels=size.channels,
        text_dim=TEXT_WIDTH,
        ffn_dim=size.ffn,
        num_layers=size.layers,
    )


def _ltx(size: Size) -> LTXVideoTransformer3DModel:
    return LTXVideoTransformer3DModel(
        num_attention_heads=size.heads,
        attention_head_dim=size.dim // size.heads,
        in_channels=size.channels,
        out_channels=size.channels,
        cross_attention_dim=size.dim,
        caption_channels=TEXT_WIDTH,
        num_layers=size.layers,
    )


_FAMILIES = {"wan": _wan, "ltx": _ltx}


def _fill(module: nn.Module, device: str, dtype: torch.dtype) -> None:
    """Random weights where there are none yet."""
    kept = WanTransformer3DModel._keep_in_fp32_modules or ()  # other families name none
    for name, parameter in list(module.named_parameters()):
        if parameter.device.type != "meta":
            continue
        own = torch.float32 if any(part in kept for part in name.split(".")) else dtype
        value = torch.empty(parameter.shape, dtype=own, device=device)
        if parameter.ndim == 1:
            value.fill_(float(name.endswith("weight")))  # of a norm, or a bias
        else:
            value.normal_(std=0.02)
        set_module_tensor_to_device(module, name, device, value, dtype=own)


def _quantise(block: nn.Module, device: str, dtype: torch.dtype) -> None:
    """Put NF4 layers of bitsandbytes in place of all linear ones."""
    import bitsandbytes as bnb

    for name, linear in list(block.named_modules()):
        if isinstance(linear, nn.Linear):
            layer = bnb.nn.Linear4bit(
                linear.in_features, linear.out_features, compute_dtype=dtype, quant_type="nf4", device="meta"
            )
            weight: Any = bnb.nn.Params4bit
            layer.weight = weight(linear.weight.data, requires_grad=False, quant_type="nf4", module=layer)
            layer.bias = linear.bias
            block.set_submodule(name, layer.to(device))


def sharing_weights(transformer: Any) -> Any:
    """A copy whose modules, hooks and processors are its own and whose weights are the same tensors."""
    return copy.deepcopy(transformer, {id(parameter): parameter for parameter in transformer.parameters()})


def random_video(setting: Setting) -> Tensor:
    """Latents (B, C, F, H, W), float32."""
    size = setting.size
    return torch.randn(setting.batch, size.channels, size.frames, size.height, size.width, device=setting.device)


def random_text(setting: Setting, transformer: Any) -> Text:
    """Of a whole prompt's tokens: embeddings (B, S, D), float32, and what goes with them."""
    like = torch.empty(setting.batch, device=setting.device)
    text = load_family(transformer).no_text(transformer, like, setting.size.text_tokens)
    return {
        name: torch.ones_like(value) if value.dtype == torch.bool else torch.randn_like(value)
        for name, value in text.items()
    }


def call_arguments(setting: Setting, transformer: Any) -> dict[str, Any]:
    """Arguments of a pass, floating point ones in the base's type, timesteps as the pipeline gives them."""
    sigmas = torch.full((setting.batch,), 0.5, device=setting.device)
    text = random_text(setting, transformer)
    arguments = load_family(transformer).forward_arguments(transformer, random_video(setting), sigmas, text)
    if setting.size.timestep_per_token:
        arguments["timestep"] = arguments["timestep"][:, None].expand(-1, setting.size.tokens)
    return {name: value.to(setting.dtype) if _is_latent_or_text(value) else value for name, value in arguments.items()}


def _is_latent_or_text(value: Any) -> bool:
    return isinstance(value, Tensor) and value.is_floating_point() and value.ndim > 2


def random_references(setting: Setting, *, economical: bool) -> tuple[Tensor, Tensor | None]:
    """Latents (B, C, M, h, w), float32, and (B, M, rows, columns) bool of the tokens that are kept; None: all are.

    Args:
        setting: says how many, and how large economical ones are.
        economical: whether they are on the setting's own canvas, without its dropped tokens (the last ones, as below a
            wide subject), or full-size on the video's.
    """
    patch = setting.size.patch
    scale, dropped = (setting.scale, setting.dropped) if economical else (1.0, 0.0)
    height, width = reference_size(setting.size.height, setting.size.width, scale, (patch, patch))
    shape = setting.batch, setting.references
    latents = torch.randn(shape[0], setting.size.channels, shape[1], height, width, device=setting.device)
    rows, columns = height // patch, width // patch
    left_out = min(round(dropped * rows * columns), rows * columns - 1)
    if not left_out:
        return latents, None
    tokens = torch.ones(*shape, rows * columns, dtype=torch.bool, device=setting.device)
    tokens[..., -left_out:] = False
    return latents, tokens.unflatten(2, (rows, columns))
