"""How a model's family is found.

A family is one file here: its name is the family's key and it defines `FAMILY`, an instance of a `Family` subclass.
Other packages name theirs by an entry point of the group `refalign_adapter.families`, key -> object; or the object is
passed in Python, or named in a recipe by its dotted path, `package.module:attribute`.
"""

from __future__ import annotations

from typing import Any

from torch import nn

from ..errors import UserError
from ..plugins import Plugins
from .base import Family

GROUP = "refalign_adapter.families"
"""Of entry points: a family's key -> the object."""


def _problem(name: str, value: Any) -> str | None:
    if not isinstance(value, Family):
        return f"it must be an instance of refalign_adapter.families.base.Family, got {type(value).__name__}"
    return None if value.key == name else f"its key {value.key!r} differs from the entry point's name"


PLUGINS = Plugins(GROUP, "family", __package__ or "", "FAMILY", _problem)


def load_family(model: Any, family: str | Family | None = None) -> Family:
    """Find the family of a transformer (or of anything whose class name a family declares).

    Args:
        model: a transformer, or a class name as it stands in a model's config; None where a family is given.
        family: the object, its key, or `package.module:attribute`; None looks at the model.

    Raises:
        UserError: no such family, a plug-in that is needed and cannot be used, or a model that the family does not
            know or whose variant is not supported.
    """
    found = _family_of(model) if family is None else _named_family(family)
    if isinstance(model, nn.Module):
        if not {cls.__name__ for cls in type(model).__mro__} & set(found.transformer_classes):
            wanted = " or ".join(found.transformer_classes)
            raise UserError(f"family: {found.key!r} is for {wanted}, the base is a {type(model).__name__}")
        if problem := found.transformer_problem(model):
            raise UserError(problem)
    return found


def _named_family(family: Any) -> Family:
    found = PLUGINS.named(family, "family")
    if not isinstance(found, Family):
        given = repr(family) if isinstance(family, str) else type(family).__name__
        raise UserError(f"family must be an instance of refalign_adapter.families.base.Family, got {given}")
    return found


def _family_of(model: Any) -> Family:
    name = model if isinstance(model, str) else type(model).__name__
    found = PLUGINS.first(lambda family: name in family.transformer_classes)
    if found is not None:
        return found
    families = [*PLUGINS.known().values(), *PLUGINS.usable().values()]
    supported = ", ".join(sorted(cls for family in families for cls in family.transformer_classes))
    raise UserError("; ".join([f"base: {name} is no known DiT; supported are {supported}", *PLUGINS.problems()]))
