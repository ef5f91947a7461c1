"""Which of a transformer's reference branches act."""

from __future__ import annotations

from typing import Any

from ..errors import UserError
from .lora import active_adapters
from .reference_branch import ReferenceBranch, branches_of


def switched_on(transformer: Any) -> list[ReferenceBranch]:
    """The branches whose adapters act, as `set_adapters` chooses, or are merged into the weights; oldest first."""
    active = active_adapters(transformer)
    return [branch for name, branch in branches_of(transformer).items() if name in active or branch.always_on]


def branch_of(transformer: Any) -> ReferenceBranch | None:
    """The branch whose adapter is switched on, as `set_adapters` chooses; None without one.

    Raises:
        UserError: several are switched on.
    """
    found = switched_on(transformer)
    if len(found) > 1:
        names = [branch.adapter_name for branch in found]
        raise UserError(
            f"references: the reference adapters {names} are all switched on; choose one with set_adapters, such as "
            f"set_adapters({names[0]!r})"
        )
    return found[0] if found else None
