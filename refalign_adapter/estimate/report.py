"""An estimate as tables for people and as JSON for programs."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any

from rich.console import Console, Group, RenderableType
from rich.markup import escape
from rich.padding import Padding
from rich.table import Table

from .duration import PAPER_SAMPLES
from .estimate import Estimate
from .memory import Memory, Part
from .shapes import largest_size


def show(estimate: Estimate, console: Console) -> None:
    """Print an estimate; GB are 1e9 bytes."""
    console.print(Group(*_sections(estimate)))


def _sections(estimate: Estimate) -> Iterator[RenderableType]:
    setting = estimate.setting
    recipe, shapes = setting.recipe, setting.shapes
    frames, height, width = shapes.latents[1:]
    yield (
        f"[bold]{escape(setting.options.base_model)}[/], {largest_size(setting.options)} (latents {frames}x{height}x"
        f"{width}), {setting.references} references, batch {recipe.train_batch_size}, "
        f"{setting.processes} process{'es' if setting.processes > 1 else ''}, mixed_precision {recipe.mixed_precision}"
    )
    yield from _memory("GPU, training (each process)", estimate.training.gpu)
    yield _verdict(estimate)
    if estimate.ways_out:
        yield from _ways_out(estimate)
    yield from _memory("GPU, making the cache: captions", estimate.caching.captions)
    yield from _memory("GPU, making the cache: clips and references, after them", estimate.caching.clips)
    yield from _disk(estimate)
    yield from _memory("Host memory (each process)", estimate.host, "at most")
    if estimate.host.total * setting.processes > estimate.host_total:
        whose = f"{setting.processes} processes" if setting.processes > 1 else "it"
        yield f"  [yellow]this machine has {_gb(estimate.host_total)} for {whose}[/]"
    yield _duration(estimate)
    yield from (f"note: {escape(note)}" for note in estimate.notes)


def _memory(title: str, memory: Memory, total: str = "total") -> Iterator[RenderableType]:
    yield from _sizes(title, memory.parts, total, memory.total)


def _sizes(title: str, parts: Iterable[Part], total: str, size: int) -> Iterator[RenderableType]:
    table = _table()
    for part in parts:
        table.add_row(escape(part.name), _gb(part.bytes))
    table.add_row(f"[bold]{escape(total)}[/]", f"[bold]{_gb(size)}[/]")
    yield f"[bold]{escape(title)}[/]"
    yield Padding(table, (0, 0, 0, 2))


def _table() -> Table:
    table = Table("", "", "", show_header=False, box=None)
    table.columns[1].justify = "right"
    return table


def _verdict(estimate: Estimate) -> str:
    if estimate.gpu_memory is None:
        return "  whether it fits: give --gpu-memory GB"
    size = _gb(estimate.gpu_memory)
    return f"  [green]fits into {size}[/]" if estimate.fits else f"  [red]does not fit into {size}[/]"


def _ways_out(estimate: Estimate) -> Iterator[RenderableType]:
    table = _table()
    for way in estimate.ways_out:
        fits = "[green]fits[/]" if way.fits else "[red]does not fit[/]"
        table.add_row(escape(" ".join(way.changes)), _gb(way.total), fits)
    yield "[bold]Ways out, and the total with each[/]"
    yield Padding(table, (0, 0, 0, 2))


def _disk(estimate: Estimate) -> Iterator[RenderableType]:
    disk, cache, setting = estimate.disk, estimate.disk.cache, estimate.setting
    title = f"Disk, {disk.folder}, " + (f"{cache.rows:,} rows" if cache.rows else "one row")
    parts = [Part(name, size) for name, size in cache.bytes_of.items()]
    yield from _sizes(
        title, parts, f"at most, with captions of {setting.recipe.adapter.max_sequence_length} tokens", cache.total
    )
    for name, count in (setting.found.counts if setting.found else {}).items():
        yield f"  {escape(name)}: {count:,} rows"
    free = f"{_gb(disk.free)} are free"
    yield f"  {_gb(int(cache.per_row))} a row; " + (free if disk.fits else f"[red]{free}, too little[/]")


def _duration(estimate: Estimate) -> str:
    duration, measured = estimate.duration, estimate.measured
    seen = f"{duration.samples:,} samples ({duration.share_of_paper:.0%} of the paper's {PAPER_SAMPLES:,})"
    if duration.passes is not None:
        seen += f", {duration.passes:.1f} passes over {duration.rows:,} rows"
    lines = [f"[bold]Training[/] {duration.steps:,} steps, {seen}"]
    if duration.hours is None:
        lines.append("  hours: give --step-time SECONDS, or --measure N to run N steps on this machine")
    else:
        lines.append(f"  {duration.hours:.1f} hours at {duration.step_time:.2f} s an optimizer step")
    if measured is not None:
        peak = f", {_gb(measured.peak)} held by torch at the peak" if measured.peak is not None else ""
        lines.append(f"  measured on {escape(measured.device)}: median of {measured.steps} steps{peak}")
    return "\n".join(lines)


def _gb(size: int) -> str:
    """GB with three digits that count, at least one decimal."""
    value = size / 1e9
    return f"{value:,.1f} GB" if value >= 10 else f"{value:.2f} GB" if value >= 0.1 else f"{size / 1e6:.1f} MB"


def to_json(estimate: Estimate) -> dict[str, Any]:
    """The same facts as JSON types; sizes in bytes, times in seconds."""
    setting, disk, duration = estimate.setting, estimate.disk, estimate.duration
    measured = estimate.measured
    return {
        "base": setting.options.base_model,
        "size": str(largest_size(setting.options)),
        "references": setting.references,
        "train_batch_size": setting.recipe.train_batch_size,
        "processes": setting.processes,
        "mixed_precision": setting.recipe.mixed_precision,
        "lora_parameters": estimate.training.lora_parameters,
        "gpu_training": _memory_json(estimate.training.gpu),
        "gpu_memory": estimate.gpu_memory,
        "fits": estimate.fits,
        "ways_out": [
            {"changes": list(way.changes), "total": way.total, "fits": way.fits} for way in estimate.ways_out
        ],
        "gpu_caching": {
            "captions": _memory_json(estimate.caching.captions),
            "clips": _memory_json(estimate.caching.clips),
            "total": estimate.caching.total,
        },
        "disk": {
            "folder": disk.folder,
            "free": disk.free,
            "fits": disk.fits,
            "rows": disk.cache.rows,
            "sources": setting.found.counts if setting.found else {},
            "parts": disk.cache.bytes_of,
            "total": disk.cache.total,
            "per_row": disk.cache.per_row,
        },
        "host": {**_memory_json(estimate.host), "machine": estimate.host_total},
        "training": {
            "steps": duration.steps,
            "step_time": duration.step_time,
            "hours": duration.hours,
            "samples": duration.samples,
            "share_of_paper": duration.share_of_paper,
            "rows": duration.rows,
            "passes": duration.passes,
        },
        "measured": vars(measured) if measured is not None else None,
        "notes": list(estimate.notes),
    }


def _memory_json(memory: Memory) -> dict[str, Any]:
    return {"parts": {part.name: part.bytes for part in memory.parts}, "total": memory.total}
