"""The report of a run: one HTML file with every picture inside, one plain sentence beside each."""

from __future__ import annotations

import base64
import io
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from html import escape
from pathlib import Path
from string import Template

from PIL import Image

from ..atomic import atomic_file
from ..media.strips import frame_strip
from .samples import Sample, read_frames
from .sensitivity import Sensitivity

TEMPLATE = Path(__file__).with_name("report.html")
STRIP_FRAMES = 5


@dataclass(frozen=True)
class Section:
    """A box of the report: a heading, a plain sentence, and what it explains (HTML, see `plot`, `sample_table` …)."""

    heading: str
    sentence: str
    body: str


@dataclass
class Report:
    """What `write_report` writes.

    Attributes:
        title: also the browser tab's.
        introduction: what was done, in a sentence or two.
        sections: in order.
        footer: small print.
    """

    title: str
    introduction: str
    sections: list[Section] = field(default_factory=list)
    footer: str = ""


def write_report(path: str | Path, report: Report) -> Path:
    """Write a self-contained HTML file, atomically."""
    boxes = [
        f"<section>\n<h2>{escape(section.heading)}</h2>\n<p>{escape(section.sentence)}</p>\n{section.body}\n</section>"
        for section in report.sections
    ]
    page = Template(TEMPLATE.read_text(encoding="utf-8")).substitute(
        title=escape(report.title),
        introduction=escape(report.introduction),
        sections="\n".join(boxes),
        footer=escape(report.footer),
    )
    with atomic_file(path) as temporary:
        temporary.write_text(page, encoding="utf-8")
    return Path(path)


def plot(png: bytes, description: str) -> str:
    """A picture over the page's width."""
    return f'<img class="plot" alt="{escape(description)}" src="{_embedded(png, "image/png")}">'


def sensitivity_answer(result: Sensitivity) -> str:
    """Yes or no, with the numbers."""
    used = result.uses_references
    verdict = "Yes: the adapter uses its references" if used else "No: the adapter does not use its references"
    numbers = (
        f"Flow loss {result.true:.4f} with the right references, {result.shuffled:.4f} with another clip's "
        f"(p = {result.p_value:.1g}), {result.none:.4f} with none (p = {result.p_value_none:.1g}), "
        f"{result.swapped:.4f} with its own in another order; {result.n} held-out clips."
    )
    return f'<p class="answer {"yes" if used else "no"}">{verdict}.</p>\n<p>{numbers}</p>'


def sample_table(samples: Iterable[Sample]) -> str:
    """A row per sample: references, prompt, the video playing, some of its frames."""
    rows = "\n".join(_sample_row(sample) for sample in samples)
    head = "<tr><th>references</th><th>prompt</th><th>video</th><th>frames</th></tr>"
    return f'<div class="scroll"><table>\n{head}\n{rows}\n</table></div>'


@dataclass(frozen=True)
class Comparison:
    """References and prompt of one row, and a video for each column."""

    prompt: str
    references: tuple[Path, ...]
    videos: tuple[Path, ...]


def comparison_table(heads: Sequence[str], rows: Iterable[Comparison]) -> str:
    """References, prompt and the videos that several models make of them, side by side.

    Args:
        heads: of the videos' columns.
        rows: with as many videos each.
    """
    head = "".join(f"<th>{escape(name)}</th>" for name in ("references", "prompt", *heads))
    lines = [
        f'<tr><td class="pictures">{_references(row.references)}</td><td class="prompt">{escape(row.prompt)}</td>'
        + "".join(f"<td>{_movie(video)}</td>" for video in row.videos)
        + "</tr>"
        for row in rows
    ]
    return f'<div class="scroll"><table class="comparison">\n<tr>{head}</tr>\n' + "\n".join(lines) + "\n</table></div>"


def explained_table(names: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """A table of texts, such as numbers with their intervals and what they mean."""
    head = "".join(f"<th>{escape(name)}</th>" for name in names)
    lines = [
        "<tr>"
        + "".join(
            f'<td data-name="{escape(name)}">{escape(value)}</td>' for name, value in zip(names, row, strict=True)
        )
        + "</tr>"
        for row in rows
    ]
    return f'<div class="scroll"><table class="explained">\n<tr>{head}</tr>\n' + "\n".join(lines) + "\n</table></div>"


def value_table(names: Sequence[str], rows: Iterable[Sequence[object]]) -> str:
    """A plain table; the first column is text, the others numbers."""
    head = "".join(f"<th>{escape(name)}</th>" for name in names)
    lines = [
        "<tr>"
        + f"<td>{escape(str(first))}</td>"
        + "".join(f'<td class="number">{escape(str(value))}</td>' for value in rest)
        for first, *rest in rows
    ]
    return f"<table>\n<tr>{head}</tr>\n" + "\n".join(f"{line}</tr>" for line in lines) + "\n</table>"


def code(lines: Iterable[str]) -> str:
    """Commands to copy."""
    return f"<pre>{escape(chr(10).join(lines))}</pre>"


def _sample_row(sample: Sample) -> str:
    strip = _png(frame_strip(read_frames(sample.video), STRIP_FRAMES))
    return (
        f'<tr><td class="pictures">{_references(sample.references)}</td>'
        f'<td class="prompt">{escape(sample.prompt)}</td>'
        f"<td>{_movie(sample.video)}</td>"
        f'<td><img class="still" alt="frames" src="{_embedded(strip, "image/png")}"></td></tr>'
    )


def _references(paths: Iterable[Path]) -> str:
    return "".join(
        f'<img class="still reference" alt="reference" src="{_embedded(path.read_bytes(), "image/png")}">'
        for path in paths
    )


def _movie(video: Path) -> str:
    return f'<video autoplay loop muted playsinline src="{_embedded(video.read_bytes(), "video/mp4")}"></video>'


def _embedded(content: bytes, kind: str) -> str:
    return f"data:{kind};base64,{base64.b64encode(content).decode()}"


def _png(image: Image.Image) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, format="png")
    return buffer.getvalue()
