"""What measures return: frozen dataclasses that become JSON."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import Any

import numpy as np


@dataclass(frozen=True)
class Result:
    """A measure's numbers. Fields with `repr=False`, such as a value per clip, are for further computing only."""

    def to_dict(self) -> dict[str, Any]:
        """The numbers as JSON types; None stands for what is no finite number."""
        return {field.name: to_json(getattr(self, field.name)) for field in fields(self) if field.repr}


def to_json(value: Any) -> Any:
    """Results, arrays, sequences and mappings of numbers as JSON types; NaN and infinities become None."""
    if isinstance(value, Result):
        return value.to_dict()
    if isinstance(value, np.ndarray | np.generic):
        return to_json(value.tolist())
    if isinstance(value, Mapping):
        return {str(key): to_json(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [to_json(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
