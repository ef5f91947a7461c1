"""The contract of a data format: a source in, rows and problems out.

A new format is one new file beside this one: its name is what `format` says in a recipe, and its `READER` does the
work. The tests of all readers find it by themselves.
"""

from __future__ import annotations

import pkgutil
from abc import ABC, abstractmethod
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from importlib import import_module
from pathlib import Path
from typing import Any, ClassVar

from ..locate import escapes, find_file
from ..rows import Row


@dataclass(frozen=True)
class Source:
    """One data set among those that a recipe trains on.

    Attributes:
        path: file, folder, or a data set's `user/name` on the Hub.
        format: name of its reader.
        videos: folder of its clips; None: where the format has them.
        ratio: its share of the samples, relative to the other sources' ratios; None: by its number of rows.
        max_rows: records that are read of it at most.
        revision: branch, tag or commit on the Hub.
        options: what its reader alone takes, see `Reader.options`.
    """

    path: str
    format: str = "folder"
    videos: str | None = None
    ratio: float | None = None
    max_rows: int | None = None
    revision: str | None = None
    options: Mapping[str, Any] = field(default_factory=dict)


@dataclass
class Reading:
    """What a reader found.

    Attributes:
        rows: what can be trained on.
        problems: one line for each mistake that its owner has to mend.
        left_out: why -> how many records the format's own rules leave out; nothing is wrong with them.
        outside: a line for each row that names files outside its folder, as one's own data may.
    """

    rows: list[Row] = field(default_factory=list)
    problems: list[str] = field(default_factory=list)
    left_out: Counter[str] = field(default_factory=Counter)
    outside: list[str] = field(default_factory=list)

    def add(self, row: Row | None, problems: Iterable[str]) -> None:
        """Take in a record's row or its problems."""
        found = list(problems)
        self.problems += found
        if row is not None and not found:
            self.rows.append(row)


class Reader(ABC):
    """One format.

    Attributes:
        options: what a source may say beyond the fields of `Source`: name -> default. A value has its default's type;
            where that is None it is text.
    """

    options: ClassVar[dict[str, Any]] = {}

    @abstractmethod
    def tables(self, source: Source) -> list[Path]:
        """The files that decide the rows, the main one first; those of a Hub data set are downloaded.

        Raises:
            UserError: there is none.
        """

    @abstractmethod
    def read(self, source: Source, *, max_references: int | None = None) -> Reading:
        """Its rows; clips and images are not opened.

        Args:
            source: what to read; its options are complete.
            max_references: most references that a row may have; None: any number.

        Raises:
            UserError: a table that is missing or cannot be read.
        """


def clip_folder(source: Source, beside: Path) -> Path:
    """Folder that clips are looked for in: the source's `videos`, or that of its table."""
    return Path(source.videos) if source.videos else beside


def find_clip(folder: Path, names: Iterable[str]) -> Path | None:
    """The first of these files that exists below a folder; names that lead out of it are of no file."""
    found = (find_file(folder, name) for name in names if not escapes(name))
    return next((path for path in found if path is not None), None)


def known_readers() -> dict[str, Reader]:
    """All readers, format -> reader."""
    package = import_module(__package__ or "")
    names = sorted(module.name for module in pkgutil.iter_modules(package.__path__) if module.name != "base")
    return {name: import_module(f"{__package__}.{name}").READER for name in names}
