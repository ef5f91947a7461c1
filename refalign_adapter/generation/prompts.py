"""Prompt files: what to generate, by key. Our JSONL, or the JSON of OpenS2V-Eval (PKU-YuanGroup/OpenS2V-Nexus)."""

from __future__ import annotations

import re
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..config import unknown_key
from ..errors import ConfigError, UserError
from ..json_files import decode_text, parse_json, read_bytes
from ..media.images import read_image

FIELDS = ("key", "prompt", "references", "negative_prompt")
_URL = re.compile(r"[a-zA-Z][a-zA-Z0-9+.-]+://")
LONGEST_KEY = 200
"""Characters of a key; file systems allow 255 bytes for a file's name."""


@dataclass(frozen=True)
class Prompt:
    """One video to generate.

    Attributes:
        key: its file's name, without the suffix.
        prompt: the text.
        references: image files.
        negative_prompt: in place of the run's own; None takes that.
    """

    key: str
    prompt: str
    references: tuple[Path, ...]
    negative_prompt: str | None = None


def read_prompts(path: str | Path, most_references: int) -> list[Prompt]:
    """Read a prompt file; paths in it are relative to it.

    Either one JSON object a line, `{"key": "a", "prompt": "a dog runs", "references": ["dog.png"]}`, or a single one,
    as in OpenS2V-Eval, `{"a": {"prompt": "a dog runs", "img_paths": ["dog.png"], ...}}`.

    Args:
        path: the file.
        most_references: images that a prompt may have.

    Raises:
        UserError: no such file, or nothing in it.
        ConfigError: every problem in it at once: what is not JSON, keys that are missing, repeated or no file names,
            empty prompts, images that are missing, unreadable or too many.
    """
    path = Path(path)
    try:
        text = decode_text(read_bytes(path))
    except (OSError, ValueError) as error:
        reason = getattr(error, "strerror", None) or error
        raise UserError(f"prompts: cannot read {str(path)!r} ({reason})") from None
    problems: list[str] = []
    rows = _opens2v_rows(text)
    if rows is None:
        rows = _json_lines(text, problems)
    first: dict[str, str] = {}
    prompts = [_read_row(place, values, path.parent, first, most_references, problems) for place, values in rows]
    if problems:
        raise ConfigError(problems, str(path))
    if not prompts:
        raise UserError(f"prompts: {str(path)!r} has no prompts")
    return [prompt for prompt in prompts if prompt is not None]


def _opens2v_rows(text: str) -> list[tuple[str, dict[str, Any]]] | None:
    """Rows of an OpenS2V-Eval file in our fields, or None when it is not one."""
    try:
        pairs = parse_json(text, pairs=list)  # not dict, in which a prompt's key cannot be found to be there twice
    except ValueError:
        return None
    is_object = isinstance(pairs, list) and all(isinstance(pair, tuple) for pair in pairs)
    if not pairs or not is_object or not all(_is_record(value) for _, value in pairs):
        return None
    rows = []
    for key, value in pairs:
        values = dict(value)
        references = values.get("img_paths")
        rows.append((f"{key!r}", {"key": key, "prompt": values.get("prompt"), "references": references}))
    return rows


def _is_record(value: Any) -> bool:
    """Whether this is an object, read as a list of pairs, that has a prompt or images."""
    pairs = isinstance(value, list) and all(isinstance(pair, tuple) for pair in value)
    return pairs and bool({"prompt", "img_paths"} & {name for name, _ in value})


def _json_lines(text: str, problems: list[str]) -> list[tuple[str, dict[str, Any]]]:
    rows = []
    for number, line in enumerate(text.split("\n"), 1):
        if not line.strip():
            continue
        try:
            values = parse_json(line)
        except ValueError as error:
            problems.append(f"line {number}: is not JSON ({error})")
            continue
        if isinstance(values, dict):
            rows.append((f"line {number}", values))
        else:
            problems.append(f"line {number}: expected an object of fields, got {type(values).__name__}")
    if problems and not rows:  # no such file at all, maybe an object over several lines with a slip in it
        problems[:] = [f"holds neither an object of prompts nor one on each line; {problems[0]}"]
    return rows


def _read_row(
    place: str, values: dict[str, Any], folder: Path, first: dict[str, str], most: int, problems: list[str]
) -> Prompt | None:
    """The row, or None and its problems appended."""
    key: Any = values.get("key")
    prompt: Any = values.get("prompt")
    negative = values.get("negative_prompt")
    found = [unknown_key(name, FIELDS) for name in values if name not in FIELDS]
    if problem := key_problem(key):
        found.append(problem)
    elif (seen := first.setdefault(key, place)) is not place:
        found.append(f"key {key!r} is that of {seen} too; keys must be distinct")
    if not isinstance(prompt, str) or not prompt.strip():
        found.append(f"prompt must be text, got {prompt!r}")
    if not isinstance(negative, str | None):
        found.append(f"negative_prompt must be text, got {negative!r}")
    found += reference_problems(values.get("references"), folder, most)
    problems += [f"{place}: {problem}" for problem in found]
    if found:
        return None
    return Prompt(key, prompt, tuple(image_path(folder, name) for name in values["references"]), negative)


def image_path(folder: Path, name: str) -> Path:
    """Where an image file is: `~` is the user's home, and what is not absolute is in `folder`."""
    path = Path(name)
    with suppress(RuntimeError):  # no such user: a name like any other
        path = path.expanduser()
    return folder / path


def key_problem(key: Any) -> str | None:
    """Why a key cannot be a file's name in every file system, or None."""
    if not isinstance(key, str) or not key.strip():
        return f"key must be text, got {key!r}"
    if key.startswith((".", "-")) or any(sign in '/\\:*?"<>|' or not sign.isprintable() for sign in key):
        return f"key {key!r} is no safe file name; use letters, digits, _, - and ."
    if len(key.encode()) > LONGEST_KEY:
        return f"key {key[:20]!r}… is longer than {LONGEST_KEY} bytes"
    return None


def reference_problems(references: Any, folder: Path, most: int) -> list[str]:
    """What is wrong with a list of image files, one line each; every image is opened."""
    if not isinstance(references, list | tuple) or not all(isinstance(name, str) and name for name in references):
        return [f"references must be a list of image files, got {references!r}"]
    if not references:
        return ["references must name at least one image; without any, use the base's own pipeline"]
    if len(references) > most:
        return [f"references: {len(references)} images are too many, at most {most}; leave some out"]
    problems = []
    for index, name in enumerate(references):
        if _URL.match(name):
            problems.append(f"references[{index}]: {name[:60]!r} is a URL; download the picture and name its file")
            continue
        try:
            read_image(image_path(folder, name), f"references[{index}]")
        except UserError as error:
            problems.append(str(error))
        except OSError as error:
            problems.append(f"references[{index}]: cannot read {name[:60]!r} ({error.strerror})")
    return problems
