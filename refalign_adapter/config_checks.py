"""What is wrong with an adapter's fields, whatever their types: they may come from a file that anyone wrote."""

from __future__ import annotations

import math
import re
from collections.abc import Iterator
from typing import Any

from .errors import shorten

ATTENTIONS = {"joint": ("all",), "isolated": ("reference", "all")}
"""Attention -> the LoRA scopes it can have; the first is the one of an adapter that does not say."""
LAST_FRAME = 1000
"""Rotary tables of video DiTs end a little later (Wan: 1,024 frames)."""
CHOICES = {
    "reference_place": ("origin", "beyond"),
    "reference_timestep": ("video", "clean"),
    "null_reference": ("absent", "zeros"),
}
OF_ISOLATED = {
    "reference_frame": None,
    "reference_place": "origin",
    "reference_scale": 1,
    "reference_size": None,
    "drop_background": False,
}
"""What only isolated references have -> what it is with joint attention."""
MAX_SIDE = 4_096
"""Pixels of a reference's own canvas: what a file says decides memory."""
MAX_RANK = 16_384
"""Beyond the width of any layer there is; the base's own limit is checked where the base is known."""
MAX_ALPHA = 1e6
MAX_BLOCKS = 1_000
MAX_TOKENS = 8_192
"""Text tokens; the base's own limit, likewise."""
MAX_NAMES = 10_000
MAX_NAME = 1_024
_PLAIN = re.compile(r"[A-Za-z0-9_]+(\.[A-Za-z0-9_]+)*")


def is_plain(name: Any) -> bool:
    """Whether this is a layer's dotted name, or its end, and no regular expression."""
    return isinstance(name, str) and len(name) <= MAX_NAME and _PLAIN.fullmatch(name) is not None


def default_scope(attention: Any) -> str | None:
    """The LoRA scope of an adapter that does not say it; None with an attention that there is not."""
    return ATTENTIONS[attention][0] if isinstance(attention, str) and attention in ATTENTIONS else None


def field_problems(values: dict[str, Any]) -> Iterator[str]:
    """One line for each problem.

    Args:
        values: every field of a `RefAlignConfig`, of any type.
    """
    yield from _attention_problems(values)
    yield from _lora_problems(values)
    yield from _alignment_problems(values)
    yield from _base_problems(values)


def expression_problems(values: dict[str, Any]) -> Iterator[str]:
    """One line for each name that PEFT is to match and that is no regular expression.

    Not among `field_problems`: those look at strangers' files, of which no expression is even compiled.

    Args:
        values: a valid config's fields.
    """
    modules = values["target_modules"]
    matched = {"target_modules": [modules] if isinstance(modules, str) else []}
    matched |= {name: list(values[name]) for name in ("rank_pattern", "alpha_pattern")}
    for name, expressions in matched.items():
        for expression in expressions:
            try:
                re.compile(expression)
            except (re.error, RecursionError, OverflowError) as error:
                yield f"{name} holds {shorten(expression)}, which is no regular expression ({error}); correct it"


def _attention_problems(values: dict[str, Any]) -> Iterator[str]:
    attention, scope = values["attention"], values["lora_scope"]
    if not isinstance(attention, str) or attention not in ATTENTIONS:
        yield f"attention must be one of {sorted(ATTENTIONS)}, got {shorten(attention)}"
        return
    if scope not in ATTENTIONS[attention]:
        allowed = list(ATTENTIONS[attention])
        yield f"lora_scope must be one of {allowed} with attention={attention!r}, got {shorten(scope)}"
        return
    yield from _reference_problems(values)
    if attention == "joint":
        for name in (name for name, value in OF_ISOLATED.items() if values[name] != value):
            yield f"{name} needs attention='isolated', got {shorten(values[name])} with 'joint'"
    elif values["reference_timestep"] == "clean":
        yield "reference_timestep needs attention='joint', got 'clean' with 'isolated', which always is; leave it out"


def _reference_problems(values: dict[str, Any]) -> Iterator[str]:
    frame, drop = values["reference_frame"], values["drop_background"]
    if frame is not None and not _is_count(frame, -1, LAST_FRAME - 1):
        yield f"reference_frame must be an integer in [-1, {LAST_FRAME}) or null, got {shorten(frame)}"
    for name, choices in CHOICES.items():
        if values[name] not in choices:
            yield f"{name} must be one of {list(choices)}, got {shorten(values[name])}"
    yield from canvas_problems(values["reference_scale"], values["reference_size"])
    if not isinstance(drop, bool):
        yield f"drop_background must be true or false, got {shorten(drop)}"


def canvas_problems(scale: Any, size: Any) -> Iterator[str]:
    """What is wrong with a reference's canvas, one line each.

    Args:
        scale, size: `reference_scale` and `reference_size` of a `RefAlignConfig`, of any type.
    """
    if not _is_number(scale) or not 0 < scale <= 1:
        yield f"reference_scale must be in (0, 1], got {shorten(scale)}"
    if size is None:
        return
    if not isinstance(size, tuple) or len(size) != 2 or not all(_is_count(side, 1, MAX_SIDE) for side in size):
        got = list(size) if isinstance(size, tuple) else size
        yield f"reference_size must be [height, width] in pixels, each in [1, {MAX_SIDE}], or null, got {shorten(got)}"
    elif scale != 1:
        yield (
            f"reference_size says how large a reference's canvas is, got {list(size)} beside reference_scale "
            f"{shorten(scale)}, which says it too; leave one of them out"
        )


def _lora_problems(values: dict[str, Any]) -> Iterator[str]:
    if not _is_count(values["r"], 0, MAX_RANK):
        yield f"r must be an integer in [0, {MAX_RANK}], got {shorten(values['r'])}"
    elif values["r"] == 0:
        for name in (name for name in ("target_modules", "rank_pattern", "alpha_pattern") if values[name]):
            yield f"{name} must be left out with r 0, which is an adapter without LoRA, got {shorten(values[name])}"
    if not _is_alpha(values["lora_alpha"]):
        yield f"lora_alpha must be a positive number of at most {MAX_ALPHA:g}, got {shorten(values['lora_alpha'])}"
    dropout = values["lora_dropout"]
    if not _is_number(dropout) or not 0 <= dropout < 1:
        yield f"lora_dropout must be in [0, 1), got {shorten(dropout)}"
    modules = values["target_modules"]
    if modules is not None and not modules:
        yield "target_modules must name at least one module, got none; leave it out for the default"
    elif not isinstance(modules, str | None) and not _are_names(modules):
        yield f"target_modules must be a list of module names or a pattern, got {shorten(modules)}"
    yield from _pattern_problems("rank_pattern", values, lambda value: _is_count(value, 1, MAX_RANK), "ranks")
    yield from _pattern_problems("alpha_pattern", values, _is_alpha, "alphas")


def _pattern_problems(name: str, values: dict[str, Any], fits: Any, what: str) -> Iterator[str]:
    pattern = values[name]
    if not isinstance(pattern, dict) or not _are_names(tuple(pattern), least=0):
        yield f"{name} must be a mapping of module names to {what}, got {shorten(pattern)}"
        return
    if wrong := {key: value for key, value in pattern.items() if not fits(value)}:
        yield f"{name} must hold {what} as {'r' if what == 'ranks' else 'lora_alpha'} is one, got {shorten(wrong)}"


def _alignment_problems(values: dict[str, Any]) -> Iterator[str]:
    layers, teachers, length = (values[name] for name in ("align_layers", "teachers", "max_sequence_length"))
    if isinstance(layers, tuple):
        valid = len(layers) <= MAX_BLOCKS and all(_is_count(layer, 0, MAX_BLOCKS) for layer in layers)
        valid = valid and len(set(layers)) == len(layers)
    else:
        valid = _is_count(layers, 0, MAX_BLOCKS)
    if not valid:
        yield (
            f"align_layers must be a count or a list of distinct block indices in [0, {MAX_BLOCKS}], "
            f"got {shorten(layers)}"
        )
    if not isinstance(teachers, tuple) or not _are_names(teachers, least=0):
        yield f"teachers must be a list of model ids or folders, got {shorten(teachers)}"
    elif len(set(teachers)) != len(teachers):
        yield f"teachers must be distinct, got {shorten(list(teachers))}"
    elif valid and layers not in (0, ()) and not teachers:
        yield "teachers must name at least one encoder while align_layers is not 0"
    if not _is_count(length, 1, MAX_TOKENS):
        yield f"max_sequence_length must be an integer in [1, {MAX_TOKENS}], got {shorten(length)}"


def _base_problems(values: dict[str, Any]) -> Iterator[str]:
    model, base = values["base_model"], values["base"]
    if model is not None and not _are_names((model,), longest=4096):
        yield f"base_model must be a model id or folder, got {shorten(model)}"
    facts = base.items() if isinstance(base, dict) else [(None, None)]
    if not all(isinstance(name, str) and _is_fact(value) for name, value in facts):
        yield f"base must be a mapping of names to numbers and texts, got {shorten(base)}"


def _is_fact(value: Any) -> bool:
    if isinstance(value, list):
        return len(value) <= MAX_NAMES and all(_is_fact(item) and not isinstance(item, list) for item in value)
    return isinstance(value, str | bool | None) or _is_number(value)


def _are_names(names: Any, *, least: int = 1, longest: int = MAX_NAME) -> bool:
    return (
        isinstance(names, tuple)
        and least <= len(names) <= MAX_NAMES
        and all(isinstance(name, str) and 0 < len(name) <= longest for name in names)
    )


def _is_count(value: Any, least: int, most: int) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and least <= value <= most


def _is_alpha(value: Any) -> bool:
    return _is_number(value) and 0 < value <= MAX_ALPHA


def _is_number(value: Any) -> bool:
    if isinstance(value, bool) or not isinstance(value, int | float):
        return False
    return isinstance(value, int) or math.isfinite(value)
