"""What a recipe can change to need less GPU memory, cheapest first, each tried in the simulation."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from ..media.sizes import Size
from ..recipes.schema import Recipe
from .memory import training_memory
from .setting import Setting, Tell

Changes = dict[str, Any]
"""Dotted names of a recipe's fields -> their new values."""
FEWER_FRAMES = 0.6
"""Share of a clip's frames that is tried."""
SMALLER_REFERENCES = 0.5


@dataclass(frozen=True)
class WayOut:
    """Something to change.

    Attributes:
        changes: `key=value`, as on the command line.
        total: bytes on the GPU with it.
        fits: whether that is little enough.
    """

    changes: tuple[str, ...]
    total: int
    fits: bool


def ways_out(setting: Setting, gpu_memory: int, tell: Tell) -> tuple[WayOut, ...]:
    """Each change alone and, if none is enough, the first ones together until they are, or all of them.

    Args:
        setting: what does not fit.
        gpu_memory: bytes to fit into.
        tell: called with what is being tried.
    """
    candidates = list(_candidates(setting))
    found = [_try(setting, changes, gpu_memory, tell) for changes in candidates]
    if any(way.fits for way in found):
        return tuple(found)
    together: Changes = {}
    for number, changes in enumerate(candidates, 1):
        together |= changes
        if number == 1:
            continue
        way = _try(setting, together, gpu_memory, tell)
        if way.fits or number == len(candidates):
            return (*found, way)
    return tuple(found)


def _candidates(setting: Setting) -> Iterator[Changes]:
    recipe = setting.recipe
    if not recipe.gradient_checkpointing:
        yield {"gradient_checkpointing": True}
    if not recipe.offload_activations:
        yield {"gradient_checkpointing": True, "offload_activations": True}
    if recipe.quantization is None:
        yield {"quantization": "nf4"}
    if recipe.train_batch_size > 1:
        accumulated = recipe.gradient_accumulation_steps * recipe.train_batch_size
        yield {"train_batch_size": 1, "gradient_accumulation_steps": accumulated}
    if _has_large_references(recipe):
        yield {"adapter.reference_scale": SMALLER_REFERENCES}
    yield from _fewer_frames(setting)


def _has_large_references(recipe: Recipe) -> bool:
    """Whether a smaller share of the video's canvas is a way out; a canvas of its own is the recipe's choice."""
    adapter = recipe.adapter
    return (
        adapter.attention == "isolated"
        and adapter.reference_size is None
        and adapter.reference_scale > SMALLER_REFERENCES
    )


def _fewer_frames(setting: Setting) -> Iterator[Changes]:
    """Clips of at most so many frames as the base takes."""
    models, sizes = setting.models, setting.options.sizes
    time, _, _ = models.family.size_multiples(models.encoders.pipe, models.encoders.patch_size)
    longest = max(size.num_frames for size in sizes)
    frames = int((longest - 1) * FEWER_FRAMES) // time * time + 1
    if frames == longest:
        return
    if setting.recipe.data.buckets is None:
        yield {"data.num_frames": frames}
        return
    shorter = [str(Size(min(frames, size.num_frames), size.height, size.width)) for size in sizes]
    yield {"data.buckets": list(dict.fromkeys(shorter))}


def _try(setting: Setting, changes: Changes, gpu_memory: int, tell: Tell) -> WayOut:
    told = tuple(f"{name}={_text(value)}" for name, value in changes.items() if _differs(setting, name, value))
    tell(f"trying {' '.join(told)}")
    total = training_memory(setting.changed(changes)).gpu.total
    return WayOut(told, total, total <= gpu_memory)


def _differs(setting: Setting, name: str, value: Any) -> bool:
    part: Any = setting.recipe
    for field in name.split("."):
        part = getattr(part, field)
    return part != value


def _text(value: Any) -> str:
    if isinstance(value, list):
        return f"[{','.join(value)}]"
    return str(value).lower() if isinstance(value, bool) else str(value)
