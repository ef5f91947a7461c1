"""Phantom-Data: clips of Koala-36M with the same subjects in other clips (arXiv 2506.18851).

`path` is the table of pairs (columns vid, video_caption and cross_pair), or the folder that has it, `clips` the table
of the clips (Koala-36M's columns with vid; default: the other parquet file beside it; it is only used to tell apart
clips that are unknown from clips that are not here), `videos` the folder of the clips, named by their vid.

The keys inside cross_pair are not documented, so they are read from the data: whatever names a clip, a frame and a
box. Boxes are in the pixels of a frame scaled down to a long side of 768, as the authors' instructions say; look at
what they cut out before you trust them.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, ClassVar

from ....errors import UserError
from ....json_files import parse_json
from ....media.canvas import Box
from ..rows import Reference, Row
from ..tables import local_path, read_table
from .base import Reader, Reading, Source, clip_folder, find_clip

CLIP_KEYS = ("vid", "video_id", "clip_id", "id")
FRAME_KEYS = ("frame_idx", "frame_index", "frame_id", "frame")
BOX_KEYS = ("bbox_loc", "bbox", "box", "bounding_box", "loc")
SIDES = (("xmin", "ymin", "xmax", "ymax"), ("x_min", "y_min", "x_max", "y_max"))
SUFFIXES = (".mp4", ".mkv", ".webm", ".mov")


class PhantomReader(Reader):
    """See the module; `long_side` is the size that boxes refer to, `max_subjects` how many a row has at most."""

    options: ClassVar[dict[str, Any]] = {"clips": None, "long_side": 768, "max_subjects": 3}

    def tables(self, source: Source) -> list[Path]:
        path = local_path(source.path, ["*.parquet"], revision=source.revision)
        if not path.is_dir():
            pairs = path
        elif found := [table for table in sorted(path.glob("*.parquet")) if "meta_info" not in table.name]:
            pairs = found[0]
        else:
            raise UserError(f"{str(path)!r} has no .parquet file of pairs")
        named = source.options["clips"]
        clips = (
            [Path(named)] if named else [table for table in sorted(pairs.parent.glob("*.parquet")) if table != pairs]
        )
        return [pairs, *clips[:1]]

    def read(self, source: Source, *, max_references: int | None = None) -> Reading:
        pairs, *clips = self.tables(source)
        folder, reading = clip_folder(source, pairs.parent), Reading()
        absent: list[str] = []
        most = min(source.options["max_subjects"], max_references or source.options["max_subjects"])
        for number, record in read_table(pairs, source.max_rows):
            if not isinstance(record, Mapping):
                reading.add(None, [f"row {number}: {record}"])
                continue
            target = _target(record, pairs)
            clip = find_clip(folder, [f"{target}{suffix}" for suffix in SUFFIXES])
            caption = record.get("video_caption")
            references = list(_references(record.get("cross_pair"), folder, source.options["long_side"], pairs))[:most]
            if not isinstance(caption, str) or not caption.strip():
                reading.left_out["have no caption"] += 1
            elif clip is None:
                absent.append(target)
            elif not references:
                reading.left_out["have no reference in a clip that is here"] += 1
            else:
                reading.add(Row(target, clip, caption.strip(), tuple(references), "cross", number), ())
        reading.left_out += _why_absent(absent, clips)
        return reading


READER = PhantomReader()


def _why_absent(absent: list[str], clips: list[Path]) -> Counter[str]:
    """Why -> how many of these clips. Their table has millions of rows and is only read when there is someone to tell
    of."""
    wanted = set(absent)
    tables = clips if wanted else []
    listed = {vid for table in tables for _, row in read_table(table) if (vid := str(_some(row).get("vid"))) in wanted}
    known = listed if clips else wanted
    return Counter("have no video here" if name in known else "are not in the table of clips" for name in absent)


def _target(record: Mapping[str, Any], table: Path) -> str:
    """The clip to train on."""
    name = next((record[key] for key in CLIP_KEYS if key in record), None)
    if name is None or "cross_pair" not in record:
        raise UserError(
            f"{str(table)!r}: expected the columns vid, video_caption and cross_pair, found {_found(record)}"
        )
    return str(name)


def _references(pairs: Any, folder: Path, long_side: int, table: Path) -> Iterator[Reference]:
    """The first counterpart of each noun phrase whose clip is here."""
    for phrase, pair in _mapping(pairs, table, "cross_pair").items():
        results = _mapping(pair, table, f"cross_pair[{phrase!r}]").get("refer_result")
        for item in _flat(results):
            clip, frame, box = _item(item, table)
            path = find_clip(folder, [f"{clip}{suffix}" for suffix in SUFFIXES])
            if path:
                yield Reference(path, box=box, subject=str(phrase), frame=frame, long_side=long_side)
                break


def _mapping(value: Any, table: Path, place: str) -> Mapping[str, Any]:
    """A mapping given as such, as JSON text, or as the (key, value) pairs that Parquet has."""
    if isinstance(value, str):
        try:
            value = parse_json(value)
        except ValueError:
            raise UserError(f"{str(table)!r}: {place} is not JSON, got {value[:60]!r}") from None
    if isinstance(value, list) and all(_is_pair(item) for item in value):
        value = dict(value)
    if not isinstance(value, Mapping):
        raise UserError(f"{str(table)!r}: {place} must be a mapping, found {_found(value)}")
    return {key: item for key, item in value.items() if item is not None}


def _is_pair(item: Any) -> bool:
    return isinstance(item, list | tuple) and len(item) == 2 and isinstance(item[0], str)


def _some(value: Any) -> Mapping[str, Any]:
    return value if isinstance(value, Mapping) else {}


def _flat(items: Any) -> Iterator[Any]:
    """Items of lists in lists; a single item is a list of one."""
    if isinstance(items, list | tuple):
        for item in items:
            yield from _flat(item)
    elif items is not None:
        yield items


def _item(item: Any, table: Path) -> tuple[str, float, Box]:
    """Clip, share of its frames, box."""
    if isinstance(item, Mapping):
        clip = next((item[key] for key in CLIP_KEYS if isinstance(item.get(key), str)), None)
        frame = next((share for key in FRAME_KEYS if (share := _number(item.get(key))) is not None), None)
        box = _box(item)
        if clip is not None and frame is not None and 0 <= frame <= 1 and box is not None:
            return clip, frame, box
    raise UserError(
        f"{str(table)!r}: an item of cross_pair must have a clip's id, a frame in [0, 1] and a box, "
        f"found {_found(item)}"
    )


def _box(item: Mapping[str, Any]) -> Box | None:
    listed = next((item[key] for key in BOX_KEYS if item.get(key) is not None), None)
    for names in SIDES:
        for holder in (item, listed):
            if isinstance(holder, Mapping) and all(name in holder for name in names):
                listed = [holder[name] for name in names]
    sides = [_number(side) for side in _flat(listed)]
    if len(sides) != 4 or None in sides:
        return None
    left, top, right, bottom = (float(side or 0) for side in sides)
    return (left, top, right, bottom) if left < right and top < bottom else None


def _number(value: Any) -> float | None:
    try:
        number = float(value)
    except (TypeError, ValueError, OverflowError):
        return None
    return number if math.isfinite(number) else None


def _found(value: Any) -> str:
    """A value in short: keys with their types' names."""
    if isinstance(value, Mapping):
        return "{" + ", ".join(f"{key}: {type(item).__name__} {str(item)[:30]}" for key, item in value.items()) + "}"
    return f"{type(value).__name__} {str(value)[:60]}"
