"""Where the file is that a row names: beside its table, under another Unicode form, or outside its folder."""

from __future__ import annotations

import unicodedata
from pathlib import Path, PurePosixPath, PureWindowsPath


def escapes(name: str) -> bool:
    """Whether a name leads out of the folder it is looked for in: absolute, up by `..`, or home."""
    path = PurePosixPath(name.replace("\\", "/"))
    return path.is_absolute() or ".." in path.parts or name.startswith("~") or bool(PureWindowsPath(name).drive)


def find_file(folder: Path, name: str) -> Path | None:
    """The file of this name in a folder, also where the file system has another Unicode form of it; None without one.

    A Mac writes é as two characters, most other systems as one; both look the same.
    """
    for form in (name, unicodedata.normalize("NFC", name), unicodedata.normalize("NFD", name)):
        try:
            if (folder / form).is_file():
                return folder / form
        except (OSError, ValueError):  # a name that no file system takes
            return None
    return None
