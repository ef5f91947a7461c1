"""Arguments that several commands have."""

from __future__ import annotations

from typing import Annotated

import typer

Overrides = Annotated[
    list[str] | None, typer.Argument(help="Recipe fields to change: key=value, dotted for sections.")
]
