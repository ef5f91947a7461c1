"""The recipe's schema as text, for `--help`."""

from __future__ import annotations

import json
import textwrap
from collections.abc import Iterator
from typing import Any

from pydantic import BaseModel

from .schema import Recipe


def describe_fields(model: type[BaseModel] = Recipe, prefix: str = "") -> Iterator[str]:
    """One paragraph per field: dotted name, type, default, description. Sections follow after the plain fields."""
    sections = []
    for name, info in model.model_fields.items():
        if isinstance(info.annotation, type) and issubclass(info.annotation, BaseModel):
            sections.append((name, info.annotation))
        else:
            default = "required" if info.is_required() else f"default {json.dumps(info.default, ensure_ascii=False)}"
            yield f"  {prefix}{name}: {_type_name(model, name)} ({default})\n{_indented(info.description or '')}"
    for name, section in sections:
        yield f"\n{prefix}{name}: {(section.__doc__ or '').strip()}"
        yield from describe_fields(section, f"{prefix}{name}.")


def _indented(text: str) -> str:
    return textwrap.fill(text, width=110, initial_indent=" " * 6, subsequent_indent=" " * 6)


def _type_name(model: type[BaseModel], name: str) -> str:
    """A field's type in words, from its JSON schema, with its range."""
    schema = model.model_json_schema()
    return _words(schema["properties"][name], schema.get("$defs", {}))


def _words(schema: dict[str, Any], definitions: dict[str, Any]) -> str:
    if "anyOf" in schema:
        return " or ".join(_words(option, definitions) for option in schema["anyOf"])
    if "$ref" in schema:
        properties = definitions[schema["$ref"].rpartition("/")[2]]["properties"]
        return "{" + ", ".join(properties) + "}"
    if "enum" in schema:
        return " | ".join(str(option) for option in schema["enum"])
    kind = {"integer": "int", "number": "float", "string": "text", "boolean": "true | false", "object": "mapping"}.get(
        schema.get("type", ""), str(schema.get("type"))
    )
    if kind == "array":
        return f"list of {_words(schema['items'], definitions)}"
    bounds = {"minimum": "≥", "exclusiveMinimum": ">", "maximum": "≤", "exclusiveMaximum": "<"}
    limits = [f"{sign} {schema[key]:.10g}" for key, sign in bounds.items() if key in schema]
    return " ".join([kind, *limits])
