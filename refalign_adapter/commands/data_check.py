"""Look through a recipe's data before anything is encoded: `refalign data check --config FILE [key=value …]`."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from ..errors import ConfigError
from ..progress import progress_bar

if TYPE_CHECKING:
    from ..data.check.check import DataCheck
    from ..data.check.summary import Table

LISTED_PROBLEMS, LISTED_NOTES = 50, 5
"""Findings of a kind on the terminal; the report has all of them."""


def run(
    config: str | Path,
    overrides: Sequence[str] = (),
    *,
    output: str | Path = "data_check",
    sheets: int = 120,
    workers: int | None = None,
) -> None:
    """Check the data that a recipe names, print a summary and write the report.

    Args:
        config: the recipe, a YAML file.
        overrides: `key=value` with dotted keys; they win over the file.
        output: folder of the report.
        sheets: rows on its contact sheets; 0: none.
        workers: processes that decode; None: data.num_workers.

    Raises:
        UserError: a mistake in the recipe or the options; ConfigError: what is wrong with the data, a line each.
    """
    if problems := [
        f"{name} must be at least 0, got {value}" for name, value in _counts(sheets, workers) if value < 0
    ]:
        raise ConfigError(problems)
    from ..data.check.check import check_data
    from ..data.check.contact_sheet import require_own_folder, write_contact_sheets
    from ..data.check.summary import summarize
    from ..recipes.cache_options import options_of
    from ..recipes.file import load_recipe

    recipe = load_recipe(config, overrides)
    options = options_of(recipe)
    require_own_folder(output)
    workers = options.num_workers if workers is None else workers
    with progress_bar("checking rows") as show:
        check = check_data(options, held_out=recipe.data.validation_rows, workers=workers, progress=show)
    with progress_bar("drawing contact sheets") as show:
        page = write_contact_sheets(output, check, options, sheets=sheets, workers=workers, progress=show)
    _print_tables(summarize(check))
    _print_notes(check)
    print(f"{check.verdict()}; open {page}")
    if check.problems:
        raise ConfigError(_problem_lines(check))


def _counts(sheets: int, workers: int | None) -> list[tuple[str, int]]:
    return [("sheets", sheets), *([] if workers is None else [("workers", workers)])]


def _print_tables(tables: Sequence[Table]) -> None:
    from rich.console import Console
    from rich.markup import escape
    from rich.table import Table as Printed

    console = Console()
    for table in tables:
        printed = Printed(box=None)
        for index, name in enumerate(table.columns):
            numbers = any(not isinstance(row[index], str) for row in table.rows)
            printed.add_column(escape(name), justify="right" if numbers else "left", overflow="fold")
        for row in table.rows:
            printed.add_row(*(escape(str(cell)) for cell in row))
        console.print(f"[bold]{escape(table.title)}[/]", printed, "", sep="\n")


def _print_notes(check: DataCheck) -> None:
    from ..data.check.findings import KINDS, by_kind

    for kind, found in by_kind(check.notes).items():
        advice = KINDS[kind].advice
        print(f"note: {KINDS[kind].title} ({len(found)}): {advice}")
        for line in _first(found, LISTED_NOTES):
            print(f"  {line}")


def _problem_lines(check: DataCheck) -> list[str]:
    from ..data.check.findings import by_kind

    return [line for found in by_kind(check.problems).values() for line in _first(found, LISTED_PROBLEMS)]


def _first(found: list, count: int) -> list[str]:
    lines = [finding.line() for finding in found[:count]]
    return lines + ([f"… and {len(found) - count} more, see the report"] if len(found) > count else [])
