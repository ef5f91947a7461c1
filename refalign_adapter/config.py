"""RefAlignConfig: what an adapter is. Saved as `refalign_config.json` beside its weights; needs no torch."""

from __future__ import annotations

import dataclasses
import difflib
import os
import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from importlib import metadata
from pathlib import Path
from typing import Any

from .config_checks import default_scope, field_problems, is_plain
from .errors import ConfigError, UserError, shorten
from .json_files import read_json, write_json

CONFIG_NAME = "refalign_config.json"
DEFAULT_TEACHER = "facebook/dinov2-base"
FORMAT = 1
"""Raised when an adapter folder says something that an older version of this package would read wrongly."""
FORMAT_KEY, WRITER_KEY = "format_version", "refalign_adapter_version"
MAX_BYTES = 2**20
"""Of the file; an adapter with patterns for every layer of a large model has some ten thousand bytes."""
PACKAGE = "refalign-adapter"
FIRST = {"attention": "joint", "lora_scope": "all"}
"""What a file that does not say them means: they were the defaults of the version that wrote it."""
LATER = {
    "reference_place": "origin",
    "reference_size": None,
    "reference_timestep": "video",
    "null_reference": "absent",
}
"""Fields that came after the first version, and their defaults. They are written only when they differ, so that older
versions open every adapter that they would understand; one that they would not, they refuse by the field's name."""


def _setting(default: Any, help: str | None = None) -> Any:
    """A field with its default, and in a few words what it is, for those that a recipe sets."""
    metadata = {} if help is None else {"help": help}
    if isinstance(default, dict):
        return field(default_factory=dict, metadata=metadata)
    return field(default=default, metadata=metadata)


@dataclass(frozen=True)
class RefAlignConfig:
    """An adapter: how references reach the DiT, which weights are trained, what they are aligned to.

    Args:
        attention: "isolated": each reference runs alone, as a one-frame clip at timestep 0 without text, and video
            tokens read its keys and values, which are computed once per video. "joint": references ride in the video's
            own sequence (RefAlign, arXiv 2603.25743).
        lora_scope: "reference" (isolated only): the LoRA acts on reference tokens alone, so that the base stays
            itself. "all": on video and reference tokens alike. None: "reference" with isolated attention, "all" with
            joint; once made, a config says which.
        reference_frame: temporal index of the first reference, from -1 on, the others count up from it (isolated
            only); None: the one after the video's last latent frame, as in the paper, so that keys and values depend
            on the video's length.
        reference_place: where the rows and columns of a reference's tokens begin (isolated only): "origin": at 0, as
            the video's own; "beyond": where the video's end, so that no position is shared with the video at any
            reference_frame, and keys and values depend on the video's height and width.
        reference_scale: height and width of a reference's canvas as a share of the video's, in (0, 1] (isolated only);
            0.5 leaves a quarter of the tokens.
        reference_size: (height, width) of a reference's canvas in pixels, whatever the video's (isolated only), in
            place of reference_scale; multiples of what a token covers.
        reference_timestep: of reference tokens in joint attention: "video": the video's, as in the paper; "clean": 0.
            Isolated references are always at 0.
        null_reference: what stands for references that are dropped, in training and in the passes of guidance that do
            not see them: "absent": nothing; "zeros": latents of zero in their places, as in the paper's released code.
        drop_background: leave out reference tokens that show nothing but white padding (isolated only).
        r: LoRA rank; 0: there is no LoRA, the adapter says how references and guidance go with a base that was trained
            whole.
        lora_alpha: LoRA scale numerator; the update is multiplied by lora_alpha / r.
        lora_dropout: share of LoRA inputs dropped while training, in [0, 1).
        target_modules: module names as in peft, suffixes or a regular expression; None takes the family's own (none
            with r 0).
        rank_pattern, alpha_pattern: per-module ranks and alphas, as in peft.
        align_layers: the first K blocks (int; 0 turns alignment off) or an explicit list of block indices.
        teachers: ids or folders of the frozen vision encoders, one projector head each.
        max_sequence_length: text tokens that prompts are padded to, in training and at inference (Wan: 512).
        base_model: id or folder of the model the adapter was trained on; filled in at training.
        base: what the family says of that model (layers, width, channels); filled in by `attach`, checked at loading.

    Raises:
        ConfigError: lists every problem at once.
    """

    attention: str = _setting(
        "isolated", "how references reach the DiT: isolated = by keys and values, joint = in the video's own sequence"
    )
    lora_scope: str = _setting(
        None,
        "tokens the LoRA acts on: all, or reference (with isolated attention); null = reference with isolated "
        "attention, all with joint",
    )
    reference_frame: int | None = _setting(
        None, "temporal index of the first reference, from -1 on; null = after the video's frames"
    )
    reference_scale: float = _setting(
        1.0, "height and width of a reference's canvas as a share of the video's, in (0, 1]"
    )
    drop_background: bool = _setting(False, "leave out reference tokens that show only white padding")
    r: int = _setting(64, "LoRA rank")
    lora_alpha: float = _setting(64, "LoRA scale numerator: the update is multiplied by lora_alpha / r")
    lora_dropout: float = _setting(0.0, "share of LoRA inputs dropped while training, in [0, 1)")
    target_modules: Sequence[str] | str | None = _setting(None, "modules with LoRA; null = the family's")
    rank_pattern: dict[str, int] = _setting({}, "ranks of single modules, as in peft")
    alpha_pattern: dict[str, float] = _setting({}, "alphas of single modules, as in peft")
    align_layers: int | Sequence[int] = _setting(9, "first K blocks to align, or a list of blocks; 0 = none")
    teachers: Sequence[str] = _setting((DEFAULT_TEACHER,), "frozen vision encoders, one projector head each")
    max_sequence_length: int = _setting(512, "text tokens that prompts are padded to")
    base_model: str | None = _setting(None)
    base: dict[str, Any] = _setting({})
    reference_place: str = _setting(
        "origin", "where a reference's rows and columns begin: origin = at 0, beyond = where the video's end"
    )
    reference_size: Sequence[int] | None = _setting(
        None, "[height, width] of a reference's canvas in pixels, in place of reference_scale; null = a share"
    )
    reference_timestep: str = _setting(
        "video", "timestep of references in joint attention: video = the video's, clean = 0"
    )
    null_reference: str = _setting(
        "absent", "what stands for dropped references, here and in guidance: absent = nothing, zeros = zero latents"
    )

    def __post_init__(self) -> None:
        for name in ("target_modules", "teachers", "align_layers", "reference_size"):
            value = getattr(self, name)
            if isinstance(value, (list, set)):
                object.__setattr__(self, name, tuple(value))
        if self.lora_scope is None:
            object.__setattr__(self, "lora_scope", default_scope(self.attention))
        values = {item.name: getattr(self, item.name) for item in dataclasses.fields(self)}
        if problems := list(field_problems(values)):
            raise ConfigError(problems)

    def align_blocks(self, num_blocks: int) -> tuple[int, ...]:
        """Block indices to align in a model of `num_blocks` blocks, ascending.

        Raises:
            ConfigError: a block that the model does not have.
        """
        layers = self.align_layers
        last = layers - 1 if isinstance(layers, int) else max(layers, default=-1)
        if last >= num_blocks:  # compared before a count is expanded
            raise ConfigError([f"align_layers reaches block {last}, but the model has {num_blocks} blocks"])
        return tuple(range(layers)) if isinstance(layers, int) else tuple(sorted(layers))

    def to_dict(self) -> dict[str, Any]:
        """A dict of JSON types that `from_dict` reads back; without those of `LATER` that are the default."""
        values = dataclasses.asdict(self)
        values = {name: value for name, value in values.items() if name not in LATER or value != LATER[name]}
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
        """Write `refalign_config.json` into `folder`, atomically, with the format's version and the package's.

        Of a base or teacher in a local folder, the folder's own name is written: its path helps nobody else.
        """
        values = {FORMAT_KEY: FORMAT, WRITER_KEY: metadata.version(PACKAGE), **self.to_dict()}
        values["base_model"] = self.base_model and public_name(self.base_model)
        values["teachers"] = list(dict.fromkeys(map(public_name, self.teachers)))
        write_json(Path(folder) / CONFIG_NAME, values)

    @classmethod
    def load(cls, folder: str | Path) -> RefAlignConfig:
        """Read `refalign_config.json` from `folder`. What it says of layers are names: no pattern from a file is run.

        Raises:
            UserError: no such file, not JSON, of a newer format, or not a valid config.
        """
        path = Path(folder) / CONFIG_NAME
        values = read_values(path)
        named = {"target_modules": values.get("target_modules"), "rank_pattern": values.get("rank_pattern")}
        named["alpha_pattern"] = values.get("alpha_pattern")
        for name, value in named.items():
            if isinstance(value, str) or (isinstance(value, dict | list) and not all(map(is_plain, value))):
                raise UserError(
                    f"{path}: {name} holds a regular expression, and those of a file are not run; load the whole "
                    "folder with load_adapter, which takes the layers from the weights"
                )
        return cls.from_dict(values, source=str(path))


def read_values(path: Path) -> dict[str, Any]:
    """The fields in a `refalign_config.json`, not checked yet; the versions are taken out, those of `FIRST` filled in.

    Raises:
        UserError: no such file, not a JSON object, or of a newer format.
    """
    values = read_json(path, "adapter", max_bytes=MAX_BYTES)
    if not isinstance(values, dict):
        raise ConfigError([f"expected a mapping of fields, got {type(values).__name__}"], str(path))
    form, writer = values.pop(FORMAT_KEY, FORMAT), values.pop(WRITER_KEY, None)
    if type(form) is not int or form < 1:
        raise ConfigError([f"{FORMAT_KEY} must be a positive integer, got {shorten(form)}"], str(path))
    if form > FORMAT:
        known = isinstance(writer, str) and re.fullmatch(r"\d[\w.+-]{0,30}", writer)
        wanted = f"'{PACKAGE}>={writer}'" if known else f"-U {PACKAGE}"
        raise UserError(
            f"adapter: {str(path)!r} has format {shorten(form)}, newer than what {metadata.version(PACKAGE)} "
            f"reads; pip install {wanted}"
        )
    return FIRST | values


def public_name(name: str) -> str:
    """A Hub id as it is; of a local folder its own name."""
    is_id = re.fullmatch(r"[\w.-]+(/[\w.-]+)?", name) and not name.startswith(".")
    return name if is_id and not Path(name).exists() else os.path.basename(os.path.abspath(name)) or "local"


def unknown_key(name: str, known: Sequence[str]) -> str:
    """One line for a key that does not exist, with the nearest one that does."""
    close = difflib.get_close_matches(str(name)[:100], known, n=1)
    return f"{str(name)[:100]} is no known field" + (f"; did you mean {close[0]}?" if close else "")
