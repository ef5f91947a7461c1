"""YAML plus `key=value` overrides to a `Recipe`, with every mistake reported at once."""

from __future__ import annotations

import copy
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import yaml
from pydantic import BaseModel, ValidationError
from pydantic.fields import FieldInfo
from pydantic_core import ErrorDetails

from ..atomic import atomic_file
from ..config import unknown_key
from ..errors import ConfigError, UserError, shorten
from ..json_files import decode_text, read_bytes
from .checks import cross_field_problems, machine_problems
from .schema import Recipe
from .sections import SamplePrompt
from .yaml_text import parse_yaml

PLACEHOLDER = "?"
MAX_BYTES = 2**18
"""Of a recipe; those that come along have some three thousand bytes."""
EXAMINED = 1000
LISTED = 50
"""Mistakes that are told; a file that is no recipe at all can have a great many."""


def load_recipe(path: str | Path, overrides: Sequence[str] = (), *, check_machine: bool = False) -> Recipe:
    """Read a recipe.

    Args:
        path: YAML file.
        overrides: `key=value` with dotted keys and YAML values, such as `data.height=240`; they win over the file.
        check_machine: whether the files and packages that training needs must be there.

    Raises:
        ConfigError: lists every problem of file and overrides.
    """
    values = _read_yaml(Path(path))
    problems = [problem for override in overrides if (problem := _apply_override(values, override))]
    recipe, found = _validate(values, check_machine)
    if problems or found or recipe is None:
        lines = [*problems, *found]
        more = [f"… and {len(lines) - LISTED} more"] if len(lines) > LISTED else []
        raise ConfigError([*lines[:LISTED], *more], str(path))
    return recipe


def field_paths(model: type[BaseModel] = Recipe, prefix: str = "") -> Iterator[str]:
    """Dotted names of all fields, sections included."""
    for name, field in model.model_fields.items():
        yield prefix + name
        if isinstance(field.annotation, type) and issubclass(field.annotation, BaseModel):
            yield from field_paths(field.annotation, f"{prefix}{name}.")


def save_recipe(recipe: Recipe, path: Path) -> None:
    """Write a recipe as YAML that `load_recipe` reads, atomically."""
    with atomic_file(path) as temporary:
        temporary.write_text(
            yaml.safe_dump(recipe.model_dump(), sort_keys=False, allow_unicode=True), encoding="utf-8"
        )


def flat_values(recipe: Recipe) -> dict[str, Any]:
    """Dotted names and values of a recipe, lists and mappings as text; what trackers take. Nulls are left out."""

    def walk(values: dict[str, Any], prefix: str) -> Iterator[tuple[str, Any]]:
        for name, value in values.items():
            if isinstance(value, dict) and value:
                yield from walk(value, f"{prefix}{name}.")
            elif value is not None:
                yield prefix + name, value if isinstance(value, (bool, int, float, str)) else str(value)

    return dict(walk(recipe.model_dump(), ""))


def changes(before: dict[str, Any], now: dict[str, Any]) -> list[tuple[str, Any, Any]]:
    """Dotted names, old and new values of what differs between two recipes as nested mappings."""
    found = []
    for name in dict.fromkeys([*before, *now]):
        old, new = before.get(name), now.get(name)
        if isinstance(old, dict) and isinstance(new, dict):
            found += [(f"{name}.{inner}", *values) for inner, *values in changes(old, new)]
        elif old != new:
            found.append((name, old, new))
    return found


def _read_yaml(path: Path) -> dict[str, Any]:
    try:
        values = parse_yaml(decode_text(read_bytes(path, max_bytes=MAX_BYTES)))
    except OSError as error:
        raise UserError(f"config: cannot read {str(path)!r} ({error.strerror})") from None
    except ValueError as error:
        raise UserError(f"config: {str(path)!r} is not valid YAML ({error})") from None
    if values is None:
        return {}
    if not isinstance(values, dict):
        raise UserError(f"config: {str(path)!r} must be a mapping of fields, got {type(values).__name__}")
    return values


def _apply_override(values: dict[str, Any], override: str) -> str | None:
    """Set one dotted key in place; returns the problem, if any."""
    key, separator, text = override.partition("=")
    if not separator or not key:
        return f"{shorten(override)} is no override; write key=value, such as learning_rate=1e-4"
    try:
        value = parse_yaml(text)
    except ValueError as error:
        return f"{shorten(key)[1:-1]}: {shorten(text)} is not a YAML value ({error})"
    *sections, name = key.split(".")
    for section in sections:
        values = values.setdefault(section, {})
        if not isinstance(values, dict):
            return f"{shorten(key)[1:-1]} is no known field; {shorten(section)[1:-1]} is not a section"
    values[name] = value
    return None


def _validate(values: dict[str, Any], check_machine: bool) -> tuple[Recipe | None, list[str]]:
    """The recipe, or every problem: those of single fields, then those between the fields that are left."""
    details: list[ErrorDetails] = []
    try:
        recipe = Recipe.model_validate(values)
    except ValidationError as error:
        details = error.errors(include_url=False)[:EXAMINED]
        recipe = _without(values, details)
    lines, bad = _lines(details), {".".join(_field(item)) for item in details}
    if recipe is not None:
        found = [*cross_field_problems(recipe), *(machine_problems(recipe) if check_machine else ())]
        lines += [line for fields, line in found if not any(_is_below(field, bad) for field in fields)]
    return recipe, lines


def _is_below(field: str, names: set[str]) -> bool:
    return any(f"{field}.".startswith(f"{name}.") for name in names)


def _without(values: dict[str, Any], details: Sequence[ErrorDetails]) -> Recipe | None:
    """The recipe with its invalid fields at their defaults, so that the rest can be checked; None if there is none."""
    values = copy.deepcopy(values)
    for item in details:
        *sections, name = _field(item)
        target = values
        for section in sections:
            target = target.setdefault(section, {})
        info = _field_info((*sections, name))
        if info is not None and info.is_required():
            target[name] = {"cache_dir": PLACEHOLDER} if name == "data" else PLACEHOLDER
        else:
            target.pop(name, None)
    try:
        return Recipe.model_validate(values)
    except ValidationError:
        return None


def _field_info(path: Sequence[str]) -> FieldInfo | None:
    """The schema's field at a dotted path, or None."""
    model: Any = Recipe
    info = None
    for name in path:
        if not (isinstance(model, type) and issubclass(model, BaseModel) and name in model.model_fields):
            return None
        info = model.model_fields[name]
        model = info.annotation
    return info


def _field(item: ErrorDetails) -> tuple[str, ...]:
    """Where an error is, down to a field of the schema (or an unknown key beside such fields)."""
    location = tuple(str(part) for part in item["loc"])
    length = 1
    while length < len(location) and _field_info(location[: length + 1]) is not None:
        length += 1
    unknown = item["type"] == "extra_forbidden" and _is_section(location[:length]) and length < len(location)
    return location[: length + 1] if unknown else location[:length]


def _is_section(path: Sequence[str]) -> bool:
    info = _field_info(path)
    return info is not None and isinstance(info.annotation, type) and issubclass(info.annotation, BaseModel)


def _lines(details: Sequence[ErrorDetails]) -> list[str]:
    """One line per faulty value: field, what it should be, the value received."""
    lines: list[str] = []
    wanted: dict[tuple[str, str], list[str]] = {}
    known = {path.rpartition(".")[2] for path in field_paths()} | set(SamplePrompt.model_fields)
    for item in details:
        location = ".".join(str(part)[:100] for part in item["loc"])
        if item["type"] == "extra_forbidden":
            lines.append(_unknown(location))
        elif item["type"] == "missing":
            lines.append(f"{location} is required")
        else:
            name = ".".join(str(part) for part in item["loc"] if isinstance(part, int) or part in known)
            must = item["msg"].removeprefix("Input should ").removeprefix("String should ")
            wanted.setdefault((name, shorten(item["input"])), []).append(must)
    return lines + [f"{name} should {' or '.join(must)}, got {value}" for (name, value), must in wanted.items()]


def _unknown(name: str) -> str:
    """An unknown key, with the same name in its right section or the nearest known one."""
    section, _, leaf = name.rpartition(".")
    known = list(field_paths())
    if section.startswith("sample_prompts."):
        known += [f"{section}.{field}" for field in SamplePrompt.model_fields]
    if elsewhere := [path for path in known if path.rpartition(".")[2] == leaf]:
        return f"{name} is no known field; did you mean {elsewhere[0]}?"
    siblings = [path for path in known if path.rpartition(".")[0] == section]
    line = unknown_key(name, siblings)
    return line if "did you mean" in line else unknown_key(name, known)
