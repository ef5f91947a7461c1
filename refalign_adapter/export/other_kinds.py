"""What a file or folder is that is no adapter of this package, and what opens it: people have many kinds."""

from __future__ import annotations

import re
from collections.abc import Collection, Iterable
from pathlib import Path

from ..config import CONFIG_NAME
from ..errors import UserError
from ..files import PICKLE_SUFFIXES
from ..json_files import read_json
from .formats import FACTS_KEY

LORA = re.compile(r"lora|lokr|loha|hada|dora|\.diff(_b)?$", re.IGNORECASE)
CONTROL = re.compile(r"patch_embed|x_embedder|control", re.IGNORECASE)
"""Layers that only a LoRA for more input channels, or for control images, adapts."""
MODEL = re.compile(r"(^|\.)(blocks|transformer_blocks|double_blocks|single_blocks)\.\d+\.")
WHOLE = {
    "model_index.json": "is a whole diffusers pipeline, a base and no adapter; give it as the base",
    "adapter_config.json": "is an adapter of PEFT itself without references; PeftModel.from_pretrained opens it",
}
"""Files by which a folder is known -> what it is."""
CHECKPOINT = re.compile(r"checkpoint-(\d+)")


def describe(folder: Path) -> str | None:
    """What a folder is, as the rest of a sentence that begins with its name; None when that cannot be told."""
    if inside := _adapter_inside(folder):
        return f"is a training run's folder; its adapter is {str(inside)!r}"
    for name, said in WHOLE.items():
        if (folder / name).is_file():
            return said
    if (name := _model_class(folder)) is not None:
        return f"is a whole model ({name}), no adapter; {name}.from_pretrained opens it"
    files = sorted(path for path in folder.iterdir() if path.is_file())
    for path in files:
        if path.suffix == ".safetensors" and (found := _by_keys(path)):
            return f"holds {path.name}, {found}"
    pickles = [path.name for path in files if path.suffix in PICKLE_SUFFIXES]
    return (
        f"holds a pickle ({pickles[0]}), which can run code when it is read; pickles are refused" if pickles else None
    )


def describe_file(path: Path) -> str:
    """What a file is, as the rest of a sentence that begins with its name."""
    if path.suffix in PICKLE_SUFFIXES:
        return f"is a pickle, which can run code when it is read; give the folder that holds {CONFIG_NAME}"
    if path.suffix == ".safetensors":
        if (path.parent / CONFIG_NAME).is_file():
            return f"is one file of an adapter; give its folder, {str(path.parent)!r}"
        if found := _by_keys(path):
            return f"is {found}"
    return f"is a file; give the folder that holds {CONFIG_NAME}"


def describe_keys(keys: Collection[str]) -> str | None:
    """What a safetensors file with these keys is and what opens it; None when that cannot be told."""
    if any(map(LORA.search, keys)):
        if any(CONTROL.search(key) and LORA.search(key) for key in keys):
            return "a control LoRA for further input channels, no reference adapter; its own pipeline opens it"
        return (
            "a LoRA without references (a style, a character, few steps), no reference adapter; load_lora_weights of "
            "the pipeline opens it, beside a reference adapter too"
        )
    if any(map(MODEL.search, keys)):
        return "the weights of a whole model, no adapter; from_single_file of its class in diffusers opens it"
    return None


def adapter_in(names: Iterable[str]) -> str | None:
    """The folder that holds an adapter, by the names of a repository's files; None when none does."""
    found = sorted(name for name in names if name.endswith(f"/{CONFIG_NAME}"))
    return found[0].rpartition("/")[0] if found else None


def describe_repository(repo_id: str, revision: str | None, token: str | None) -> str | None:
    """What a repository of the Hub is, by its files' names and its weights' headers; None when that is not told."""
    from huggingface_hub import HfApi

    api = HfApi(token=token)
    try:
        names = api.list_repo_files(repo_id, revision=revision)
        if (folder := adapter_in(names)) is not None:
            return f"has its adapter in {folder!r}; download it and give that folder"
        for name, said in WHOLE.items():
            if name in names:
                return said
        for name in [name for name in names if name.endswith(".safetensors")][:3]:
            found = describe_keys(list(api.parse_safetensors_file_metadata(repo_id, name, revision=revision).tensors))
            if found:
                return f"holds {name}, {found}"
    except Exception:  # it was reached a moment ago; what it is only makes the refusal clearer
        return None
    return None


def _adapter_inside(folder: Path) -> Path | None:
    """The adapter of a run's or checkpoint's folder; of a run that is not finished, the newest checkpoint's."""
    if (folder / "adapter" / CONFIG_NAME).is_file():
        return folder / "adapter"
    steps = {int(found[1]): path for path in folder.iterdir() if (found := CHECKPOINT.fullmatch(path.name))}
    for step in sorted(steps, reverse=True):
        if (steps[step] / "adapter" / CONFIG_NAME).is_file():
            return steps[step] / "adapter"
    return None


def _model_class(folder: Path) -> str | None:
    try:
        values = read_json(folder / "config.json")
    except UserError:
        return None
    name = values.get("_class_name") if isinstance(values, dict) else None
    return name if isinstance(name, str) and name.isidentifier() and len(name) < 100 else None


def _by_keys(path: Path) -> str | None:
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(path, "np") as file:
            ours = FACTS_KEY in (file.metadata() or {})  # a part of an adapter, whose configuration is what is missing
            return None if ours else describe_keys(list(file.keys()))
    except (SafetensorError, OSError):
        return None
