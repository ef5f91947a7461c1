"""Reading an adapter folder, the one place that does: looked at once, everything in it taken for a stranger's.

What it says is checked by type and range, its weights by name and shape, before any of it is used. The layers come
from the weights' own names; no regular expression in a file is ever run.
"""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor

from ..config import CONFIG_NAME, FORMAT, FORMAT_KEY, PACKAGE, RefAlignConfig, read_values
from ..config_checks import is_plain
from ..errors import ConfigError, UserError, one_line, shorten
from ..files import PICKLE_SUFFIXES
from ..hub import fetch
from ..json_files import parse_json
from .adapter import FILE_NAMES, METADATA_FIELDS
from .formats import FACTS_KEY, FORMATS, PREFIX, WeightsFormat, format_of, stated_facts
from .layers import LayerLora, adapted, by_name, patterns, written_out
from .other_kinds import describe, describe_file, describe_repository

DTYPES = {"F16", "BF16", "F32", "F64"}
"""As safetensors calls the types a LoRA can have."""


@dataclass(frozen=True)
class AdapterFolder:
    """A checked adapter. Its tensors are read when they are asked for.

    Attributes:
        path: the folder.
        config: what `refalign_config.json` says, with the layers' names in place of regular expressions.
        form: the weights file's; with r 0 there is no such file.
        shapes: PEFT's name of every weight -> its shape in the file.
    """

    path: Path
    config: RefAlignConfig
    form: WeightsFormat
    shapes: dict[str, tuple[int, ...]]

    @property
    def weights(self) -> Path:
        """The weights file."""
        return self.path / self.form.file_name

    @property
    def layers(self) -> dict[str, LayerLora]:
        """Layer -> its rank and alpha as the configuration says, which the shapes may contradict."""
        config = self.config
        return {
            name: LayerLora(
                by_name(config.rank_pattern, name, config.r), by_name(config.alpha_pattern, name, config.lora_alpha)
            )
            for name in adapted(self.shapes)
        }

    def lora_fields(self) -> dict[str, Any]:
        """The LoraConfig's fields, with the names of the layers that have weights: not all that would match do."""
        config, layers = self.config, self.layers
        return {
            "r": config.r,
            "lora_alpha": config.lora_alpha,
            "target_modules": list(layers),
            **patterns(config, layers),
        }

    def tensors(self) -> dict[str, Tensor]:
        """The weights under PEFT's names, on the CPU; none with r 0.

        Raises:
            UserError: a damaged file, or numbers that are not finite, which would only show in the finished video.
        """
        from safetensors import SafetensorError
        from safetensors.torch import load_file

        if self.config.r == 0:
            return {}
        try:
            state = {self.form.name(key): tensor for key, tensor in load_file(self.weights).items()}
        except (SafetensorError, OSError) as error:
            raise _unreadable(self.weights, error) from None
        if bad := next((name for name, tensor in state.items() if not tensor.isfinite().all()), None):
            raise UserError(
                f"adapter: {str(self.weights)!r} holds numbers that are not finite, in {self.form.key(bad)}; it was "
                "damaged, or its training went wrong"
            )
        return state


def open_adapter(source: str | Path, *, revision: str | None = None, token: str | None = None) -> AdapterFolder:
    """Look at an adapter folder, fetched from the Hub when `source` is no folder.

    Args:
        source: folder or Hub id.
        revision, token: of the Hub.

    Raises:
        UserError: nothing there, something of another kind (said is what it is and what opens it), a newer format, or
            anything in it that is not as this package writes it.
    """
    path, from_hub = _locate(source), False
    if path is None:
        path, from_hub = _fetch(str(source), revision, token), True
    there = [name for name in FILE_NAMES if (path / name).is_file()]
    if not (path / CONFIG_NAME).is_file():
        said = describe_repository(str(source), revision, token) if from_hub else describe(path)
        _refuse_without_config(str(source), there, said)
    values = read_values(path / CONFIG_NAME)
    config = RefAlignConfig.from_dict(values, source=str(path / CONFIG_NAME))
    _check_files(path, str(source), config, there)
    form, shapes = format_of(config), {}
    if config.r:
        shapes, metadata = _read_header(path / form.file_name, form)
        _check_facts(path / form.file_name, metadata, config)
        _check_lora_metadata(path / form.file_name, metadata.get(form.metadata_key), config)
    if not config.base:
        raise ConfigError(["base must say which base the adapter fits, got nothing"], str(path / CONFIG_NAME))
    return AdapterFolder(path, _without_patterns(config, shapes, path), form, shapes)


def _locate(source: str | Path) -> Path | None:
    """The folder `source`, or None where there is none."""
    if not isinstance(source, str | os.PathLike):
        raise UserError(f"adapter: expected a folder or a Hub id, got {shorten(source)}")
    path = Path(source).expanduser()
    try:
        if path.is_file():
            raise UserError(f"adapter: {str(source)!r} {describe_file(path)}")
        if path.is_dir():
            return path
    except OSError as error:
        raise UserError(f"adapter: {str(source)!r} cannot be looked at ({error.strerror})") from None
    return None


def _fetch(repo_id: str, revision: str | None, token: str | None) -> Path:
    if repo_id.startswith((".", "/", "~")) or repo_id.count("/") != 1:
        raise UserError(f"adapter: folder {shorten(repo_id, 300)} does not exist")
    return fetch(repo_id, field="adapter", revision=revision, token=token, patterns=[CONFIG_NAME, *FILE_NAMES])


def _refuse_without_config(source: str, there: list[str], said: str | None) -> None:
    if said is not None:
        raise UserError(f"adapter: {source!r} {said}")
    names = [CONFIG_NAME, *([] if there else [FORMATS["all"].file_name])]
    raise UserError(f"adapter: {source!r} is no adapter folder, it lacks {' and '.join(names)}")


def _check_files(path: Path, source: str, config: RefAlignConfig, there: list[str]) -> None:
    """The one weights file of the scope, and no other; none at all with r 0."""
    if config.r == 0:
        if there:
            raise UserError(
                f"adapter: {source!r} holds {' and '.join(there)}, but {CONFIG_NAME} says r 0, an adapter without "
                "weights; delete what does not belong to it, or put back the configuration that belongs to the weights"
            )
        return
    scope, wanted = config.lora_scope, format_of(config).file_name
    if there == [wanted]:
        return
    if there:
        others = [name for name in there if name != wanted]
        way_out = f"delete {others[0]}" if wanted in there else "save the adapter again"
        raise UserError(
            f"adapter: {source!r} holds {' and '.join(there)}, but {CONFIG_NAME} says lora_scope {scope!r}, whose "
            f"weights are in {wanted} alone; {way_out}"
        )
    if pickles := sorted(file.name for file in path.iterdir() if file.suffix in PICKLE_SUFFIXES):
        raise UserError(f"adapter: {source!r} holds a pickle ({pickles[0]}) instead of {wanted}; pickles are refused")
    raise UserError(f"adapter: {source!r} is no adapter folder, it lacks {wanted}")


def _read_header(path: Path, form: WeightsFormat) -> tuple[dict[str, tuple[int, ...]], dict[str, str]]:
    """PEFT's names and shapes of the weights, and the metadata; no tensor is read."""
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(path, "pt") as file:
            slices = {key: file.get_slice(key) for key in file.keys()}  # noqa: SIM118  # no dict
            found = {key: (tuple(item.get_shape()), item.get_dtype()) for key, item in slices.items()}
            metadata = dict(file.metadata() or {})
    except (SafetensorError, OSError) as error:
        raise _unreadable(path, error) from None
    shapes = {form.name(key): shape for key, (shape, _) in found.items()}
    for key, (shape, dtype) in found.items():
        if len(shape) != 2 or 0 in shape or dtype not in DTYPES:
            listed = " x ".join(map(str, shape)) or "a single number"
            raise UserError(
                f"adapter: {str(path)!r}: {key} is {listed} of type {dtype}; a LoRA's weight is a matrix of floats"
            )
    if not shapes:
        raise UserError(f"adapter: {str(path)!r} holds no weights; save the adapter again")
    return shapes, metadata


def _unreadable(path: Path, error: Exception) -> UserError:
    reason = one_line(error)
    return UserError(f"adapter: {str(path)!r} cannot be loaded ({reason}); it is damaged, fetch or save it again")


def _check_facts(path: Path, metadata: dict[str, str], config: RefAlignConfig) -> None:
    """What the weights file says of itself; files of the first versions say nothing."""
    if (text := metadata.get(FACTS_KEY)) is None:
        return
    said = _parsed(path, FACTS_KEY, text)
    form = said.get(FORMAT_KEY)
    if type(form) is int and form > FORMAT:
        raise UserError(f"adapter: {str(path)!r} has format {shorten(form)}; pip install -U {PACKAGE}")
    for name, value in stated_facts(config).items():
        if said.get(name) != value:
            raise UserError(
                f"adapter: {str(path)!r} was trained with {name} {shorten(said.get(name))}, but {CONFIG_NAME} says "
                f"{value!r}; one of the two was changed: put back the file that belongs to it"
            )


def _check_lora_metadata(path: Path, text: str | None, config: RefAlignConfig) -> None:
    """The LoraConfig's fields that stock loaders read: those this package writes, and what the configuration says.

    Raises:
        UserError: any other field (PEFT has some that import modules), or a value that is not the configuration's.
    """
    fields = {} if text is None else _parsed(path, "LoRA metadata", text)
    for name in fields:
        if name.removeprefix(PREFIX) not in METADATA_FIELDS or not name.startswith(PREFIX):
            raise UserError(
                f"adapter: {str(path)!r} has {shorten(name)} in its LoRA metadata, which no adapter of this package "
                "has; it is refused, as some such fields run code"
            )
    said = {name.removeprefix(PREFIX): value for name, value in fields.items()}
    values = config.to_dict()
    assumed = {"r": config.r, "lora_alpha": config.r, "rank_pattern": {}, "alpha_pattern": {}}
    for name in assumed:  # what loaders take without any
        if (got := said.get(name, assumed[name])) != values[name]:
            raise UserError(
                f"adapter: {str(path)!r} says {name} {shorten(got)} and {CONFIG_NAME} {shorten(values[name])}; its "
                "metadata was lost, or it belongs to another adapter"
            )


def _parsed(path: Path, what: str, text: str) -> dict[str, Any]:
    try:
        value = parse_json(text)
    except ValueError as error:
        raise UserError(f"adapter: {str(path)!r} has unreadable metadata, {what}: {error}") from None
    if not isinstance(value, dict):
        raise UserError(f"adapter: {str(path)!r} has unreadable metadata, {what}: {shorten(value)} is no mapping")
    return value


def _without_patterns(config: RefAlignConfig, shapes: dict[str, tuple[int, ...]], path: Path) -> RefAlignConfig:
    """The configuration with the layers' names; ranks are those of the weights where it has regular expressions."""
    if wild := next((name for name in config.alpha_pattern if not is_plain(name)), None):
        raise UserError(
            f"adapter: alpha_pattern in {str(path / CONFIG_NAME)!r} holds the regular expression {shorten(wild)}, and "
            "those of a file are not run; write the names of its layers instead"
        )
    ranks = {name: shapes.get(f"{name}.lora_A.weight", (config.r, 0))[0] for name in adapted(shapes)}
    plain = all(map(is_plain, config.rank_pattern))
    layers = {
        name: LayerLora(
            by_name(config.rank_pattern, name, config.r) if plain else rank,
            by_name(config.alpha_pattern, name, config.lora_alpha),
        )
        for name, rank in ranks.items()
    }
    return written_out(config, layers)
