"""What the parts of a row have to hold: shapes, types."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch

from .entries import IndexEntry
from .options import DTYPES
from .parts import Expected, PartStore, target_part

File = tuple[str, str]
"""Part and key."""


def text_contents(meta: dict[str, Any], store: PartStore) -> dict[str, Expected]:
    """What every caption's parts have to hold, by the transformer's argument; where a cache says no width, as wide as
    the empty text's, where that can be read.

    Args:
        meta: see `read_meta`.
        store: the cache's parts.
    """
    dtype, contents = stored_type(meta), {}
    for name, facts in meta["text"].items():
        _, *rest = facts["shape"]
        if None in rest:
            rest = (store.shape("text", meta["empty_text"][name]) or (None, *rest))[1:]
        contents[name] = Expected((None, *rest), None if facts["mask"] else dtype)
    return contents


def stored_type(meta: dict[str, Any]) -> torch.dtype:
    """Of all parts but masks."""
    return DTYPES[meta["provenance"]["video"]["dtype"]]


def row_contents(
    entry: IndexEntry, meta: dict[str, Any], text: dict[str, Expected]
) -> Iterator[tuple[File, Expected]]:
    """What one row's files have to hold.

    Args:
        entry: the row.
        meta: see `read_meta`.
        text: see `text_contents`.
    """
    parts, shown, dtype = entry.parts, (entry.variants, len(entry.subjects)), stored_type(meta)
    options = meta["options"]
    # Then a reference's canvas is as large as the video.
    whole = options.get("reference_scale") == 1.0 and options.get("reference_size") is None
    canvas = entry.shape[2:] if whole else (None, None)
    yield ("video", parts.video), Expected(entry.shape, dtype)
    if parts.references is not None:
        yield ("references", parts.references), Expected((*shown, entry.shape[0], *canvas), dtype)
    for name, key in parts.text.items():
        if name in text:
            yield ("text", key), text[name]
    for objective, keys in parts.targets.items():
        facts = meta["targets"].get(objective, {"of": "", "shapes": {}})
        before = shown if facts["of"] == "references" else ()
        for name, key in keys.items():
            if name in facts["shapes"]:
                yield (target_part(objective), key), Expected((*before, *facts["shapes"][name]), dtype)
    if parts.tokens:
        yield ("tokens", parts.tokens), Expected((*shown, None, None), None)
