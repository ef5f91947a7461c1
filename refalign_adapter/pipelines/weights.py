"""An adapter's weights onto a transformer: first compared with it by names and shapes, then loaded by diffusers."""

from __future__ import annotations

import hashlib
from typing import Any

import torch
from torch import Tensor, nn

from ..branch.lora import lora_parameters
from ..branch.lora_scope import dead_layers
from ..config import CONFIG_NAME
from ..errors import UserError, one_line
from ..export.folder import AdapterFolder
from ..export.layers import by_name
from ..families.base import Family


def check_fits(transformer: Any, family: Family, folder: AdapterFolder) -> None:
    """Compare names and shapes of an adapter's weights with those that it must have on this transformer.

    Args:
        transformer: is not changed.
        family: its family.
        folder: the adapter.

    Raises:
        UserError: weights are missing, or there are others, or a rank is larger than any layer of the base.
    """
    linear = _linear_layers(transformer)
    widest = max((max(shape) for shape in linear.values()), default=0)
    config = folder.config
    if (rank := max([config.r, *config.rank_pattern.values()])) > widest:
        raise UserError(f"adapter: r must be at most {widest}, the width of the base's widest layer, got {rank}")
    wanted = {}
    for name in _wanted_layers(transformer, family, folder, linear):
        rank, (outputs, inputs) = by_name(config.rank_pattern, name, config.r), linear[name]
        wanted |= {f"{name}.lora_A.weight": (rank, inputs), f"{name}.lora_B.weight": (outputs, rank)}
    missing, unknown = wanted.keys() - folder.shapes.keys(), folder.shapes.keys() - wanted.keys()
    reshaped = {name for name in wanted.keys() & folder.shapes.keys() if wanted[name] != folder.shapes[name]}
    if differing := sorted(missing | unknown | reshaped):
        raise UserError(
            f"adapter: {str(folder.weights)!r} does not fit {CONFIG_NAME}: {len(missing)} weights are missing, "
            f"{len(unknown)} unknown and {len(reshaped)} of another shape, such as {folder.form.key(differing[0])}"
        )


def _linear_layers(transformer: Any) -> dict[str, tuple[int, int]]:
    """The base's own linear layers: name without PEFT's wrappers -> (outputs, inputs), quantised ones included."""
    return {
        name.removesuffix(".base_layer"): (module.out_features, module.in_features)
        for name, module in transformer.named_modules()
        if isinstance(module, nn.Linear) and ".lora_" not in name
    }


def _wanted_layers(
    transformer: Any, family: Family, folder: AdapterFolder, linear: dict[str, tuple[int, int]]
) -> list[str]:
    """The layers that the configuration's names mean here, but for those that do nothing in its scope."""
    config = folder.config
    dead: set[str] = set()
    if config.lora_scope == "reference":
        dead = set(dead_layers(transformer, family, config.align_blocks(len(family.blocks(transformer)))))
    named = dict.fromkeys(config.target_modules or (), True)
    return [name for name in linear if name not in dead and by_name(named, name, False)]


def load_weights(
    transformer: Any, folder: AdapterFolder, state: dict[str, Tensor], adapter_name: str, pipe: Any = None
) -> None:
    """Load an adapter's LoRA onto `transformer` under `adapter_name`, through diffusers' own loader.

    Args:
        transformer: gets the LoRA on the layers that have weights, in the type they compute in.
        folder: the adapter, see `check_fits`.
        state: its tensors.
        adapter_name: the LoRA's name in PEFT.
        pipe: the pipeline it belongs to, whose offloading is taken off and put on again around it.

    Raises:
        UserError: diffusers refused them.
    """
    options: dict[str, Any] = {"adapter_name": adapter_name, "low_cpu_mem_usage": True, "_pipeline": pipe}
    try:
        transformer.load_lora_adapter(dict(state), prefix=None, metadata=folder.lora_fields(), **options)
    except (ValueError, TypeError, RuntimeError, KeyError, OSError) as error:
        reason = one_line(error)
        raise UserError(f"adapter: {str(folder.weights)!r} cannot be loaded ({reason})") from None
    _keep_precision(transformer, state, adapter_name)


def _keep_precision(transformer: Any, state: dict[str, Tensor], adapter_name: str) -> None:
    """Where the base is stored in 8 bits and computes in more (layerwise casting), PEFT stores the LoRA in 8 bits too,
    with an eighth of its precision; it is put back in the type that is computed in."""
    for name, parameter in lora_parameters(transformer, adapter_name):
        if parameter.is_floating_point() and parameter.element_size() == 1:
            value = state[name.replace(f".{adapter_name}.", ".")]
            parameter.data = value.to(parameter.device, transformer.dtype)


def weights_digest(state: dict[str, Tensor]) -> str:
    """sha256 of an adapter's names, types and values."""
    digest = hashlib.sha256()
    for name, tensor in sorted(state.items()):
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
        digest.update(tensor.contiguous().view(torch.uint8).numpy().data)
    return digest.hexdigest()
