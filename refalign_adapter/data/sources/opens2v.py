"""OpenS2V-5M's records (PKU-YuanGroup/OpenS2V-Nexus): one clip with the subjects that its annotators found in a frame.

Real records lack some of the keys that the published description has, so nothing is taken for granted.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from .masks import is_well_formed
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
    if type(number) is not int or number < 0:
        raise Unusable("have no annotated frame")
    crop = _whole_numbers(metadata.get("crop"), 4)
    segment = _whole_numbers(metadata.get("face_cut") or metadata.get("cut"), 2)
    if segment and not 0 <= segment[0] < segment[1]:
        raise Unusable("have a cut that holds no frame")
    background = _some(record.get("word_tags")).get("background")
    return Clip(
        path=path,
        file_name=name,
        caption=caption.strip(),
        segment=(segment[0], segment[1]) if segment else None,
        crop=(crop[0], crop[2], crop[1], crop[3]) if crop else None,  # x0, x1, y0, y1 in the record
        frame=number,
        subjects=_subjects(annotation, frame, number),
        background=[tag for tag in background if isinstance(tag, str)] if isinstance(background, list) else [],
    )


def _subjects(annotation: Mapping[str, Any], frame: Mapping[str, Any], number: int) -> list[Subject]:
    masks = _some(_some(annotation.get("mask_annotation")).get(str(number)))
    names, listed = _some(annotation.get("mask_map")), frame.get("annotations")
    # Mask i belongs to annotation i - 1.
    scores = {str(place): _some(score) for place, score in enumerate(listed if isinstance(listed, list) else [], 1)}
    found = []
    for key, mask in masks.items():
        if code := _mask(_some(mask)):
            score = scores.get(key, {})
            name = _some(names.get(key)).get("class_name") or score.get("class_name")
            scored = _number(score.get("aes_score")), _number(score.get("gme_score"))
            found.append(Subject(key, Candidate(name if isinstance(name, str) else "", code, *scored)))
    if not found:
        raise Unusable("have no masks")
    return found


def _mask(value: Mapping[str, Any]) -> RunLengthMask | None:
    """A record's mask, None where it is none that can be decoded."""
    size, counts = _whole_numbers(value.get("size"), 2), value.get("counts")
    if not size or not isinstance(counts, str):
        return None
    mask = RunLengthMask(size[0], size[1], counts)
    return mask if is_well_formed(mask) else None


def _some(value: Any) -> Mapping[str, Any]:
    """What records may lack: a mapping, empty where there is none."""
    return value if isinstance(value, Mapping) else {}


def _number(value: Any) -> float | None:
    known = isinstance(value, int | float) and not isinstance(value, bool)
    return value if known and -math.inf < value < math.inf else None


def _mapping(value: Any, key: str) -> Mapping[str, Any]:
    inner = value.get(key) if isinstance(value, Mapping) else None
    if not isinstance(inner, Mapping):
        raise Unusable(f"have no {key}")
    return inner


def _whole_numbers(value: Any, count: int) -> list[int] | None:
    if not isinstance(value, list) or len(value) != count or any(_number(item) is None for item in value):
        return None
    return [int(item) for item in value]
