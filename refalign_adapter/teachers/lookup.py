"""How a frozen vision teacher is found and loaded.

A teacher is one file here that defines `TEACHER`, a subclass of `Teacher`; which one serves a checkpoint is decided by
the `model_type` in its config. Other packages name theirs by an entry point of the group `refalign_adapter.teachers`,
name -> class; or the class is passed in Python, or by its dotted path, `package.module:Class`.
"""

from __future__ import annotations

from typing import Any

import torch

from ..errors import UserError
from ..plugins import Plugins
from ._hub import local_folder, read_config
from .base import Teacher

GROUP = "refalign_adapter.teachers"
"""Of entry points: a teacher's name -> its class."""


def _problem(name: str, value: Any) -> str | None:
    if isinstance(value, type) and issubclass(value, Teacher):
        return None
    got = value.__name__ if isinstance(value, type) else type(value).__name__
    return f"it must be a subclass of refalign_adapter.teachers.base.Teacher, got {got}"


PLUGINS = Plugins(GROUP, "teacher", __package__ or "", "TEACHER", _problem)


def load_teacher(
    name: str,
    *,
    revision: str | None = None,
    dtype: torch.dtype | None = None,
    device: torch.device | str = "cpu",
    teacher_class: str | type[Teacher] | None = None,
    layer: int = -1,
) -> Teacher:
    """Load a frozen teacher.

    Args:
        name: Hub id or local folder of a transformers vision encoder.
        revision: branch, tag or commit on the Hub.
        dtype: of weights and features; None is float32, whatever the checkpoint holds.
        teacher_class: what serves it: a subclass of `Teacher`, its name, or `package.module:Class`; None goes by
            `model_type`.
        layer: which hidden states to take, see `Teacher`.

    Raises:
        UserError: one line for a missing, gated, unreachable, incomplete or unknown encoder, or for a plug-in that is
            needed and cannot be used.
    """
    if teacher_class is None:
        cls = find_teacher(name, read_config(local_folder(name, revision))["model_type"])
    else:
        cls = _named_class(teacher_class)
    return cls.from_pretrained(name, revision=revision, dtype=dtype, layer=layer).to(device)


def find_teacher(name: str, model_type: str) -> type[Teacher]:
    """The teacher that serves encoders of a `model_type`; those of this package come first.

    Args:
        name: of the encoder, for the message.
        model_type: in its config.

    Raises:
        UserError: there is none.
    """
    found = PLUGINS.first(lambda teacher: model_type in teacher.model_types)
    if found is not None:
        return found
    known = ", ".join([*PLUGINS.known(), *PLUGINS.usable()])
    line = (
        f"teacher: {name!r} is a {model_type!r}, known are {known}; "
        "another one needs teacher_class=package.module:Class"
    )
    raise UserError("; ".join([line, *PLUGINS.problems()]))


def _named_class(given: Any) -> type[Teacher]:
    found = PLUGINS.named(given, "teacher_class")
    if not (isinstance(found, type) and issubclass(found, Teacher)):
        shown = repr(given) if isinstance(given, str) else getattr(given, "__name__", type(given).__name__)
        raise UserError(f"teacher_class must be a subclass of refalign_adapter.teachers.base.Teacher, got {shown}")
    return found
