"""Tables of figures, bars that they meet or miss, and the machine they come from."""

from __future__ import annotations

import dataclasses
import importlib.metadata
import json
import platform
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import typer
from rich.console import Console
from rich.table import Table

from refalign_adapter.errors import UserError

PACKAGES = ("torch", "diffusers", "peft", "bitsandbytes", "xformers", "refalign-adapter")
MIB = 2**20


@dataclass(frozen=True)
class Bar:
    """One figure and the most it may be.

    Attributes:
        what: what was measured.
        value: it.
        limit: the most it may be.
    """

    what: str
    value: float
    limit: float

    @property
    def met(self) -> bool:
        """Whether it is."""
        return self.value <= self.limit

    def to_dict(self) -> dict[str, Any]:
        """JSON."""
        return {"what": self.what, "value": self.value, "limit": self.limit, "met": self.met}


def machine(device: str) -> dict[str, str]:
    """Hardware and versions, one line each."""
    found = {"Python": platform.python_version()}
    for name in PACKAGES:
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            found[name] = "not installed"
    hardware = {"CPU": f"{_processor()}, {torch.get_num_threads()} threads"}
    if device != "cpu":
        card = torch.cuda.get_device_properties(0)
        hardware["GPU"] = f"{card.name}, {card.total_memory / 2**30:.0f} GiB, CUDA {torch.version.cuda}"
    return hardware | found


def _processor() -> str:
    """The CPU's name where Linux tells it."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor() or platform.machine()
    return next((line.partition(": ")[2] for line in lines if line.startswith("model name")), platform.machine())


def print_machine(facts: Mapping[str, str]) -> None:
    """Two lines: hardware, versions."""
    hardware = [value for name, value in facts.items() if name in ("CPU", "GPU")]
    versions = [f"{name} {value}" for name, value in facts.items() if name not in ("CPU", "GPU")]
    print("; ".join(hardware))
    print(", ".join(versions))


def print_table(title: str, columns: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
    """A table with its first column to the left and figures to the right."""
    table = Table(title=title, title_justify="left", box=None, pad_edge=False)
    for index, column in enumerate(columns):
        table.add_column(column, justify="right" if index else "left")
    for row in rows:
        table.add_row(*row)
    Console(width=119).print(table)


def print_bars(bars: list[Bar]) -> None:
    """Which bars are met."""
    rows = [[bar.what, f"{bar.value:.3f}", f"{bar.limit:.3f}", "met" if bar.met else "MISSED"] for bar in bars]
    print_table("Bars", ("", "measured", "at most", ""), rows)


def start(main: Callable[..., None]) -> None:
    """Run a benchmark by its command line; a mistake of the user's is a line, not a traceback."""
    try:
        typer.run(main)
    except UserError as error:
        sys.exit("\n".join(f"error: {line}" for line in str(error).splitlines()))


def report(setting: Any, measure: Callable[[Any], Any], show: Callable[[Any], None], path: Path | None) -> None:
    """Measure in a setting, see `_setting`, and tell where, how and what.

    Args:
        setting: of the measurement.
        measure: makes a result of it, which has `to_dict`.
        show: prints that.
        path: of the JSON; None: none is written.
    """
    facts = machine(setting.device)
    print_machine(facts)
    print(setting)
    result = measure(setting)
    show(result)
    if path is not None:
        write_json(path, {"machine": facts, "setting": setting, **result.to_dict()})


def write_json(path: Path, facts: Mapping[str, Any]) -> None:
    """Write figures and settings; dataclasses become objects, what JSON has no type for becomes text."""

    def plain(value: Any) -> Any:
        return dataclasses.asdict(value) if dataclasses.is_dataclass(value) else str(value)  # type: ignore[arg-type]

    path.write_text(json.dumps(facts, indent=2, default=plain) + "\n", encoding="utf-8")
