"""Findings between the rows of a data set: what occurs twice, and what the set as a whole lacks."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Hashable, Iterator, Sequence
from dataclasses import dataclass
from textwrap import shorten
from typing import Any

from ..sources.rows import Reference, Row
from .findings import Finding
from .inspection import ReferenceLook, RowLook

COMMON_CAPTION = 0.2
"""Share of the rows beyond which a caption cannot be about its own clip."""
COMMON_ROWS = 3
"""Rows that a common caption has at least; in a handful of rows, shares say little."""

CAPTION_SHOWN = 80
"""Characters of a caption in a line."""


@dataclass
class CheckedRow:
    """A row and what was found out about it.

    Attributes:
        split: "train" or "validation".
        table: the main table of its source.
        place: that and its line there.
        own_names: whether its subjects' names are the owner's, and so mean the same in all rows; readers of published
            formats name subjects within a row.
        row, look: itself.
    """

    split: str
    table: str
    place: str
    own_names: bool
    row: Row
    look: RowLook

    def name_of(self, reference: Reference) -> str | None:
        """A subject's name that holds in all rows; plain numbers count the subjects of a row."""
        name = reference.subject
        return name if self.own_names and name is not None and not name.isdigit() else None


def findings_between(rows: Sequence[CheckedRow]) -> list[Finding]:
    """All findings of this module, those of a row with its number."""
    found: list[Finding] = []
    for number, checked in enumerate(rows):
        found += _same_picture(number, checked)
    found += _subject_names(rows)
    found += _repeats(rows)
    found += _leaks(rows)
    return found + list(_whole_set([checked for checked in rows if checked.split == "train"]))


def distinct_subjects(rows: Sequence[CheckedRow]) -> int:
    """Subjects of all rows: by name where names hold in all rows, or else by picture."""
    subjects: set[Hashable] = set()
    for checked in rows:
        for reference, look in _looks(checked):
            name = checked.name_of(reference)
            subjects.add(("name", name) if name is not None else look and look.picture)
    return len(subjects - {None})


def _looks(checked: CheckedRow) -> list[tuple[Reference, ReferenceLook | None]]:
    return list(zip(checked.row.references, checked.look.references, strict=True))


def _of(number: int, checked: CheckedRow, kind: str, text: str) -> Finding:
    return Finding(kind, text, checked.place, checked.row.file_name, number)


def _same_picture(number: int, checked: CheckedRow) -> Iterator[Finding]:
    """Pictures that stand for two subjects of a row, by their files or by what is drawn of them."""
    subjects, looks = checked.row.subjects, checked.look.references
    for later, look in enumerate(looks):
        for first, other in enumerate(looks[:later]):
            alike = look and other and (look.picture == other.picture or look.canvas == other.canvas)
            if alike and subjects[first] != subjects[later]:
                both = " and ".join(_named(checked.row.references, index) for index in (first, later))
                yield _of(number, checked, "same_picture", f"{both} show the same picture")
                break


def _named(references: Sequence[Reference], index: int) -> str:
    item = references[index]
    subject = "no subject name" if item.subject is None else f"subject {item.subject!r}"
    frame = "" if item.frame is None else f" frame {item.frame:g}"
    return f"references.{index} ({item.image.name}{frame}, {subject})"


def _subject_names(rows: Sequence[CheckedRow]) -> Iterator[Finding]:
    """Pictures with one name in a row and another name in a later one."""
    first: dict[str, tuple[str, str]] = {}
    for number, checked in enumerate(rows):
        for index, (reference, look) in enumerate(_looks(checked)):
            name = checked.name_of(reference)
            if look is None or name is None:
                continue
            known = [first.setdefault(key, (name, checked.place)) for key in (look.picture, look.canvas)]
            if other := next((item for item in known if item[0] != name and item[1] != checked.place), None):
                text = f"references.{index}.subject is {name!r}, but the same picture is {other[0]!r} in {other[1]}"
                yield _of(number, checked, "subject_names", text)


def _repeats(rows: Sequence[CheckedRow]) -> Iterator[Finding]:
    """Rows of one content in a split, and clips of one content with other captions or references."""
    whole: dict[Hashable, CheckedRow] = {}
    clips: dict[Hashable, CheckedRow] = {}
    for number, checked in enumerate(rows):
        row, look = checked.row, checked.look
        if look.clip is None:
            continue
        clip = (checked.split, look.clip, row.segment, row.crop)
        pictures = [item and item.picture for item in look.references]
        content = (clip, row.caption, row.pair, *sorted(zip(pictures, row.subjects, strict=True), key=str))
        if None not in pictures and (first := whole.setdefault(content, checked)) is not checked:
            text = f"has the clip, caption and references of {first.place}"
            yield _of(number, checked, "repeated_row", text)
        elif (first := clips.setdefault(clip, checked)) is not checked:
            other = "another caption" if first.row.caption != row.caption else "other references"
            yield _of(number, checked, "repeated_clip", f"file_name: the clip of {first.place}, with {other}")


def _leaks(rows: Sequence[CheckedRow]) -> Iterator[Finding]:
    """Held-out clips that are trained on too, in whole or in part."""
    trained: dict[str, list[CheckedRow]] = defaultdict(list)
    for checked in rows:
        if checked.split == "train" and checked.look.clip is not None:
            trained[checked.look.clip].append(checked)
    for number, checked in enumerate(rows):
        if checked.split == "train" or checked.look.clip is None:
            continue
        shared = (other for other in trained[checked.look.clip] if _overlap(other.row.segment, checked.row.segment))
        if other := next(shared, None):
            text = f"file_name: held out, but also trained on as {other.row.file_name!r} in {other.place}"
            yield _of(number, checked, "leak", text)


def _overlap(one: tuple[int, int] | None, other: tuple[int, int] | None) -> bool:
    return one is None or other is None or (one[0] < other[1] and other[0] < one[1])


def _whole_set(rows: Sequence[CheckedRow]) -> Iterator[Finding]:
    """What is odd about all training rows together."""
    captions: Counter[Any] = Counter(checked.row.caption for checked in rows)
    for caption, count in captions.most_common():
        if count < COMMON_ROWS or count <= COMMON_CAPTION * len(rows):
            break
        text = shorten(caption, CAPTION_SHOWN, placeholder=" …")
        yield Finding("common_caption", f"caption: {count} of {len(rows)} training rows have {text!r}")
    if rows and (subjects := distinct_subjects(rows)) < 2:
        yield Finding(
            "few_subjects",
            f"references: {'one subject' if subjects else 'no subject'} in all training rows ({len(rows)})",
        )
    counts = [len(set(checked.row.subjects)) for checked in rows]
    if without := counts.count(0):
        yield Finding("no_references", f"references: none in {without} of {len(rows)} training rows")
    if max(counts, default=0) == 1:
        most = "at most one" if without else "one"
        yield Finding("one_subject", f"references: {most} subject in each training row ({len(rows)})")
