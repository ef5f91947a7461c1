"""Whether a cache is still that of its files: every clip, picture, mask and caption file it was made of is remembered
by its digest, and so are the encoders.

cache_dir/files-<split>.jsonl    a line per row: [its place in the manifest, {path: sha256}]

Files that look unchanged, by their stamps, are not read; those that are not here any more are nobody's worry: a cache
may be moved without its data. Caches of earlier versions have no such list and are taken as they are.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from ...atomic import atomic_file
from ...batch import REFERENCE
from ...errors import UserError, shorten
from ...json_files import parse_json
from .digests import FileDigests
from .encoders import version_of
from .entries import NAME_LENGTH, REMEDY
from .index import check_list, list_path, read_meta
from .options import CacheOptions

RowFiles = tuple[str, dict[str, str]]
"""A row's place, and path -> sha256 of the files it was made of."""


def files_path(cache_dir: str | Path, split: str) -> Path:
    """Where a split's list of files is."""
    return list_path(cache_dir, "files", split)


def write_files(cache_dir: str | Path, split: str, rows: Iterable[RowFiles]) -> None:
    """Write a split's list, atomically."""
    with atomic_file(files_path(cache_dir, split)) as temporary, temporary.open("w", encoding="utf-8") as file:
        file.writelines(json.dumps([place, files]) + "\n" for place, files in rows)


def check_fresh(options: CacheOptions) -> None:
    """Refuse a cache whose files or encoders have changed since it was made.

    Args:
        options: whose cache, of all splits.

    Raises:
        UserError: how many have changed, the first of them, and how to make the cache anew; or the list of files is
            damaged.
    """
    digests, meta = FileDigests(options.cache_dir), read_meta(options.cache_dir)
    changed = list(_changed_encoders(options, meta, digests))
    for split in options.manifests:
        changed += _changed_files(options.cache_dir, split, meta, digests)
    if changed:
        more = f" and {len(changed) - 1} more" if len(changed) > 1 else ""
        raise UserError(
            f"cache_dir: since the cache in {options.cache_dir!r} was made, {changed[0]}{more} changed; {REMEDY}"
        )


def _changed_files(cache_dir: str | Path, split: str, meta: dict[str, Any], digests: FileDigests) -> list[str]:
    seen: set[str] = set()
    changed = []
    path = check_list(cache_dir, "files", split, meta)
    for place, files in _read(path) if path is not None else ():
        for path, digest in files.items():
            if path not in seen:
                seen.add(path)
                if _digest_now(path, digests) not in (None, digest):
                    changed.append(f"{path!r} of {split} {place}")
    return changed


def _digest_now(path: str, digests: FileDigests) -> str | None:
    try:
        return digests(path)
    except (UserError, ValueError):
        return None


def _read(path: Path) -> Iterator[RowFiles]:
    """The lines that are whole: of a list without a checksum, a damaged one only tells less."""
    try:
        with path.open(encoding="utf-8", errors="replace") as lines:
            for line in lines:
                try:
                    place, files = parse_json(line)
                except (ValueError, TypeError):
                    continue
                if isinstance(files, dict):
                    yield shorten(place) if not isinstance(place, str) else place[:NAME_LENGTH], files
    except OSError as error:
        raise UserError(f"cache_dir: cannot read {str(path)!r} ({error.strerror}); {REMEDY}") from None


def _changed_encoders(options: CacheOptions, meta: dict[str, Any], digests: FileDigests) -> Iterator[str]:
    """The encoders whose files are here and are not what the cache was made with."""
    provenance: dict[str, Any] = meta["provenance"]
    for part, fact, components, name in (
        ("video", "vae", ("vae",), "the VAE"),
        ("text", "encoder", ("text_encoder", "tokenizer"), "the text encoder or tokenizer"),
    ):
        then = _fact(provenance, part, fact, "version")
        now = version_of(options, components, digests) if then else None
        if now is not None and now != then:
            yield f"{name} of {options.base_model!r}"
    for objective, teacher in [(target.objective, name) for target in options.all_targets for name in target.models]:
        made = ("teachers",) if objective == REFERENCE else ("targets", objective)
        then = _fact(provenance, *made, teacher, "teacher", "revision")
        if then and os.path.isdir(teacher) and (now := _teacher_version(teacher, digests)) not in (None, then):
            yield f"the teacher {teacher!r}"


def _fact(values: Any, *names: str) -> Any:
    for name in names:
        values = values.get(name) if isinstance(values, dict) else None
    return values


def _teacher_version(folder: str, digests: FileDigests) -> str | None:
    from ...teachers._hub import content_digest

    if not any(Path(folder).glob("*.safetensors")):
        return None
    try:
        return content_digest(Path(folder), digests)
    except (OSError, UserError):
        return None
