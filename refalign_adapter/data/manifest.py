"""The manifest: a `metadata.jsonl` that names each clip, its caption and the reference images of its subjects.

One JSON object a line; paths are relative to the manifest's folder:

    {"file_name": "clips/0001.mp4", "caption": "a dog runs on a beach", "pair": "cross",
     "references": [{"image": "references/dog.png", "mask": "masks/dog.png", "subject": "dog-1"}]}
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from ..config import unknown_key
from ..errors import ConfigError, UserError
from .rows import PAIRS, Reference, Row

MANIFEST_NAME = "metadata.jsonl"
FIELDS = ("file_name", "caption", "references", "pair")
REFERENCE_FIELDS = ("image", "mask", "box", "subject")


def manifest_path(path: str | Path) -> Path:
    """The manifest itself, for its path or its folder's."""
    path = Path(path)
    return path / MANIFEST_NAME if path.is_dir() else path


def load_manifest(path: str | Path, *, max_references: int | None = None, field: str = "train_data") -> list[Row]:
    """Read a manifest and check that its files exist; clips and images are not opened.

    Args:
        path: the `metadata.jsonl` or its folder.
        max_references: most references that a row may have; None: any number.
        field: what errors call the path.

    Raises:
        UserError: no such manifest, or nothing in it.
        ConfigError: every problem of its rows at once, each with its line.
    """
    path = manifest_path(path)
    try:
        lines = path.read_text(encoding="utf-8-sig").split("\n")
    except (OSError, UnicodeDecodeError) as error:
        reason = getattr(error, "strerror", None) or "not UTF-8 text"
        raise UserError(f"{field}: cannot read {str(path)!r} ({reason}); expected a {MANIFEST_NAME}") from None
    rows: list[Row] = []
    problems: list[str] = []
    seen: dict[Any, int] = {}
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        row, found = _read_row(line, number, path.parent, max_references)
        if row is not None:
            first = seen.setdefault((row.clip, row.caption, row.references), number)
            found = [f"repeats line {first}; remove one of them"] if first != number else []
            rows.append(row)
        problems += [f"line {number}: {problem}" for problem in found]
    if problems:
        raise ConfigError(problems, str(path))
    if not rows:
        raise UserError(f"{field}: {str(path)!r} has no rows")
    return rows


def _read_row(line: str, number: int, folder: Path, max_references: int | None) -> tuple[Row | None, list[str]]:
    """The row, if it can be made, and its problems."""
    try:
        values = json.loads(line)
    except ValueError as error:
        return None, [f"is not JSON ({error})"]
    if not isinstance(values, dict):
        return None, [f"expected an object of fields, got {type(values).__name__}"]
    problems = [unknown_key(key, FIELDS) for key in values if key not in FIELDS]
    problems += _path_problems("file_name", values.get("file_name"), folder)
    caption, pair = values.get("caption"), values.get("pair", "cross")
    if not isinstance(caption, str) or not caption.strip():
        problems.append(f"caption must be text, got {caption!r}")
    if pair not in PAIRS:
        problems.append(f"pair must be one of {', '.join(PAIRS)}, got {pair!r}")
    items = values.get("references")
    if not isinstance(items, list) or not items:
        problems.append(f"references must be a list of at least one, got {items!r}")
        return None, problems
    if max_references is not None and len(items) > max_references:
        problems.append(f"references: {len(items)} are more than max_references ({max_references})")
    for index, item in enumerate(items):
        problems += [f"references.{index}{problem}" for problem in _reference_problems(item, folder)]
    if problems:
        return None, problems
    references = tuple(_reference(item, folder) for item in items)
    name = values["file_name"]
    return Row(name, folder / name, values["caption"].strip(), references, pair, number), []


def _reference(item: dict[str, Any], folder: Path) -> Reference:
    mask, box, subject = item.get("mask"), item.get("box"), item.get("subject")
    return Reference(
        image=folder / item["image"],
        mask=folder / mask if mask is not None else None,
        box=tuple(box) if box is not None else None,
        subject=str(subject) if subject is not None else None,
    )


def _reference_problems(item: Any, folder: Path) -> Iterator[str]:
    if not isinstance(item, dict):
        yield f" must be an object such as {{'image': 'dog.png'}}, got {item!r}"
        return
    yield from (f": {unknown_key(key, REFERENCE_FIELDS)}" for key in item if key not in REFERENCE_FIELDS)
    yield from (f".{problem}" for problem in _path_problems("image", item.get("image"), folder))
    if item.get("mask") is not None:
        yield from (f".{problem}" for problem in _path_problems("mask", item["mask"], folder))
    box = item.get("box")
    numbers = isinstance(box, list) and len(box) == 4 and all(type(value) in (int, float) for value in box)
    if box is not None and not (numbers and box[0] < box[2] and box[1] < box[3]):
        yield f".box must be [left, top, right, bottom] in pixels, got {box!r}"
    if not isinstance(item.get("subject"), (str, int, type(None))):
        yield f".subject must be text, got {item['subject']!r}"


def _path_problems(field: str, value: Any, folder: Path) -> list[str]:
    if not isinstance(value, str) or not value:
        return [f"{field} must be a path, got {value!r}"]
    if not (folder / value).is_file():
        return [f"{field}: {str(folder / value)!r} does not exist"]
    return []
