"""What the fields of a recipe can be, and what its parts have in common."""

from __future__ import annotations

from typing import Annotated, Any

from pydantic import BaseModel, ConfigDict, Field, StringConstraints

Text = Annotated[str, StringConstraints(min_length=1, max_length=4096, pattern=r"^[^\x00]*$")]
Count = Annotated[int, Field(ge=1, le=10**9)]
FromZero = Annotated[int, Field(ge=0, le=10**9)]
Few = Annotated[int, Field(ge=1, le=10**4)]
Pixels = Annotated[int, Field(ge=1, le=16_384)]
Frames = Annotated[int, Field(ge=1, le=100_000)]
Workers = Annotated[int, Field(ge=0, le=1_024)]
Seed = Annotated[int, Field(ge=0, lt=2**32)]
"""What every library that draws takes."""
Share = Annotated[float, Field(ge=0, le=1)]
NotNegative = Annotated[float, Field(ge=0, le=1e6, allow_inf_nan=False)]
Positive = Annotated[float, Field(gt=0, le=1e6, allow_inf_nan=False)]
Rate = Annotated[float, Field(gt=0, le=1e3, allow_inf_nan=False)]
Sources = Text | dict[str, Any] | list[Any]
"""Where rows are, see `data.manifest`; `checks` looks inside."""


class Section(BaseModel):
    """A part of a recipe: unknown keys and loose types are errors."""

    model_config = ConfigDict(extra="forbid", strict=True, frozen=True, protected_namespaces=())
