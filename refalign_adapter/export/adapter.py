"""The adapter folder: LoRA weights that diffusers loads, `refalign_config.json`, model card.

The weights file holds LoRA keys only, prefixed `transformer.`, and its LoraConfig in the metadata, because diffusers'
loader refuses any other key and assumes alpha = r without the metadata.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..config import CONFIG_NAME, RefAlignConfig
from ..errors import UserError
from ..files import PICKLE_SUFFIXES, atomic_folder
from .card import model_card

WEIGHTS_NAME = "pytorch_lora_weights.safetensors"
METADATA_KEY = "lora_adapter_metadata"
METADATA_FIELDS = ("r", "lora_alpha", "rank_pattern", "alpha_pattern", "target_modules")
PREFIX = "transformer"


def adapter_state(transformer: Any, adapter_name: str) -> dict[str, Tensor]:
    """The adapter's LoRA weights under PEFT's names, on the CPU."""
    from peft import get_peft_model_state_dict

    state = get_peft_model_state_dict(transformer, adapter_name=adapter_name)
    return {name: tensor.detach().cpu().contiguous() for name, tensor in state.items()}


def lora_metadata(transformer: Any, adapter_name: str) -> dict[str, str]:
    """safetensors metadata with the fields of the LoraConfig that decide the output, and no other.

    A field that the reader's PEFT does not know is a TypeError there; a missing one is a silently wrong scale.
    """
    config = transformer.peft_config[adapter_name].to_dict()
    fields = {f"{PREFIX}.{name}": config[name] for name in METADATA_FIELDS}
    fields = {name: sorted(value) if isinstance(value, set) else value for name, value in fields.items()}
    return {"format": "pt", METADATA_KEY: json.dumps(fields, indent=2, sort_keys=True)}


def save_adapter(
    transformer: Any,
    adapter_name: str,
    config: RefAlignConfig,
    folder: str | Path,
    *,
    dtype: torch.dtype | None = None,
) -> Path:
    """Write the adapter folder, atomically; an existing one is replaced.

    Args:
        transformer: the DiT that carries the LoRA.
        adapter_name: the LoRA's name in PEFT.
        config: saved as `refalign_config.json`.
        folder: where to.
        dtype: storage type of the weights; None keeps theirs.
    """
    from safetensors.torch import save_file

    state = adapter_state(transformer, adapter_name)
    if dtype is not None:
        state = {name: tensor.to(dtype) for name, tensor in state.items()}
    with atomic_folder(folder) as temporary:
        weights = {f"{PREFIX}.{name}": tensor for name, tensor in state.items()}
        save_file(weights, temporary / WEIGHTS_NAME, metadata=lora_metadata(transformer, adapter_name))
        config.save(temporary)
        (temporary / "README.md").write_text(model_card(config), encoding="utf-8")
    return Path(folder)


def find_adapter(source: str | Path, *, revision: str | None = None, token: str | None = None) -> Path:
    """The local folder of an adapter, fetched from the Hub when `source` is no folder.

    Raises:
        UserError: nothing there, a pickle, or not an adapter folder.
    """
    path = Path(source)
    if path.is_file():
        kind = "a pickle, which can run code when it is read" if path.suffix in PICKLE_SUFFIXES else "a file"
        raise UserError(f"adapter: {str(source)!r} is {kind}; give the folder that holds {WEIGHTS_NAME}")
    if not path.is_dir():
        path = _fetch(str(source), revision, token)
    missing = [name for name in (CONFIG_NAME, WEIGHTS_NAME) if not (path / name).is_file()]
    if not missing:
        return path
    if pickles := sorted(file.name for file in path.iterdir() if file.suffix in PICKLE_SUFFIXES):
        raise UserError(
            f"adapter: {str(source)!r} holds a pickle ({pickles[0]}) instead of {WEIGHTS_NAME}; pickles are refused"
        )
    raise UserError(f"adapter: {str(source)!r} is no adapter folder, it lacks {' and '.join(missing)}")


def _fetch(repo_id: str, revision: str | None, token: str | None) -> Path:
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

    if repo_id.startswith((".", "/", "~")) or repo_id.count("/") != 1:
        raise UserError(f"adapter: folder {repo_id!r} does not exist")
    try:
        patterns = [CONFIG_NAME, WEIGHTS_NAME]
        return Path(snapshot_download(repo_id, revision=revision, token=token, allow_patterns=patterns))
    except (HfHubHTTPError, HFValidationError, LocalEntryNotFoundError, OSError) as error:
        reason = str(error).strip().splitlines()[0]
        raise UserError(
            f"adapter: {repo_id!r} is neither a folder nor a Hub repository that can be read ({reason})"
        ) from None


def load_weights(transformer: Any, folder: Path, adapter_name: str, pipe: Any = None) -> None:
    """Load the folder's LoRA onto `transformer` under `adapter_name`, through diffusers' own loader.

    Raises:
        UserError: weights that are damaged or do not fit the transformer.
    """
    from safetensors import SafetensorError

    try:
        transformer.load_lora_adapter(
            str(folder), weight_name=WEIGHTS_NAME, adapter_name=adapter_name, use_safetensors=True, _pipeline=pipe
        )
    except (SafetensorError, ValueError, RuntimeError, OSError) as error:
        reason = str(error).strip().splitlines()[0]
        raise UserError(f"adapter: {str(folder / WEIGHTS_NAME)!r} cannot be loaded ({reason})") from None
