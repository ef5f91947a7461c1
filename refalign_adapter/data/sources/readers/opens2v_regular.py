"""OpenS2V-5M's regular pairs: references are the subjects of the clip's own annotated frame.

`path` is a part's JSON file or a folder of parts, `videos` the folder that the records' paths are relative to (with
several parts, also `videos/<part>`).
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any, ClassVar

from ....errors import UserError
from ..opens2v import SELECTION, Unusable, read_clip
from ..rows import Row
from ..selection import select_subjects
from ..tables import local_path, read_records
from .base import Reader, Reading, Source, clip_folder


class RegularReader(Reader):
    """See the module."""

    options: ClassVar[dict[str, Any]] = SELECTION

    def tables(self, source: Source) -> list[Path]:
        path = local_path(source.path, ["*.json"], revision=source.revision)
        if not path.is_dir():
            return [path]
        if parts := sorted(path.rglob("*.json")):
            return parts
        raise UserError(f"{str(path)!r} has no .json of a part")

    def read(self, source: Source, *, max_references: int | None = None) -> Reading:
        reading = Reading()
        most = min(source.options["max_subjects"], max_references or source.options["max_subjects"])
        for number, (part, record) in enumerate(self._records(source), 1):
            try:
                row = _row(record, part, source, most, number)
            except Unusable as error:
                reading.left_out[str(error)] += 1
            else:
                reading.add(row, ())
            if number == source.max_rows:
                break
        return reading

    def _records(self, source: Source) -> Iterator[tuple[Path, Any]]:
        for part in self.tables(source):
            yield from ((part, record) for _, record in read_records(part))


READER = RegularReader()


def _row(record: Any, part: Path, source: Source, most: int, line: int) -> Row:
    videos = clip_folder(source, part.parent)
    clip = read_clip(record, [videos, videos / part.stem])
    candidates = [subject.candidate for subject in clip.subjects]
    chosen = select_subjects(candidates, background=clip.background, **{**source.options, "max_subjects": most})
    if not chosen:
        raise Unusable("have no subject that passes the selection")
    references = tuple(clip.reference(clip.subjects[index]) for index in chosen)
    return Row(clip.file_name, clip.path, clip.caption, references, "regular", line, clip.segment, clip.crop)
