"""The adapter folder: LoRA weights, `refalign_config.json`, model card. It holds one weights file, that of its scope.

The weights file holds LoRA keys only, because diffusers' loader refuses any other; see `formats` for its two forms.
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
from .formats import FORMATS, PREFIX, STOCK, WeightsFormat, format_of

WEIGHTS_NAME = STOCK.file_name
METADATA_FIELDS = ("r", "lora_alpha", "rank_pattern", "alpha_pattern", "target_modules")
FILE_NAMES = tuple(form.file_name for form in FORMATS.values())


def adapter_state(transformer: Any, adapter_name: str) -> dict[str, Tensor]:
    """The adapter's LoRA weights under PEFT's names, on the CPU."""
    from peft import get_peft_model_state_dict

    state = get_peft_model_state_dict(transformer, adapter_name=adapter_name)
    return {name: tensor.detach().cpu().contiguous() for name, tensor in state.items()}


def lora_metadata(transformer: Any, adapter_name: str, form: WeightsFormat) -> dict[str, str]:
    """safetensors metadata with the fields of the LoraConfig that decide the output, and no other.

    A field that the reader's PEFT does not know is a TypeError there; a missing one is a silently wrong scale.
    """
    config = transformer.peft_config[adapter_name].to_dict()
    fields = {f"{PREFIX}{name}": config[name] for name in METADATA_FIELDS}
    fields = {name: sorted(value) if isinstance(value, set) else value for name, value in fields.items()}
    return {"format": "pt", form.metadata_key: json.dumps(fields, indent=2, sort_keys=True)}


def save_adapter(
    transformer: Any,
    adapter_name: str,
    config: RefAlignConfig,
    folder: str | Path,
    *,
    dtype: torch.dtype | None = None,
) -> Path:
    """Write the adapter folder, atomically; an existing one is replaced, files of other names in it are kept.

    Args:
        transformer: the DiT that carries the LoRA.
        adapter_name: the LoRA's name in PEFT.
        config: saved as `refalign_config.json`; its scope decides the weights file's name and keys.
        folder: where to.
        dtype: storage type of the weights; None keeps theirs.
    """
    from safetensors.torch import save_file

    form = format_of(config)
    state = adapter_state(transformer, adapter_name)
    with atomic_folder(folder) as temporary:
        weights = {form.key(name): tensor.to(dtype or tensor.dtype) for name, tensor in state.items()}
        save_file(weights, temporary / form.file_name, metadata=lora_metadata(transformer, adapter_name, form))
        config.save(temporary)
        (temporary / "README.md").write_text(model_card(config), encoding="utf-8")
    for name in set(FILE_NAMES) - {form.file_name}:  # of an adapter that was here before
        (Path(folder) / name).unlink(missing_ok=True)
    return Path(folder)


def find_adapter(source: str | Path, *, revision: str | None = None, token: str | None = None) -> Path:
    """The local folder of an adapter, fetched from the Hub when `source` is no folder.

    Raises:
        UserError: nothing there, a pickle, or not an adapter folder with the one weights file of its scope.
    """
    path = Path(source)
    if path.is_file():
        kind = "a pickle, which can run code when it is read" if path.suffix in PICKLE_SUFFIXES else "a file"
        raise UserError(f"adapter: {str(source)!r} is {kind}; give the folder that holds {CONFIG_NAME}")
    if not path.is_dir():
        path = _fetch(str(source), revision, token)
    _check_files(path, str(source))
    return path


def _check_files(path: Path, source: str) -> None:
    has_config = (path / CONFIG_NAME).is_file()
    scope = RefAlignConfig.load(path).lora_scope if has_config else "all"
    wanted, there = FORMATS[scope].file_name, [name for name in FILE_NAMES if (path / name).is_file()]
    if has_config and there == [wanted]:
        return
    if has_config and there:
        others = [name for name in there if name != wanted]
        way_out = f"delete {others[0]}" if wanted in there else "save the adapter again"
        raise UserError(
            f"adapter: {source!r} holds {' and '.join(there)}, but {CONFIG_NAME} says lora_scope {scope!r}, whose "
            f"weights are in {wanted} alone; {way_out}"
        )
    pickles = sorted(file.name for file in path.iterdir() if file.suffix in PICKLE_SUFFIXES)
    if pickles and not there:
        raise UserError(f"adapter: {source!r} holds a pickle ({pickles[0]}) instead of {wanted}; pickles are refused")
    missing = [*([] if has_config else [CONFIG_NAME]), *([] if there else [wanted])]
    raise UserError(f"adapter: {source!r} is no adapter folder, it lacks {' and '.join(missing)}")


def _fetch(repo_id: str, revision: str | None, token: str | None) -> Path:
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

    if repo_id.startswith((".", "/", "~")) or repo_id.count("/") != 1:
        raise UserError(f"adapter: folder {repo_id!r} does not exist")
    try:
        patterns = [CONFIG_NAME, *FILE_NAMES]
        return Path(snapshot_download(repo_id, revision=revision, token=token, allow_patterns=patterns))
    except (HfHubHTTPError, HFValidationError, LocalEntryNotFoundError, OSError) as error:
        reason = str(error).strip().splitlines()[0]
        raise UserError(
            f"adapter: {repo_id!r} is neither a folder nor a Hub repository that can be read ({reason})"
        ) from None


def weights_path(folder: Path) -> Path:
    """The weights file of the adapter folder `folder`, by the scope that its configuration says."""
    return folder / format_of(RefAlignConfig.load(folder)).file_name


def read_weights(folder: Path) -> dict[str, Tensor]:
    """The LoRA weights of an adapter folder under PEFT's names, on the CPU.

    Raises:
        SafetensorError, OSError: a file that is damaged or not there.
        UserError: keys of another format.
    """
    from safetensors.torch import load_file

    form = format_of(RefAlignConfig.load(folder))
    return {form.name(key): tensor for key, tensor in load_file(folder / form.file_name).items()}


def read_metadata(folder: Path) -> dict[str, Any] | None:
    """The LoraConfig's fields in the weights file of an adapter folder; None when they were lost.

    Raises:
        SafetensorError, OSError, ValueError: a file that is damaged or not there.
    """
    from safetensors import safe_open

    form = format_of(RefAlignConfig.load(folder))
    with safe_open(folder / form.file_name, "pt") as file:
        text = (file.metadata() or {}).get(form.metadata_key)
    return None if text is None else {name.removeprefix(PREFIX): value for name, value in json.loads(text).items()}


def load_weights(transformer: Any, folder: Path, adapter_name: str, pipe: Any = None) -> None:
    """Load the folder's LoRA onto `transformer` under `adapter_name`, through diffusers' own loader.

    Args:
        transformer: gets the LoRA on the layers that the file names, in the layers' own type.
        folder: of the adapter.
        adapter_name: the LoRA's name in PEFT.
        pipe: the pipeline it belongs to, whose offloading is taken off and put on again around it.

    Raises:
        UserError: weights that are damaged or do not fit the transformer.
    """
    from safetensors import SafetensorError

    try:
        state, metadata = read_weights(folder), read_metadata(folder)
        if metadata is not None:  # the layers that have weights: with the reference scope not all that would match do
            metadata["target_modules"] = sorted({name.rpartition(".lora_")[0] for name in state})
        options: dict[str, Any] = {"adapter_name": adapter_name, "low_cpu_mem_usage": True, "_pipeline": pipe}
        transformer.load_lora_adapter(state, prefix=None, metadata=metadata, **options)
    except (SafetensorError, ValueError, TypeError, RuntimeError, OSError) as error:
        reason = str(error).strip().splitlines()[0]
        raise UserError(f"adapter: {str(weights_path(folder))!r} cannot be loaded ({reason})") from None
