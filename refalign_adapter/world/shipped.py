"""The world's base and adapter as folders that any command takes: `--base demo --adapter demo`."""

from __future__ import annotations

from pathlib import Path

from ..hashes import file_digest
from .base import ASSETS, unpack_base

FIGURES = "figures.json"
"""Beside the adapter: what `tools/world/evaluate_adapter.py` measured of it."""
NAME = "demo"
"""In place of a folder or a Hub id."""


def demo_base() -> Path:
    """The world's base, a tiny Wan pipeline, as a folder for `WanPipeline.from_pretrained`; no network is needed.

    It is unpacked once, 33 MB beside the Hub's cache (`HF_HOME`), and found there afterwards.

    Raises:
        UserError: that place cannot be written.
    """
    from huggingface_hub.constants import HF_HOME

    digest = file_digest(ASSETS / "base.safetensors")[:12]
    folder = Path(HF_HOME) / "refalign_adapter" / f"demo-base-{digest}"
    return folder if (folder / "model_index.json").is_file() else unpack_base(folder)


def demo_adapter() -> Path:
    """The folder of the adapter that is shipped for the world's base."""
    return ASSETS / "adapter"


def base_named(name: str) -> str:
    """The folder of the world's base for `demo`; any other name as it is, `./demo` too."""
    return str(demo_base()) if name == NAME else name


def adapter_named(name: str) -> str:
    """Likewise of the adapter."""
    return str(demo_adapter()) if name == NAME else name
