"""The adapter section of a recipe: the fields of `RefAlignConfig`, with its defaults."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from types import UnionType
from typing import TYPE_CHECKING, Any, Union, get_args, get_origin, get_type_hints

from pydantic import Field, create_model, model_validator

from ..config import RefAlignConfig
from ..config_checks import default_scope
from .field_types import Section


def _adapter_fields() -> dict[str, Any]:
    """Those of `RefAlignConfig` that a recipe sets, with its defaults; lists where it takes sequences."""
    hints, fields = get_type_hints(RefAlignConfig), {}
    for item in dataclasses.fields(RefAlignConfig):
        if "help" in item.metadata:
            made = item.default if item.default is not dataclasses.MISSING else item.default_factory()  # type: ignore
            default = list(made) if isinstance(made, tuple) else made
            hint = _with_lists(hints[item.name])
            fields[item.name] = (
                hint if default is not None else hint | None,
                Field(default, description=item.metadata["help"]),
            )
    return fields


def _with_lists(hint: Any) -> Any:
    """YAML has lists where Python takes any sequence."""
    if isinstance(hint, UnionType):
        return Union[tuple(map(_with_lists, get_args(hint)))]  # noqa: UP007  # of a number that is not written here
    return list[get_args(hint)] if get_origin(hint) is Sequence else hint


if TYPE_CHECKING:

    class _AdapterFields(RefAlignConfig, Section): ...  # pyright: ignore  # for its names alone

else:
    _AdapterFields = create_model("_AdapterFields", __base__=Section, **_adapter_fields())


class AdapterSection(_AdapterFields):
    """What the adapter is; see `RefAlignConfig`."""

    @model_validator(mode="before")
    @classmethod
    def _settle_scope(cls, values: Any) -> Any:
        """As in `RefAlignConfig`: what reads or saves a recipe finds the scope, whether it was given or not."""
        if not isinstance(values, dict) or values.get("lora_scope") is not None:
            return values
        attention = values.get("attention", cls.model_fields["attention"].default)
        return values | {"lora_scope": default_scope(attention)}

    @property
    def without_references_is_base(self) -> bool:
        """Whether a step whose references are dropped trains nothing, as the base alone answers it."""
        return self.lora_scope == "reference" and self.null_reference == "absent"
