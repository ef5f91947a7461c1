"""Your own clips: a folder with a `metadata.jsonl` (or .csv, .parquet) that names each clip and its references.

One object a line; paths are relative to the table's folder:

    {"file_name": "clips/0001.mp4", "caption": "a dog runs on a beach", "pair": "cross",
     "references": [{"image": "references/dog.png", "mask": "masks/dog.png", "subject": "dog-1"}]}

Without a caption, it is read from the `.txt` beside the clip. A reference without an image is a frame of the clip
itself, {"frame": 12, "mask": "masks/0001.png"} or with a box in place of the mask. In CSV, the column of references
is the JSON text of the list. A clip without references, an empty list or none, is trained on by its caption alone.
"""

from __future__ import annotations

import codecs
import math
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path, PurePosixPath
from typing import Any

from ....config import unknown_key
from ....errors import UserError, one_line, shorten
from ....json_files import decode_text, parse_json, read_bytes
from ..locate import escapes, find_file
from ..rows import PAIRS, Reference, Row
from ..tables import TABLE_SUFFIXES, is_hub_id, local_path, read_table
from .base import Reader, Reading, Source, clip_folder

TABLES = ("metadata.jsonl", "metadata.csv", "metadata.parquet")
CLIPS = (".mp4", ".mov", ".mkv", ".webm", ".avi")
MAX_CAPTION = 2**20
"""Bytes of a caption file."""
FIELDS = ("file_name", "caption", "references", "pair")
REFERENCE_FIELDS = ("image", "frame", "mask", "box", "subject")
EXAMPLE = '{"file_name": "a.mp4", "caption": "…", "references": [{"image": "a.png"}]}'


class FolderReader(Reader):
    """See the module."""

    def tables(self, source: Source) -> list[Path]:
        path = local_path(source.path, TABLES, revision=source.revision)
        if path.suffix.lower() in CLIPS:
            raise UserError(f"{str(path)!r} is a clip; name the folder with the clips and their {TABLES[0]}")
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
        raise UserError(f"{str(path)!r} has no {TABLES[0]}; write one with a line such as {EXAMPLE} for each clip")

    def read(self, source: Source, *, max_references: int | None = None) -> Reading:
        (table,) = self.tables(source)
        records = list(read_table(table, source.max_rows))
        if is_hub_id(source.path):
            local_path(source.path, _named_files(records), revision=source.revision)
        reading, seen, from_hub = Reading(), {}, is_hub_id(source.path)
        place = "line" if table.suffix not in TABLE_SUFFIXES[2:] else "row"
        for number, values in records:
            row, problems = _read_row(values, clip_folder(source, table.parent), table.parent, max_references)
            outside = [name for name in _names(values) if escapes(name)]
            if outside and from_hub:
                problems.append(
                    f"names {shorten(outside[0])}, outside the data set's folder, which one from the Hub may not"
                )
            elif outside:
                reading.outside.append(f"{place} {number}: {shorten(outside[0])}")
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
        clip, *named = _names(values) or [""]
        if clip and not escapes(clip):
            names += [
                clip,
                str(PurePosixPath(clip).with_suffix(".txt")),
                *(name for name in named if not escapes(name)),
            ]
    return names


def _names(values: Any) -> list[str]:
    """The files that a row names, the clip first."""
    if not isinstance(values, dict):
        return []
    listed = _listed(values.get("references"))
    items = [item for item in listed if isinstance(item, dict)] if isinstance(listed, list) else []
    named = [values.get("file_name"), *(item.get(name) for item in items for name in ("image", "mask"))]
    return [name for name in named if isinstance(name, str) and name]


def _listed(references: Any) -> Any:
    """The list of references, given as such or as JSON text."""
    if not isinstance(references, str):
        return references
    try:
        return parse_json(references)
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
        beside = (find_file(clips, str(name)) or clips / str(name)).with_suffix(".txt")
        try:
            caption = _read_caption(beside)
        except UserError as error:
            problems.append(str(error))
            caption = "?"
    if isinstance(caption, int | float) and not isinstance(caption, bool) and math.isfinite(caption):
        caption = f"{caption:.15g}"  # a table's column of numbers
    if not isinstance(caption, str) or not caption.strip():
        problems.append(f"caption must be text, got {shorten(caption)}")
    if not isinstance(values.get("pair", ""), str | None) or (values.get("pair") or PAIRS[0]) not in PAIRS:
        problems.append(f"pair must be one of {', '.join(PAIRS)}, got {shorten(values['pair'])}")
    items = [] if items is None else items
    if not isinstance(items, list):
        problems.append(f"references must be a list, empty where there are none, got {shorten(items)}")
        return None, problems
    if max_references is not None and len(items) > max_references:
        problems.append(f"references: {len(items)} are more than max_references ({max_references})")
    for index, item in enumerate(items):
        problems += [f"references.{index}{problem}" for problem in _reference_problems(item, folder)]
    if problems:
        return None, problems
    clip = find_file(clips, str(name)) or clips / str(name)
    references = tuple(_reference(item, folder, clip) for item in items)
    own = any(reference.frame is not None for reference in references)
    pair = values.get("pair") or ("regular" if own else "cross")
    return Row(str(name), clip, str(caption).strip(), references, pair, caption_file=beside), []


def _read_caption(path: Path) -> str:
    """A caption file's text: UTF-8, or UTF-16 with its byte order mark, as Windows writes it.

    Raises:
        UserError: it is missing, empty or in another encoding.
    """
    try:
        content = read_bytes(path, max_bytes=MAX_CAPTION)
        is_16 = content.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE))
        text = content.decode("utf-16") if is_16 else decode_text(content)
    except FileNotFoundError:
        raise UserError(f"caption is missing, and there is no {str(path)!r}; write one of the two") from None
    except (OSError, ValueError) as error:
        reason = getattr(error, "strerror", None) or one_line(error)
        raise UserError(f"caption: cannot read {str(path)!r} ({reason})") from None
    if not text.strip():
        raise UserError(f"caption: {str(path)!r} is empty")
    return text


def _reference(item: dict[str, Any], folder: Path, clip: Path) -> Reference:
    mask, box, subject = item.get("mask"), item.get("box"), item.get("subject")
    return Reference(
        image=_file(folder, item["image"]) if item.get("image") is not None else clip,
        mask=_file(folder, mask) if mask is not None else None,
        box=(box[0], box[1], box[2], box[3]) if box is not None else None,
        subject=str(subject) if subject is not None else None,
        frame=item.get("frame"),
    )


def _file(folder: Path, name: str) -> Path:
    return find_file(folder, name) or folder / name


def _reference_problems(item: Any, folder: Path) -> Iterator[str]:
    if not isinstance(item, dict):
        yield f" must be an object such as {{'image': 'dog.png'}}, got {shorten(item)}"
        return
    yield from (f": {unknown_key(key, REFERENCE_FIELDS)}" for key in item if key not in REFERENCE_FIELDS)
    frame, mask, box = item.get("frame"), item.get("mask"), item.get("box")
    if frame is None:
        yield from (f".{problem}" for problem in _path_problems("image", item.get("image"), folder))
    elif item.get("image") is not None:
        given = shorten(item["image"])
        yield f".frame {shorten(frame)} is a frame of the clip and excludes an image, got {given}; leave one out"
    elif type(frame) is not int or frame < 0:
        yield f".frame must be a frame's number, counted from 0, got {shorten(frame)}"
    elif mask is None and box is None:
        yield ".frame needs a mask or a box that says what of it is the subject"
    if mask is not None:
        yield from (f".{problem}" for problem in _path_problems("mask", mask, folder))
    if box is not None:
        yield from _box_problems(box)
    if not isinstance(item.get("subject"), (str, int, type(None))) or isinstance(item.get("subject"), bool):
        yield f".subject must be text, got {shorten(item['subject'])}"


def _box_problems(box: Any) -> Iterator[str]:
    numbers = isinstance(box, list) and len(box) == 4 and all(type(value) in (int, float) for value in box)
    if not (numbers and all(map(math.isfinite, box)) and box[0] < box[2] and box[1] < box[3]):
        yield f".box must be [left, top, right, bottom] in pixels, got {shorten(box)}"
    elif 0 <= min(box) and max(box) <= 1 and any(value not in (0, 1) for value in box):
        yield f".box must be in pixels, and {shorten(box)} looks like shares of the picture; multiply by its size"


def _path_problems(field: str, value: Any, folder: Path) -> list[str]:
    if not isinstance(value, str) or not value:
        return [f"{field} must be a path, got {shorten(value)}"]
    if find_file(folder, value) is None:
        return [f"{field}: {shorten(str(folder / value), 400)} does not exist"]
    return []
