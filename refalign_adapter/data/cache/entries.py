"""A row of a cache as one line of its index: which parts it has, and what training plans by.

A line is data that anyone may have written: it is checked by type and range, and a part's key is never a path.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

from ...alignment.objective import NAME
from ...batch import EMBEDDING, REFERENCE
from ...config_checks import MAX_NAME
from ...errors import shorten
from .parts import KEY, target_part

REMEDY = "run `refalign cache --config …`"
NAME_LENGTH = 300
"""Characters of a clip's name in a message."""


@dataclass(frozen=True)
class RowParts:
    """Keys of a row's parts (see `PartStore`).

    Attributes:
        video: of the clip.
        references: None of a row without any.
        text: the transformer's argument -> key of what the caption gave for it.
        targets: objective -> teacher id -> key; in a line, "teachers" are reference alignment's.
        tokens: None where all are kept.
    """

    video: str
    references: str | None
    text: dict[str, str]
    targets: dict[str, dict[str, str]]
    tokens: str | None = None

    def files(self) -> list[tuple[str, str]]:
        """(part, key) of every file."""
        parts = [("video", self.video), ("references", self.references)]
        parts += [("text", key) for key in self.text.values()]
        parts += [(target_part(objective), key) for objective, keys in self.targets.items() for key in keys.values()]
        return [(part, key) for part, key in (*parts, ("tokens", self.tokens)) if key is not None]


@dataclass(frozen=True)
class IndexEntry:
    """One row of the cache.

    Attributes:
        key: the row's name, by its content.
        file_name, line: the clip and where its row stands in the manifest.
        parts: which files hold it.
        shape: of its video latents: channels, frames, height, width.
        variants: augmented versions of its references.
        subjects: a number per reference; equal ones are views of one subject.
        source: which of the manifest's sources it is from, counted from 0.
    """

    key: str
    file_name: str
    line: int
    parts: RowParts
    shape: tuple[int, ...]
    variants: int
    subjects: tuple[int, ...]
    source: int = 0

    def place(self, split: str) -> str:
        """The row in a message, in one line of bounded length."""
        name = self.file_name
        if not name.isprintable() or len(name) > NAME_LENGTH:
            name = shorten(name, NAME_LENGTH)
        return f"{split} line {self.line} ({name})"


def line_of(entry: IndexEntry) -> dict[str, Any]:
    """A line, which holds what came later only where there is any: others are as they were before."""
    values, parts = asdict(entry), entry.parts
    others = {objective: keys for objective, keys in parts.targets.items() if objective != REFERENCE}
    added = {"tokens": parts.tokens, "targets": others}
    values["parts"] = {
        "video": parts.video,
        "references": parts.references,
        "text": listed_text(parts.text),
        "teachers": parts.targets.get(REFERENCE, {}),
        **{name: value for name, value in added.items() if value},
    }
    if not entry.source:
        del values["source"]
    return values


def entry_of(values: dict[str, Any]) -> IndexEntry:
    """The entry of a line.

    Raises:
        KeyError, TypeError, ValueError: it is none.
    """
    parts = _parts(**values["parts"])
    shape, subjects = tuple(values["shape"]), tuple(values["subjects"])
    entry = IndexEntry(**{**values, "parts": parts, "shape": shape, "subjects": subjects})
    wrong: list[Any] = [key for key in (entry.key, *(key for _, key in parts.files())) if not is_key(key)]
    counts = {"line": (entry.line, 0), "variants": (entry.variants, 1), "source": (entry.source, 0)}
    wrong += [name for name, (value, least) in counts.items() if not is_count(value, least)]
    if len(shape) != 4 or not all(is_count(side, 1) for side in shape) or not isinstance(entry.file_name, str):
        wrong.append("shape or file_name")
    if (parts.references is None) != (not subjects) or not all(is_count(number, 0) for number in subjects):
        wrong.append("subjects")
    if wrong:
        raise ValueError(f"a row's {shorten(wrong[0])}")
    return entry


def _parts(
    video: Any,
    references: Any,
    text: Any,
    teachers: dict[str, Any],
    tokens: Any = None,
    targets: dict[str, dict[str, Any]] | None = None,
) -> RowParts:
    """The parts of a line, whose keys are still to be checked.

    Raises:
        TypeError, ValueError: it holds something else.
    """
    every = {**({REFERENCE: teachers} if teachers else {}), **(targets or {})}
    if not all(isinstance(keys, dict) and NAME.fullmatch(objective) for objective, keys in every.items()):
        raise ValueError("a row's targets")
    if not isinstance(teachers, dict) or REFERENCE in (targets or {}):
        raise ValueError("a row's teachers")
    if video is None:
        raise ValueError("a row's video")
    return RowParts(video, references, text_keys(text), every, tokens)


def listed_text(keys: dict[str, str]) -> str | dict[str, str]:
    """A text's keys as they are written: of embeddings alone just theirs, as before there was anything else."""
    return keys[EMBEDDING] if set(keys) == {EMBEDDING} else keys


def text_keys(listed: Any) -> dict[str, str]:
    """What `listed_text` made its value of.

    Raises:
        ValueError: it is none.
    """
    keys = {EMBEDDING: listed} if isinstance(listed, str) else listed
    if not isinstance(keys, dict) or not keys:
        raise ValueError("a row's text")
    if not all(_is_argument(name) and is_key(key) for name, key in keys.items()):
        raise ValueError("a row's text")
    return keys


def _is_argument(name: Any) -> bool:
    return isinstance(name, str) and name.isidentifier() and len(name) <= MAX_NAME


def is_key(value: Any) -> bool:
    """Whether it can be a part's or row's key."""
    return isinstance(value, str) and KEY.fullmatch(value) is not None


def is_count(value: Any, least: int) -> bool:
    """Whether it is a whole number from `least` on that no count of ours exceeds."""
    return type(value) is int and least <= value < 2**31
