"""RefAlignConfig: what an adapter is. Saved as `refalign_config.json` beside its weights; needs no torch."""

from __future__ import annotations

import dataclasses
import difflib
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from .errors import ConfigError
from .json_files import read_json, write_json

CONFIG_NAME = "refalign_config.json"
DEFAULT_TEACHER = "facebook/dinov2-base"
ATTENTIONS = {"joint": ("all",), "isolated": ("reference", "all")}
"""Attention -> the LoRA scopes it can have."""
LAST_FRAME = 1000
"""Rotary tables of video DiTs end a little later (Wan: 1,024 frames)."""


@dataclass(frozen=True)
class RefAlignConfig:
    """An adapter: how references reach the DiT, which weights are trained, what they are aligned to.

    Args:
        attention: "joint": references ride in the video's own sequence (RefAlign, arXiv 2603.25743). "isolated": each
            reference runs alone, as a one-frame clip at timestep 0 without text, and video tokens read its keys and
            values, which are computed once per video.
        lora_scope: "all": the LoRA acts on video and reference tokens alike. "reference" (isolated only): on reference
            tokens alone, so that the base stays itself.
        reference_frame: temporal index of the first reference (isolated only); None: the one after the video's last
            latent frame, as in the paper, so that keys and values depend on the video's length.
        reference_scale: height and width of a reference's canvas as a share of the video's, in (0, 1] (isolated only);
            0.5 leaves a quarter of the tokens.
        drop_background: leave out reference tokens that show nothing but white padding (isolated only).
        r: LoRA rank, at least 1.
        lora_alpha: LoRA scale numerator; the update is multiplied by lora_alpha / r.
        lora_dropout: share of LoRA inputs dropped while training, in [0, 1).
        target_modules: module names as in peft, suffixes or a regular expression; None takes the family's own.
        rank_pattern, alpha_pattern: per-module ranks and alphas, as in peft.
        align_layers: the first K blocks (int; 0 turns alignment off) or an explicit list of block indices.
        teachers: ids or folders of the frozen vision encoders, one projector head each.
        max_sequence_length: text tokens that prompts are padded to, in training and at inference (Wan: 512).
        base_model: id or folder of the model the adapter was trained on; filled in at training.
        base: what the family says of that model (layers, width, channels); filled in by `attach`, checked at loading.

    Raises:
        ConfigError: lists every problem at once.
    """

    attention: str = "joint"
    lora_scope: str = "all"
    reference_frame: int | None = None
    reference_scale: float = 1.0
    drop_background: bool = False
    r: int = 64
    lora_alpha: float = 64
    lora_dropout: float = 0.0
    target_modules: Sequence[str] | str | None = None
    rank_pattern: dict[str, int] = field(default_factory=dict)
    alpha_pattern: dict[str, float] = field(default_factory=dict)
    align_layers: int | Sequence[int] = 9
    teachers: Sequence[str] = (DEFAULT_TEACHER,)
    max_sequence_length: int = 512
    base_model: str | None = None
    base: dict[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        for name in ("target_modules", "teachers", "align_layers"):
            value = getattr(self, name)
            if isinstance(value, (list, set)):
                object.__setattr__(self, name, tuple(value))
        if problems := [*self._attention_problems(), *self._lora_problems(), *self._alignment_problems()]:
            raise ConfigError(problems)

    def _attention_problems(self) -> list[str]:
        if self.attention not in ATTENTIONS:
            return [f"attention must be one of {sorted(ATTENTIONS)}, got {self.attention!r}"]
        scopes = ATTENTIONS[self.attention]
        if self.lora_scope not in scopes:
            return [
                f"lora_scope must be one of {list(scopes)} with attention={self.attention!r}, got {self.lora_scope!r}"
            ]
        return self._reference_problems()

    def _reference_problems(self) -> list[str]:
        problems = []
        frame, scale = self.reference_frame, self.reference_scale
        if frame is not None and (not _is_int(frame) or not 0 <= frame < LAST_FRAME):
            problems.append(f"reference_frame must be an integer in [0, {LAST_FRAME}) or null, got {frame!r}")
        if not _is_number(scale) or not 0 < scale <= 1:
            problems.append(f"reference_scale must be in (0, 1], got {scale!r}")
        if not isinstance(self.drop_background, bool):
            problems.append(f"drop_background must be true or false, got {self.drop_background!r}")
        if self.attention == "joint":
            changed = {"reference_frame": frame is not None, "reference_scale": scale != 1}
            changed["drop_background"] = self.drop_background is True
            problems += [
                f"{name} needs attention='isolated', got {getattr(self, name)!r} with 'joint'"
                for name, is_set in changed.items()
                if is_set
            ]
        return problems

    def _lora_problems(self) -> list[str]:
        problems = []
        if not _is_int(self.r) or self.r < 1:
            problems.append(f"r must be an integer of at least 1, got {self.r!r}")
        if not _is_number(self.lora_alpha) or self.lora_alpha <= 0:
            problems.append(f"lora_alpha must be a positive number, got {self.lora_alpha!r}")
        if not _is_number(self.lora_dropout) or not 0 <= self.lora_dropout < 1:
            problems.append(f"lora_dropout must be in [0, 1), got {self.lora_dropout!r}")
        if self.target_modules is not None and not self.target_modules:
            problems.append("target_modules must name at least one module, got none; leave it out for the default")
        return problems

    def _alignment_problems(self) -> list[str]:
        problems = []
        layers = self.align_layers
        if _is_int(layers):
            valid = layers >= 0  # type: ignore[operator]
        else:
            valid = isinstance(layers, tuple) and all(_is_int(layer) and layer >= 0 for layer in layers)
            valid = valid and len(set(layers)) == len(layers)  # type: ignore[arg-type]
        if not valid:
            problems.append(f"align_layers must be a count or a list of distinct block indices >= 0, got {layers!r}")
        if isinstance(self.teachers, str) or not all(isinstance(name, str) and name for name in self.teachers):
            problems.append(f"teachers must be a list of model ids or folders, got {self.teachers!r}")
        elif len(set(self.teachers)) != len(self.teachers):
            problems.append(f"teachers must be distinct, got {list(self.teachers)!r}")
        elif valid and layers not in (0, ()) and not self.teachers:
            problems.append("teachers must name at least one encoder while align_layers is not 0")
        if not _is_int(self.max_sequence_length) or self.max_sequence_length < 1:
            problems.append(f"max_sequence_length must be an integer of at least 1, got {self.max_sequence_length!r}")
        return problems

    def align_blocks(self, num_blocks: int) -> tuple[int, ...]:
        """Block indices to align in a model of `num_blocks` blocks, ascending.

        Raises:
            ConfigError: a block that the model does not have.
        """
        layers = range(self.align_layers) if isinstance(self.align_layers, int) else self.align_layers
        blocks = tuple(sorted(layers))
        if blocks and blocks[-1] >= num_blocks:
            raise ConfigError([f"align_layers reaches block {blocks[-1]}, but the model has {num_blocks} blocks"])
        return blocks

    def to_dict(self) -> dict[str, Any]:
        """A dict of JSON types that `from_dict` reads back."""
        values = dataclasses.asdict(self)
        return {name: list(value) if isinstance(value, tuple) else value for name, value in values.items()}

    @classmethod
    def from_dict(cls, values: dict[str, Any], source: str | None = None) -> RefAlignConfig:
        """Build a config from a dict; unknown keys are refused with the nearest known name.

        Raises:
            ConfigError: lists every problem at once.
        """
        if not isinstance(values, dict):
            raise ConfigError([f"expected a mapping of fields, got {type(values).__name__}"], source)
        known = [item.name for item in dataclasses.fields(cls)]
        problems = [unknown_key(name, known) for name in values if name not in known]
        config = None
        try:
            config = cls(**{name: value for name, value in values.items() if name in known})
        except ConfigError as error:
            problems += error.problems
        if problems or config is None:
            raise ConfigError(problems, source)
        return config

    def save(self, folder: str | Path) -> None:
        """Write `refalign_config.json` into `folder`, atomically."""
        write_json(Path(folder) / CONFIG_NAME, self.to_dict())

    @classmethod
    def load(cls, folder: str | Path) -> RefAlignConfig:
        """Read `refalign_config.json` from `folder`.

        Raises:
            UserError: no such file, not JSON, or not a valid config.
        """
        path = Path(folder) / CONFIG_NAME
        return cls.from_dict(read_json(path, "adapter"), source=str(path))


def unknown_key(name: str, known: Sequence[str]) -> str:
    """One line for a key that does not exist, with the nearest one that does."""
    close = difflib.get_close_matches(str(name), known, n=1)
    return f"{name} is no known field" + (f"; did you mean {close[0]}?" if close else "")


def _is_int(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _is_number(value: object) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool)
