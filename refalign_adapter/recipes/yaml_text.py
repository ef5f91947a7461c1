"""YAML as people mean it: 5e-5 is a number, `no` and dates are text, keys are text and stand once, nothing unfolds."""

from __future__ import annotations

import re
from typing import Any

import yaml

from ..errors import one_line

MAX_DEPTH = 20
"""Of sections and lists in each other; a recipe has four."""
_TEXT = {"tag:yaml.org,2002:bool", "tag:yaml.org,2002:timestamp"}
"""What YAML 1.1 makes of plain words and of numbers with dashes."""


class _Loader(yaml.SafeLoader):
    yaml_implicit_resolvers = {
        first: [(tag, pattern) for tag, pattern in resolvers if tag not in _TEXT]
        for first, resolvers in yaml.SafeLoader.yaml_implicit_resolvers.items()
    }
    depth = 0

    def compose_node(self, parent: yaml.Node | None, index: Any) -> yaml.Node | None:
        if self.check_event(yaml.AliasEvent):  # a few of them in each other unfold to more than memory holds
            _refuse("aliases (*name) are not taken; write the value out", self.peek_event())
        self.depth += 1
        if self.depth > MAX_DEPTH:
            _refuse(f"more than {MAX_DEPTH} sections or lists in each other", self.peek_event())
        node = super().compose_node(parent, index)
        self.depth -= 1
        return node

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        seen: set[str] = set()
        for key_node, _ in node.value:
            if not isinstance(key_node, yaml.ScalarNode) or key_node.tag != "tag:yaml.org,2002:str":
                _refuse("a key must be a name", key_node)
            key = key_node.value
            if key in seen:
                _refuse(f"{key[:100]} is given twice", key_node)
            seen.add(key)
        return super().construct_mapping(node, deep)


_Loader.add_implicit_resolver("tag:yaml.org,2002:bool", re.compile(r"^(true|True|false|False)$"), list("tTfF"))
_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:float", re.compile(r"^[-+]?\d+(\.\d*)?[eE][-+]?\d+$"), list("-+0123456789")
)


def parse_yaml(text: str) -> Any:
    """The value of a YAML text that anyone may have written.

    Raises:
        ValueError: not YAML, or YAML that no recipe needs: aliases, keys that are no names or stand twice, deep
            nesting, types of YAML's own. The reason is one line, with the line's number.
    """
    try:
        return yaml.load(text, Loader=_Loader)  # noqa: S506  # a SafeLoader
    except yaml.YAMLError as error:
        raise ValueError(_reason(error)) from None
    except (ValueError, TypeError, KeyError, AttributeError, IndexError, OverflowError) as error:
        raise ValueError(one_line(error)) from None  # such as `!!int abc`


def _refuse(problem: str, place: Any) -> None:
    raise yaml.constructor.ConstructorError(None, None, problem, place.start_mark)


def _reason(error: yaml.YAMLError) -> str:
    mark = getattr(error, "problem_mark", None)
    text = " ".join(str(getattr(error, "problem", None) or error).split())[:200]
    return f"line {mark.line + 1}: {text}" if mark else text
