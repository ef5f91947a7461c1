"""A vision encoder's files: fetched from the Hub or found in a folder, read with one clear line when that fails."""

import hashlib
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
import transformers
from transformers import PreTrainedModel

from ..errors import UserError, WriteError
from ..hashes import file_digest
from ..hub import fetch
from ..json_files import read_json
from ..library_output import quiet_libraries
from ..model_configs import read_model_config

LARGEST_SIDE = 8192
"""Pixels of a side that an encoder may declare as its own size."""
UNGATED_TEACHER = "facebook/dinov2-base"
FILES = ["config.json", "preprocessor_config.json", "processor_config.json", "model*.safetensors", "model*.index.json"]


def local_folder(name: str, revision: str | None = None, files: Sequence[str] = FILES) -> Path:
    """The folder with an encoder's files: `name` itself, or the Hub's snapshot of it, whose folder name is the commit.

    Of a snapshot, `files` (patterns) are fetched.

    Raises:
        UserError: no such folder or repository, no such revision, refused, or neither reachable nor cached.
    """
    if Path(name).is_dir():
        return Path(name)
    try:
        return fetch(name, field="teacher", revision=revision, patterns=files)
    except WriteError:
        raise
    except UserError as error:
        raise UserError(f"{error}; or use {UNGATED_TEACHER!r}, which is open to all") from error


def read_config(folder: Path) -> dict[str, Any]:
    """The encoder's config.json.

    Raises:
        UserError: the file is missing, names no `model_type`, or see `read_model_config`.
    """
    config = read_model_config(folder / "config.json", "teacher")
    if not isinstance(config.get("model_type"), str):
        raise UserError(f"teacher: {str(folder / 'config.json')!r} names no model_type; give a transformers encoder")
    return config


def read_processor(folder: Path) -> dict[str, Any]:
    """What the encoder's preprocessing file declares; empty without such a file.

    The JSON is read and no processor is built: several of transformers' image processors need torchvision.

    Raises:
        UserError: the file is there but is not JSON, or holds values of another kind.
    """
    if (path := folder / "processor_config.json").is_file():
        declared = read_json(path, "teacher")
        if isinstance(declared, dict) and (nested := declared.get("image_processor")):
            return _checked(nested, path)
    path = folder / "preprocessor_config.json"
    return _checked(read_json(path, "teacher"), path) if path.is_file() else {}


def _checked(processor: Any, path: Path) -> dict[str, Any]:
    """What a preprocessing file declares, if those fields that are used hold values that an encoder can have."""
    fields = processor if isinstance(processor, dict) else {"the file": processor}
    for name, value in fields.items():
        allowed = _ALLOWED.get(name, lambda _: isinstance(processor, dict))
        if value is not None and not allowed(value):
            shown = str(value)[:60]
            raise UserError(f"teacher: {str(path)!r}: {name} cannot be {shown}; download the encoder again")
    return processor


def _is_number(value: Any, least: float, most: float) -> bool:
    return type(value) in (int, float) and least <= value <= most


def _are_channels(value: Any, least: float) -> bool:
    return isinstance(value, list) and len(value) == 3 and all(_is_number(item, least, 1000) for item in value)


def _is_size(value: Any) -> bool:
    if isinstance(value, dict):
        known = {"height", "width"} <= set(value) or bool({"shortest_edge", "longest_edge"} & set(value))
        return known and all(_is_side(item) for item in value.values())
    return _is_side(value) or (isinstance(value, list) and len(value) == 2 and all(map(_is_side, value)))


def _is_side(value: Any) -> bool:
    return type(value) is int and 1 <= value <= LARGEST_SIDE


_ALLOWED: dict[str, Callable[[Any], bool]] = {
    "image_mean": lambda value: _are_channels(value, -1000),
    "image_std": lambda value: _are_channels(value, 1e-6),
    "rescale_factor": lambda value: _is_number(value, 1e-9, 1000),
    "size": _is_size,
    "crop_size": _is_size,
    **dict.fromkeys(("do_rescale", "do_normalize", "do_center_crop"), lambda value: isinstance(value, bool)),
}
"""Field of a preprocessing file -> whether a value can be."""


def read_model(folder: Path, model_class: str, dtype: torch.dtype) -> PreTrainedModel:
    """Load a folder's weights into the transformers class called `model_class`; weights it has no use for are left.

    Raises:
        UserError: no safetensors file, an unreadable one, one that lacks some of the model's weights, or holds NaN.
    """
    if not any(folder.glob("*.safetensors")):
        raise UserError(f"teacher: {str(folder)!r} holds no safetensors weights, the only kind that is read")
    loader = getattr(transformers, model_class)
    try:
        with quiet_libraries():  # of the vision half of a text-image model, a table of all other weights
            model, report = loader.from_pretrained(folder, dtype=dtype, use_safetensors=True, output_loading_info=True)
    except Exception as error:  # a library may raise anything about a file that is not as it expects
        raise UserError(f"teacher: cannot load {str(folder)!r} ({' '.join(str(error).split())[:300]})") from error
    if missing := sorted(report["missing_keys"]):
        listed = ", ".join(missing[:3]) + (", …" if len(missing) > 3 else "")
        raise UserError(f"teacher: {str(folder)!r} lacks {len(missing)} weights of {model_class} ({listed})")
    for name, weight in model.named_parameters():
        if not weight.isfinite().all():
            raise UserError(f"teacher: {str(folder)!r}: weight {name!r} is not finite; download the encoder again")
    return model


def content_digest(folder: Path, file_digest: Callable[[Path], str] = file_digest) -> str:
    """sha256 of a folder's config and weight files: stands in for the commit hash that only the Hub knows.

    Args:
        folder: of the encoder.
        file_digest: a file's sha256 in hexadecimal, such as one that remembers.
    """
    digest = hashlib.sha256()
    for path in [folder / "config.json", *sorted(folder.glob("*.safetensors"))]:
        digest.update(bytes.fromhex(file_digest(path)))
    return f"sha256:{digest.hexdigest()}"
