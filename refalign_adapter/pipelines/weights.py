"""Whether a weights file is what its configuration says. diffusers loads a part of an adapter without an error."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open

from ..branch.attach import attach
from ..config import CONFIG_NAME, RefAlignConfig
from ..errors import UserError
from ..export.adapter import weights_path
from ..export.formats import format_of


def check_weights(transformer: Any, folder: Path, config: RefAlignConfig) -> None:
    """Compare names and shapes in the file with those that the configuration gives on this transformer.

    Args:
        transformer: is not changed.
        folder: of the adapter.
        config: as from `fit_config`.

    Raises:
        UserError: a file that cannot be read, or lacks weights, or has others.
    """
    path, form = weights_path(folder), format_of(config)
    try:
        with safe_open(path, "pt") as file:
            found = {name: tuple(file.get_slice(name).get_shape()) for name in file.keys()}  # noqa: SIM118  # no dict
    except (SafetensorError, OSError) as error:
        raise UserError(f"adapter: {str(path)!r} cannot be loaded ({error})") from None
    with torch.device("meta"):
        branch = attach(type(transformer).from_config(transformer.config), config)
    wanted = {
        form.key(name.replace(f".{branch.adapter_name}.", ".")): tuple(parameter.shape)
        for name, parameter in branch.named_parameters()
    }
    missing, unknown = wanted.keys() - found.keys(), found.keys() - wanted.keys()
    reshaped = {name for name in wanted.keys() & found.keys() if wanted[name] != found[name]}
    if differing := sorted(missing | unknown | reshaped):
        raise UserError(
            f"adapter: {str(path)!r} does not fit {CONFIG_NAME}: {len(missing)} weights are missing, {len(unknown)} "
            f"unknown and {len(reshaped)} of another shape, such as {differing[0]}"
        )


def check_scale(transformer: Any, folder: Path, adapter_name: str, config: RefAlignConfig) -> None:
    """Refuse a loaded LoRA that acts at another strength than the one that was trained.

    Raises:
        UserError: what the file's metadata says, or diffusers assumes without any, is not what the configuration says.
    """
    lora = transformer.peft_config[adapter_name]
    for name in ("r", "lora_alpha", "rank_pattern", "alpha_pattern"):
        if (got := getattr(lora, name)) != getattr(config, name):
            raise UserError(
                f"adapter: {str(weights_path(folder))!r} says {name} {got!r} and {CONFIG_NAME} "
                f"{getattr(config, name)!r}; its metadata was lost, or it belongs to another adapter"
            )
