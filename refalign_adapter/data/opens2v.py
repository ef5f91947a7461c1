"""OpenS2V-5M's records (PKU-YuanGroup/OpenS2V-Nexus): one clip with the subjects that its annotators found in a frame.

Real records lack some of the keys that the published description has, so nothing is taken for granted.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from .readers.base import find_clip
from .rows import Reference, RunLengthMask
from .selection import Candidate

SELECTION: dict[str, Any] = {"min_aesthetic": 4.5, "min_gme": 0.6, "max_overlap": 0.95, "max_subjects": 3}
"""Defaults of `select_subjects`, which a source can change."""


class Unusable(Exception):
    """Why a record cannot be trained on, in words that follow a number of records."""


@dataclass(frozen=True)
class Subject:
    """A masked subject of a record.

    Attributes:
        key: its mask's number in the record.
        candidate: its name, mask and scores.
    """

    key: str
    candidate: Candidate


@dataclass(frozen=True)
class Clip:
    """A record that can be trained on.

    Attributes:
        path: the video.
        file_name: as the record names it.
        caption: what happens in it.
        segment: its first frame and the one after its last; None: the whole video.
        crop: (left, top, right, bottom) of the frames, in which the masks are; None: all.
        frame: the annotated one, counted from the video's start.
        subjects: what the frame shows.
        background: names that are no subjects.
    """

    path: Path
    file_name: str
    caption: str
    segment: tuple[int, int] | None
    crop: tuple[int, int, int, int] | None
    frame: int
    subjects: list[Subject]
    background: list[str]

    def reference(self, subject: Subject, name: str | None = None) -> Reference:
        """The subject as a reference."""
        return Reference(
            self.path, frame=self.frame, crop=self.crop, rle=subject.candidate.mask, subject=name or subject.key
        )


def read_clip(record: Any, folders: list[Path]) -> Clip:
    """Make sense of a record.

    Args:
        record: its JSON.
        folders: where its video may be.

    Raises:
        Unusable: it lacks what training needs.
    """
    metadata, annotation = _mapping(record, "metadata"), _mapping(record, "annotation")
    name, caption = metadata.get("path"), metadata.get("face_cap_qwen")
    if isinstance(caption, list):
        caption = next((text for text in caption if isinstance(text, str)), None)
    if not isinstance(caption, str) or not caption.strip():
        raise Unusable("have no caption")
    if not isinstance(name, str) or not name:
        raise Unusable("name no video")
    path = next((path for folder in folders if (path := find_clip(folder, [name]))), None)
    if path is None:
        raise Unusable("have no video here")
    frame = _mapping(annotation, "ann_frame_data")
    number = frame.get("ann_frame_idx")
    if type(number) is not int:
        raise Unusable("have no annotated frame")
    crop = _whole_numbers(metadata.get("crop"), 4)
    segment = _whole_numbers(metadata.get("face_cut") or metadata.get("cut"), 2)
    tags = record.get("word_tags") or {}
    return Clip(
        path=path,
        file_name=name,
        caption=caption.strip(),
        segment=(segment[0], segment[1]) if segment else None,
        crop=(crop[0], crop[2], crop[1], crop[3]) if crop else None,  # x0, x1, y0, y1 in the record
        frame=number,
        subjects=_subjects(annotation, frame, number),
        background=[tag for tag in tags.get("background") or [] if isinstance(tag, str)],
    )


def _subjects(annotation: Mapping[str, Any], frame: Mapping[str, Any], number: int) -> list[Subject]:
    masks = (annotation.get("mask_annotation") or {}).get(str(number)) or {}
    names = annotation.get("mask_map") or {}
    scores = frame.get("annotations") or []
    found = []
    for key, mask in masks.items():
        # Mask i belongs to annotation i - 1.
        score = scores[int(key) - 1] if key.isdigit() and 0 < int(key) <= len(scores) else {}
        name = (names.get(key) or {}).get("class_name") or score.get("class_name") or ""
        size = _whole_numbers(mask.get("size"), 2)
        if size and isinstance(mask.get("counts"), str):
            code = RunLengthMask(size[0], size[1], mask["counts"])
            found.append(Subject(key, Candidate(name, code, score.get("aes_score"), score.get("gme_score"))))
    if not found:
        raise Unusable("have no masks")
    return found


def _mapping(value: Any, key: str) -> Mapping[str, Any]:
    inner = value.get(key) if isinstance(value, Mapping) else None
    if not isinstance(inner, Mapping):
        raise Unusable(f"have no {key}")
    return inner


def _whole_numbers(value: Any, count: int) -> list[int] | None:
    if isinstance(value, list) and len(value) == count and all(isinstance(item, int | float) for item in value):
        return [int(item) for item in value]
    return None
