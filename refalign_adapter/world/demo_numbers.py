"""The demo's numbers in words: what was measured of the adapter just trained, beside the shipped one's figures."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import reduce
from typing import Any

Facts = Mapping[str, Any]
"""What `evaluation.facts` makes."""
NOTHING = "not measured"


def _share(value: float) -> str:
    return f"{value:.0%}"


def _number(value: float) -> str:
    return f"{value:.2f}"


def _small(value: float) -> str:
    return f"{value:.4f}"


@dataclass(frozen=True)
class Measure:
    """One line of the table.

    Attributes:
        name: what it is.
        path: where its estimate is in the facts.
        meaning: in a sentence.
        written: how a value is written.
        chance: for adapters that know nothing, where the estimate does not say it.
    """

    name: str
    path: tuple[str, ...]
    meaning: str
    written: Callable[[float], str] = _share
    chance: str | None = None


MEASURES = (
    Measure(
        "right reference first of 16", ("identity",), "One subject: its own reference is likest, of 16 of its kind."
    ),
    Measure(
        "looks right", ("identity", "right"), "Looks that the judge reads well, in every frame, as in the reference."
    ),
    Measure("first of 16, two subjects", ("identity", "two"), "The same where two subjects share a video."),
    Measure(
        "likest its own reference",
        ("confusion", "diagonal"),
        "Two subjects: each looks more like its own reference than like the other's.",
    ),
    Measure(
        "mixed", ("confusion", "mixing", "mixed"), "Two subjects: one wears looks of both references. Less is better."
    ),
    Measure(
        "swapped",
        ("confusion", "mixing", "swapped"),
        "Two subjects: one wears the other's looks alone. Less is better.",
    ),
    Measure(
        "pasted",
        ("copy_paste", "pasted"),
        "Likeness to the picture as shown above that to other views; pasted pictures come near 1.",
        _number,
    ),
    Measure(
        "angle taken over",
        ("copy_paste", "angle_slope"),
        "How far a subject leans as its picture does: 0 not at all, 1 as pasted.",
        _number,
    ),
    Measure("moves as told", ("motion",), "Masks go the way that the prompt says."),
    Measure(
        "own reference used",
        ("attribution", "2", "use"),
        "Rise of the flow loss inside a subject when its own reference is replaced.",
        _small,
    ),
    Measure(
        "other's reference used",
        ("attribution", "2", "confusion"),
        "The same when the other one's is replaced, as a share of it. 0 is best.",
        _number,
        "",
    ),
)


def number_rows(yours: Facts, shipped: Facts) -> list[tuple[str, str, str, str, str]]:
    """(name, yours, shipped, chance, meaning) of every measure; intervals are of 95 %."""
    return [
        (measure.name, _written(measure, yours), _written(measure, shipped), _chance(measure, yours), measure.meaning)
        for measure in MEASURES
    ]


def _found(measure: Measure, facts: Facts) -> Mapping[str, Any] | None:
    found: Any = reduce(lambda part, name: part.get(name) if isinstance(part, Mapping) else None, measure.path, facts)
    return None if not found or found.get("void") else found


def _written(measure: Measure, facts: Facts) -> str:
    found = _found(measure, facts)
    if found is None:
        return NOTHING
    value = found["value"] if "value" in found else found["top1"]
    bounds: Sequence[float | None] = (found["low"], found["high"])
    if None in bounds:
        return f"{measure.written(value)} (n = {found['n']})"
    low, high = (measure.written(bound) for bound in bounds if bound is not None)
    return f"{measure.written(value)} ({low} to {high}, n = {found['n']})"


def _chance(measure: Measure, facts: Facts) -> str:
    found = _found(measure, facts)
    if measure.chance is not None or found is None or found.get("chance") is None:
        return measure.chance or ""
    return measure.written(found["chance"])
