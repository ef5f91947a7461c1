"""Your own clips: a folder with a `metadata.jsonl` (or .csv, .parquet) that names each clip and its references.

One object a line; paths are relative to the table's folder:

    {"file_name": "clips/0001.mp4", "caption": "a dog runs on a beach", "pair": "cross",
     "references": [{"image": "references/dog.png", "mask": "masks/dog.png", "subject": "dog-1"}]}

Without a caption, it is read from the `.txt` beside the clip. A reference without an image is a frame of the clip
itself, {"frame": 12, "mask": "masks/0001.png"} or with a box in place of the mask. In CSV, the column of references
is the JSON text of the list.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

from ...config import unknown_key
from ...errors import UserError
from ..rows import PAIRS, Reference, Row
from ..tables import TABLE_SUFFIXES, is_hub_id, local_path, read_table
from .base import Reader, Reading, Source, clip_folder

TABLES = ("metadata.jsonl", "metadata.csv", "metadata.parquet")
CLIPS = (".mp4", ".mov", ".mkv", ".webm", ".avi")
FIELDS = ("file_name", "caption", "references", "pair")
REFERENCE_FIELDS = ("image", "frame", "mask", "box", "subject")
EXAMPLE = '{"file_name": "a.mp4", "caption": "…", "references": [{"image": "a.png"}]}'


class FolderReader(Reader):
    """See the module."""

    def tables(self, source: Source) -> list[Path]:
        path = local_path(source.path, TABLES, revision=source.revision)
        if not path.is_dir():
            return [path]
        if found := next((path / name for name in TABLES if (path / name).is_file()), None):
            return [found]
        if clips := [item for item in sorted(path.iterdir()) if item.suffix.lower() in CLIPS]:
            captions = sum(clip.with_suffix(".txt").is_file() for clip in clips)
            raise UserError(
                f"{str(path)!r} has {len(clips)} clips and {captions} captions but names no references; "
                f"add a {TABLES[0]} with a line such as {EXAMPLE} for each clip"
            )
        return [path / TABLES[0]]

    def read(self, source: Source, *, max_references: int | None = None) -> Reading:
        (table,) = self.tables(source)
        records = list(read_table(table, source.max_rows))
        if is_hub_id(source.path):
            local_path(source.path, _named_files(records), revision=source.revision)
        reading, seen = Reading(), {}
        place = "line" if table.suffix not in TABLE_SUFFIXES[2:] else "row"
        for number, values in records:
            row, problems = _read_row(values, clip_folder(source, table.parent), table.parent, max_references)
            first = seen.setdefault(row, number) if row else number
            if first != number:
                problems.append(f"repeats {place} {first}; remove one of them")
            reading.add(
                replace(row, line=number) if row else None, (f"{place} {number}: {problem}" for problem in problems)
            )
        return reading


READER = FolderReader()


def _named_files(records: list[tuple[int, Any]]) -> list[str]:
    """Files that rows name, and the captions beside the clips."""
    names: list[str] = []
    for _, values in records:
        if not isinstance(values, dict):
            continue
        clip = str(values.get("file_name"))
        items = [item for item in _listed(values.get("references")) or [] if isinstance(item, dict)]
        named = [item.get(name) for item in items for name in ("image", "mask")]
        names += [clip, str(Path(clip).with_suffix(".txt")), *(name for name in named if isinstance(name, str))]
    return names


def _listed(references: Any) -> Any:
    """The list of references, given as such or as JSON text."""
    if not isinstance(references, str):
        return references
    try:
        return json.loads(references)
    except ValueError:
        return references


def _read_row(values: Any, clips: Path, folder: Path, max_references: int | None) -> tuple[Row | None, list[str]]:
    """The row, if it can be made, and its problems."""
    if isinstance(values, UserError):
        return None, [str(values)]
    if not isinstance(values, dict):
        return None, [f"expected an object of fields, got {type(values).__name__}"]
    problems = [unknown_key(key, FIELDS) for key in values if key not in FIELDS]
    name, items = values.get("file_name"), _listed(values.get("references"))
    found = _path_problems("file_name", name, clips)
    problems += found
    caption, beside = values.get("caption"), None
    if caption is None and not found:
        beside = (clips / str(name)).with_suffix(".txt")
        caption = _caption_beside(clips / str(name))
    if isinstance(caption, int | float):  # a CSV's column of numbers
        caption = str(caption)
    if not isinstance(caption, str) or not caption.strip():
        problems.append(f"caption must be text, got {caption!r}")
    if values.get("pair", PAIRS[0]) not in PAIRS:
        problems.append(f"pair must be one of {', '.join(PAIRS)}, got {values['pair']!r}")
    if not isinstance(items, list) or not items:
        problems.append(f"references must be a list of at least one, got {items!r}")
        return None, problems
    if max_references is not None and len(items) > max_references:
        problems.append(f"references: {len(items)} are more than max_references ({max_references})")
    for index, item in enumerate(items):
        problems += [f"references.{index}{problem}" for problem in _reference_problems(item, folder)]
    if problems:
        return None, problems
    clip = clips / str(name)
    references = tuple(_reference(item, folder, clip) for item in items)
    own = any(reference.frame is not None for reference in references)
    pair = values.get("pair") or ("regular" if own else "cross")
    return Row(str(name), clip, str(caption).strip(), references, pair, caption_file=beside), []


def _caption_beside(clip: Path) -> str | None:
    try:
        return clip.with_suffix(".txt").read_text(encoding="utf-8-sig")
    except (OSError, UnicodeDecodeError):
        return None


def _reference(item: dict[str, Any], folder: Path, clip: Path) -> Reference:
    mask, box, subject = item.get("mask"), item.get("box"), item.get("subject")
    return Reference(
        image=folder / item["image"] if item.get("image") is not None else clip,
        mask=folder / mask if mask is not None else None,
        box=(box[0], box[1], box[2], box[3]) if box is not None else None,
        subject=str(subject) if subject is not None else None,
        frame=item.get("frame"),
    )


def _reference_problems(item: Any, folder: Path) -> Iterator[str]:
    if not isinstance(item, dict):
        yield f" must be an object such as {{'image': 'dog.png'}}, got {item!r}"
        return
    yield from (f": {unknown_key(key, REFERENCE_FIELDS)}" for key in item if key not in REFERENCE_FIELDS)
    frame, mask, box = item.get("frame"), item.get("mask"), item.get("box")
    if frame is None:
        yield from (f".{problem}" for problem in _path_problems("image", item.get("image"), folder))
    elif item.get("image") is not None:
        yield f".frame {frame!r} is a frame of the clip and excludes an image, got {item['image']!r}; leave one out"
    elif type(frame) is not int or frame < 0:
        yield f".frame must be a frame's number, counted from 0, got {frame!r}"
    elif mask is None and box is None:
        yield ".frame needs a mask or a box that says what of it is the subject"
    if mask is not None:
        yield from (f".{problem}" for problem in _path_problems("mask", mask, folder))
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
