"""Writing an adapter folder: LoRA weights, `refalign_config.json`, model card. It holds one weights file, its scope's;
one of r 0 holds none.

The weights file holds LoRA keys only, because diffusers' loader refuses any other; see `formats` for its two forms.
`folder` reads what this writes.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..atomic import atomic_folder
from ..config import RefAlignConfig
from ..tensor_files import save_tensors
from .card import model_card
from .formats import FACTS_KEY, FORMATS, PREFIX, WeightsFormat, format_of, stated_facts
from .layers import layers_of, written_out

METADATA_FIELDS = ("r", "lora_alpha", "rank_pattern", "alpha_pattern", "target_modules")
FILE_NAMES = tuple(form.file_name for form in FORMATS.values())


def adapter_state(transformer: Any, adapter_name: str) -> dict[str, Tensor]:
    """The adapter's LoRA weights under PEFT's names, on the CPU."""
    from peft import get_peft_model_state_dict

    state = get_peft_model_state_dict(transformer, adapter_name=adapter_name)
    return {name: tensor.detach().cpu().contiguous() for name, tensor in state.items()}


def file_metadata(config: RefAlignConfig, form: WeightsFormat) -> dict[str, str]:
    """safetensors metadata with the fields of the LoraConfig that decide the output, and no other.

    A field that the reader's PEFT does not know is a TypeError there; a missing one is a silently wrong scale.

    Args:
        config: with plain names, see `written_out`.
        form: the weights file's.
    """
    values = config.to_dict()
    fields = {f"{PREFIX}{name}": values[name] for name in METADATA_FIELDS}
    return {
        "format": "pt",
        form.metadata_key: json.dumps(fields, indent=2, sort_keys=True),
        FACTS_KEY: json.dumps(stated_facts(config)),
    }


def save_adapter(
    transformer: Any,
    adapter_name: str,
    config: RefAlignConfig,
    folder: str | Path,
    *,
    dtype: torch.dtype | None = None,
) -> Path:
    """Write the adapter folder, atomically; an existing one is replaced, files of other names in it are kept.

    The same weights give the same bytes.

    Args:
        transformer: the DiT that carries the LoRA.
        adapter_name: the LoRA's name in PEFT.
        config: saved as `refalign_config.json`, with the names of layers in place of regular expressions; its scope
            decides the weights file's name and keys.
        folder: where to.
        dtype: storage type of the weights; None keeps theirs.

    Raises:
        WriteError: it cannot be written.
    """
    form = format_of(config) if config.r else None
    state = adapter_state(transformer, adapter_name) if config.r else {}
    config = written_out(config, layers_of(transformer, adapter_name))
    with atomic_folder(folder) as temporary:
        if form is not None:
            weights = {form.key(name): tensor.to(dtype or tensor.dtype) for name, tensor in state.items()}
            save_tensors(temporary / form.file_name, weights, file_metadata(config, form))
        config.save(temporary)
        (temporary / "README.md").write_text(model_card(config), encoding="utf-8")
    for name in set(FILE_NAMES) - {form and form.file_name}:  # of an adapter that was here before
        (Path(folder) / name).unlink(missing_ok=True)
    return Path(folder)
