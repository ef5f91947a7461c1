"""The report of a data check: a summary, every finding, and contact sheets that show rows as training sees them.

folder/index.html      summary and findings
folder/report.json     the same, for programs
folder/sheets/1.html   the rows that are shown, some on a page
folder/images/*.jpg    their pictures
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
from jinja2 import Environment, FileSystemLoader, StrictUndefined

from ...atomic import atomic_folder
from ...errors import UserError
from ...files import require_writable_folder
from ...json_files import write_json
from ..cache.options import CacheOptions
from ..cache.prefetch import in_workers
from ..sources.rows import Reference
from .between_rows import CheckedRow
from .check import DataCheck
from .findings import KINDS, Finding, by_kind
from .summary import FINDINGS, Table, summarize
from .thumbnails import RowThumbnails, ThumbnailWriter

TEMPLATE = "contact_sheet.html"
INDEX, REPORT, SHEETS, IMAGES = "index.html", "report.json", "sheets", "images"
FORMAT = "refalign data check 1"
ROWS_A_PAGE = 60
LISTED = 1000
"""Findings of a kind on the index page; a browser takes long over more."""
FOOTER = (
    "Pictures are what is encoded, only smaller: frames as they are sampled, scaled and cropped, references on their "
    "canvases; canvases of models other than Wan may be rounded to other sizes."
)

Progress = Callable[[int, int], None]


@dataclass(frozen=True)
class SheetRow:
    """A row on a contact sheet; the fields are the template's."""

    number: int
    clip: str
    split: str
    pair: str
    size: str
    place: str
    caption: str
    findings: list[dict[str, Any]]
    bad: bool
    frames: Any
    references: list[dict[str, Any]]


def require_own_folder(output: str | Path) -> Path:
    """The folder for a report: a new or empty one, or one with an older report.

    Raises:
        UserError: there is something else in it, or it cannot be written.
    """
    folder = Path(output)
    if folder.exists() and not folder.is_dir():
        raise UserError(f"output: {str(output)!r} is a file; choose a folder")
    require_writable_folder(folder.resolve().parent)
    if folder.is_dir() and any(folder.iterdir()) and not _is_report(folder / REPORT):
        raise UserError(f"output: {str(output)!r} holds files that are no report of a check; choose another folder")
    return folder


def _is_report(path: Path) -> bool:
    try:
        return json.loads(path.read_text(encoding="utf-8"))["format"] == FORMAT
    except (OSError, ValueError, KeyError, TypeError):
        return False


def shown_rows(check: DataCheck, count: int, seed: int) -> list[int]:
    """Numbers of the rows to show: those with problems first, then a draw over the others, each in order."""
    bad = sorted({finding.row for finding in check.problems if finding.row is not None})[:count]
    others = np.setdiff1d(np.arange(len(check.rows)), bad)
    drawn = np.random.default_rng(seed).choice(others, min(count - len(bad), len(others)), replace=False)
    return [*bad, *sorted(drawn.tolist())]


def write_contact_sheets(
    output: str | Path,
    check: DataCheck,
    options: CacheOptions,
    *,
    sheets: int,
    workers: int = 0,
    progress: Progress | None = None,
) -> Path:
    """Write the report, whole or not at all; an older one is replaced.

    Args:
        output: its folder, see `require_own_folder`.
        check: what was found.
        options: those it was checked with.
        sheets: rows to show at most.
        workers: processes that draw.
        progress: called with (rows drawn, rows in all).

    Returns:
        The page to open.

    Raises:
        UserError: the folder is another's or cannot be written.
    """
    target = require_own_folder(output)
    numbers, tables = shown_rows(check, sheets, options.seed), summarize(check)
    with atomic_folder(target) as folder:
        (folder / IMAGES).mkdir()
        (folder / SHEETS).mkdir()
        named = [(f"{number:06d}", check.rows[number].row, check.rows[number].look.size) for number in numbers]
        drawn = in_workers(ThumbnailWriter(options, folder / IMAGES), named, workers)
        pictures: dict[int, RowThumbnails] = {}
        for number, row_pictures in zip(numbers, drawn, strict=True):
            pictures[number] = row_pictures
            if progress:
                progress(len(pictures), len(numbers))
        _write_pages(folder, check, pictures, tables)
        write_json(folder / REPORT, _report(check, tables))
    return target / INDEX


def _write_pages(folder: Path, check: DataCheck, pictures: dict[int, RowThumbnails], tables: Sequence[Table]) -> None:
    loader = FileSystemLoader(Path(__file__).parent)
    environment = Environment(
        loader=loader, autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )
    template = environment.get_template(TEMPLATE)
    numbers = list(pictures)
    parts = [numbers[start : start + ROWS_A_PAGE] for start in range(0, len(numbers), ROWS_A_PAGE)]
    pages = [{"number": place, "label": _span(place, len(part))} for place, part in enumerate(parts, 1)]
    links = {number: f"{SHEETS}/{place}.html#row-{number}" for place, part in enumerate(parts, 1) for number in part}
    common: dict[str, Any] = {"pages": pages, "footer": FOOTER, "groups": [], "tables": [], "rows": [], "page": 0}
    index: dict[str, Any] = {"title": "Data check", "introduction": _introduction(check, len(numbers))}
    index["tables"] = [table for table in tables if table.title != FINDINGS]  # they are listed
    (folder / INDEX).write_text(
        template.render(common | index | {"groups": _groups(check, links)}), "utf-8", "replace"
    )
    found: dict[int | None, list[Finding]] = {}
    for finding in check.findings:
        found.setdefault(finding.row, []).append(finding)
    for place, part in enumerate(parts, 1):
        rows = [_sheet_row(number, check.rows[number], found.get(number, []), pictures[number]) for number in part]
        page = {
            "title": f"Rows {_span(place, len(part))}",
            "introduction": "As training will see them.",
            "page": place,
        }
        (folder / SHEETS / f"{place}.html").write_text(
            template.render(common | page | {"rows": rows}), "utf-8", "replace"
        )


def _span(place: int, count: int) -> str:
    first = (place - 1) * ROWS_A_PAGE + 1
    return f"{first}–{first + count - 1}" if count > 1 else str(first)


def _introduction(check: DataCheck, shown: int) -> str:
    sheets = f" {shown} of them can be seen, those with problems first." if shown else ""
    return f"{check.verdict()}.{sheets}"


def _groups(check: DataCheck, links: dict[int, str]) -> Iterable[dict[str, Any]]:
    for kind, found in by_kind(check.findings).items():
        listed = [asdict(item) | {"link": links.get(-1 if item.row is None else item.row)} for item in found[:LISTED]]
        yield {"kind": KINDS[kind], "count": len(found), "findings": listed}


def _sheet_row(number: int, checked: CheckedRow, findings: list[Finding], pictures: RowThumbnails) -> SheetRow:
    references = zip(checked.row.references, pictures.references, strict=True)
    return SheetRow(
        number=number,
        clip=checked.row.file_name,
        split=checked.split,
        pair=checked.row.pair,
        size=str(checked.look.size or "no size"),
        place=checked.place,
        caption=checked.row.caption,
        findings=[{"problem": item.problem, "text": item.text} for item in findings],
        bad=any(item.problem for item in findings),
        frames=pictures.frames,
        references=[
            {"pictures": drawn, "label": _label(reference, index, len(drawn))}
            for index, (reference, drawn) in enumerate(references)
        ],
    )


def _label(reference: Reference, index: int, versions: int) -> str:
    subject = "no subject name" if reference.subject is None else reference.subject
    frame = "" if reference.frame is None else f", frame {reference.frame:g}"
    augmented = "; as it is, then augmented" if versions > 1 else ""
    return f"references.{index}: {subject} ({reference.image.name}{frame}){augmented}"


def _report(check: DataCheck, tables: Sequence[Table]) -> dict[str, Any]:
    def listed(findings: Sequence[Finding]) -> list[dict[str, Any]]:
        return [asdict(finding) for finding in findings]

    return {
        "format": FORMAT,
        "rows": len(check.rows),
        "problems": listed(check.problems),
        "notes": listed(check.notes),
        "summary": {table.title: table.to_json() for table in tables},
    }
