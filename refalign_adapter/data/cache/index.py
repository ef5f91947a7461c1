"""What a cache says of itself: `meta.json`, and an index line per row so that training plans without opening files.

cache_dir/meta.json               options, versions of the encoders, the empty text's part, checksums of the lists
cache_dir/index-<split>.jsonl     rows in the manifest's order

`meta.json` is written last. It holds the SHA-256 of the lists beside it (`LISTS`) and a checksum of itself, so that
what is torn, edited, or of a run that was killed between them is told; caches of before 0.2 have none and are taken as
they are. All of it is data that anyone may have written: it is checked by type and range, and a part's key is never a
path.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ...alignment.objective import NAME
from ...atomic import atomic_file
from ...batch import EMBEDDING, REFERENCE
from ...errors import ReadError, UserError
from ...files import require_regular
from ...hashes import file_digest, hash_of
from ...json_files import parse_json, read_bytes, write_json
from .entries import REMEDY, IndexEntry, entry_of, is_count, line_of, text_keys
from .options import ADDED, DTYPES
from .parts import META_NAME, MISSING, NO_FILE

LISTS = ("index", "files")
"""`<list>-<split>.jsonl`; the second is `freshness`'s."""
SUMS, CHECKSUM = "sha256", "checksum"
OLDEST = {"format", "options", "manifests", "teachers", "empty_text", "provenance"}
"""What a `meta.json` without checksums holds, and nothing else."""
FORMAT = 1
"""Raised when what a cache holds changes its meaning: all of it is then made anew."""
MAX_TEXT = 2**26
"""Numbers in one tensor of a caption; 512 tokens of 4,096 are 2**21."""
MAX_TARGET_SIDES = 5
"""Of one reference's or row's: with the two before it of references, no more than a part's file may have."""


def index_path(cache_dir: str | Path, split: str) -> Path:
    """Where a split's index is."""
    return list_path(cache_dir, "index", split)


def list_path(cache_dir: str | Path, name: str, split: str) -> Path:
    """Where one of the `LISTS` of a split is."""
    return Path(cache_dir) / f"{name}-{split}.jsonl"


def check_list(cache_dir: str | Path, name: str, split: str, meta: dict[str, Any]) -> Path | None:
    """Where a list is that is as it was written; None where there is none and none was written.

    Args:
        cache_dir: the cache's folder.
        name: one of `LISTS`.
        split: whose.
        meta: see `read_meta`.

    Raises:
        UserError: it is gone, is no file, cannot be read, or is not what `meta.json` says.
    """
    path = list_path(cache_dir, name, split)
    written = meta.get(SUMS, {}).get(path.name)
    try:
        require_regular(path)
    except FileNotFoundError:
        if written is None:
            return None
        raise UserError(f"cache_dir: {str(path)!r} is gone; {REMEDY}") from None
    except (OSError, ValueError) as error:
        raise _unreadable(path, error, "cannot be read") from None
    if written is not None and file_digest(path) != written:
        raise UserError(
            f"cache_dir: {str(path)!r} is damaged (its checksum is not the one in {META_NAME}: torn, edited, or of a "
            f"run that was stopped); {REMEDY} to make it anew"
        )
    return path


def write_index(cache_dir: str | Path, split: str, entries: Iterable[IndexEntry]) -> None:
    """Write a split's index, atomically."""
    with atomic_file(index_path(cache_dir, split)) as temporary, temporary.open("w", encoding="utf-8") as file:
        file.writelines(json.dumps(line_of(entry)) + "\n" for entry in entries)


def read_index(cache_dir: str | Path, split: str, meta: dict[str, Any] | None = None) -> list[IndexEntry]:
    """Read a split's index.

    Args:
        cache_dir: the cache's folder.
        split: whose rows.
        meta: see `read_meta`; None reads it.

    Raises:
        UserError: it is missing or damaged.
    """
    path = check_list(cache_dir, "index", split, read_meta(cache_dir) if meta is None else meta)
    if path is None:
        raise UserError(f"cache_dir: {str(cache_dir)!r} has no {split} rows; {REMEDY}")
    try:
        with path.open(encoding="utf-8") as file:
            return [entry_of(parse_json(line)) for line in file]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise _unreadable(path, error, "is damaged") from None


def _unreadable(path: Path, error: Exception, what: str) -> UserError:
    """The line for a file of the cache that cannot be read: made anew where it is to blame."""
    if isinstance(error, OSError) and error.errno not in (*MISSING, *NO_FILE):
        return ReadError(
            f"cache_dir: {str(path)!r} cannot be read ({_reason(error)}); look after that disk or its rights"
        )
    return UserError(f"cache_dir: {str(path)!r} {what} ({_reason(error)}); {REMEDY} to make it anew")


def _reason(error: Exception) -> str:
    text = getattr(error, "strerror", None) or str(error)
    return " ".join(text.split())[:200] or type(error).__name__


def write_meta(cache_dir: str | Path, meta: dict[str, Any]) -> None:
    """Write `meta.json` with the checksums of the lists as they are now, and of itself.

    Raises:
        WriteError: it cannot be written.
    """
    sums = {
        path.name: file_digest(path)
        for split in meta["manifests"]
        for path in (list_path(cache_dir, name, split) for name in LISTS)
        if path.is_file()
    }
    sealed = {**meta, SUMS: sums}
    write_json(Path(cache_dir) / META_NAME, {**sealed, CHECKSUM: hash_of(sealed)})


def read_meta(cache_dir: str | Path) -> dict[str, Any]:
    """Read `meta.json`; options that it does not mention because they came later are those it was made with.

    Returns:
        What it says. "targets" are those of all objectives: what has them ("of": "references" or "video") and, by
        teacher id, their shapes, None for sides that rows differ in. "text" says of each argument of the transformer
        that a caption gives its shape (None: as the empty text's) and whether it is a mask, "empty_text" its key.

    Raises:
        UserError: there is no cache, or it is damaged.
    """
    path = Path(cache_dir) / META_NAME
    try:
        meta = parse_json(read_bytes(path))
    except FileNotFoundError:
        raise UserError(f"cache_dir: there is no finished cache in {str(cache_dir)!r}; {REMEDY}") from None
    except (OSError, ValueError) as error:
        raise _unreadable(path, error, "is not readable JSON") from None
    if isinstance(meta, dict) and meta.get("format") != FORMAT:
        raise UserError(f"cache_dir: {str(cache_dir)!r} was made by another version of this package; {REMEDY}")
    if not isinstance(meta, dict) or not _is_sealed(meta) or not _is_meta(meta):
        raise UserError(f"cache_dir: {str(path)!r} is damaged or edited; {REMEDY} to make it anew")
    return {
        **meta,
        "options": {**ADDED, **meta["options"]},
        "targets": _targets(meta),
        "text": meta.get("text") or _embeddings(meta["options"]["max_sequence_length"]),
        "empty_text": text_keys(meta["empty_text"]),
    }


def listed_texts(text: dict[str, Tensor], length: int) -> dict[str, Any]:
    """What `meta.json` says of texts, see `read_meta`; of embeddings alone nothing, as before there was anything else.

    Args:
        text: the transformer's argument -> (1, …), as `Encoders.texts`.
        length: the options' max_sequence_length.
    """
    sizes = {name: list(tensor.shape[1:]) for name, tensor in text.items()}
    if set(sizes) == {EMBEDDING} and len(sizes[EMBEDDING]) == 2 and sizes[EMBEDDING][0] == length:
        return {}
    return {"text": {name: {"shape": sizes[name], "mask": text[name].dtype == torch.bool} for name in sizes}}


def _embeddings(length: int) -> dict[str, Any]:
    return {EMBEDDING: {"shape": [length, None], "mask": False}}


def listed_targets(targets: dict[str, Any]) -> dict[str, Any]:
    """What `meta.json` says of targets, see `read_meta`: reference alignment's are "teachers" with their widths, as
    before there were others, and the others are there where there are any."""
    teachers = targets.get(REFERENCE, {"shapes": {}})["shapes"]
    others = {objective: facts for objective, facts in targets.items() if objective != REFERENCE}
    widths = {name: shape[-1] for name, shape in teachers.items()}
    return {"teachers": widths, **({"targets": others} if others else {})}


def _targets(meta: dict[str, Any]) -> dict[str, Any]:
    shapes = {name: [None, None, width] for name, width in meta["teachers"].items()}
    references = {REFERENCE: {"of": "references", "shapes": shapes}} if shapes else {}
    return {**references, **meta.get("targets", {})}


def _is_sealed(meta: dict[str, Any]) -> bool:
    """Whether it is as it was written, as far as can be told."""
    if CHECKSUM not in meta:
        return set(meta) == OLDEST
    sums = meta.get(SUMS)
    rest = {name: value for name, value in meta.items() if name != CHECKSUM}
    return isinstance(sums, dict) and meta[CHECKSUM] == hash_of(rest)


def _is_meta(meta: dict[str, Any]) -> bool:
    """Whether everything that readers take from it is of the right type."""
    sections = {name: meta.get(name) for name in ("options", "teachers", "manifests", "provenance")}
    if not all(isinstance(value, dict) for value in sections.values()):
        return False
    video = meta["provenance"].get("video")
    return (
        _are_texts(meta)
        and all(is_count(width, 1) for width in meta["teachers"].values())
        and _are_targets(meta.get("targets", {}))
        and is_count(meta["options"].get("max_sequence_length"), 1)
        and isinstance(video, dict)
        and isinstance(video.get("dtype"), str)
        and video["dtype"] in DTYPES
    )


def _are_texts(meta: dict[str, Any]) -> bool:
    try:
        keys = text_keys(meta.get("empty_text"))
    except ValueError:
        return False
    facts = meta.get("text", {EMBEDDING: {"shape": [1], "mask": False}})
    return (
        isinstance(facts, dict)
        and set(facts) == set(keys)
        and all(
            isinstance(value, dict)
            and set(value) == {"shape", "mask"}
            and isinstance(value["mask"], bool)
            and _is_shape(value["shape"])
            and None not in value["shape"]
            and math.prod(value["shape"]) <= MAX_TEXT
            for value in facts.values()
        )
    )


def _are_targets(values: Any) -> bool:
    return isinstance(values, dict) and all(
        NAME.fullmatch(objective)
        and objective != REFERENCE
        and isinstance(value, dict)
        and value.get("of") in ("references", "video")
        and isinstance(value.get("shapes"), dict)
        and all(map(_is_shape, value["shapes"].values()))
        for objective, value in values.items()
    )


def _is_shape(value: Any) -> bool:
    sides = isinstance(value, list) and 0 < len(value) <= MAX_TARGET_SIDES
    return sides and all(side is None or is_count(side, 1) for side in value) and value[-1] is not None
