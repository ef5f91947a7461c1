"""The folder of a diffusers pipeline, local or from the Hub: looked at before any library reads it."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open

from ..errors import UserError, one_line
from ..files import PICKLE_SUFFIXES
from ..hub import fetch
from ..json_files import read_json
from ..library_output import quiet_libraries
from ..model_configs import read_model_config
from .lookup import PLUGINS

INDEX = "model_index.json"
CONFIGS = ("*.json", "*.txt", "*.model")
"""Files of a pipeline that are no weights."""
_WEIGHTS = re.compile(r"(?:diffusion_pytorch_model|model)(?:\.(?P<variant>\w+))?(?:-\d+-of-\d+)?\.safetensors")


@dataclass(frozen=True)
class PipelineFolder:
    """A pipeline's folder whose index has been checked.

    Attributes:
        name: what the user gave.
        field: what the user called it; it opens the line of every error.
        path: the folder.
        index: of `model_index.json`.
        classes: the family's own, see `Family`; those of plug-ins are known without it.
    """

    name: str
    field: str
    path: Path
    index: dict[str, Any]
    classes: tuple[type, ...] = ()

    def component_class(self, component: str) -> type | None:
        """The class that the index names, one that diffusers, transformers or a family export; None without it.

        Raises:
            UserError: another one; a base decides numbers, not code.
        """
        library, name = self.index.get(component) or (None, None)
        self.check_class(component)
        if name is None:
            return None
        if library not in ("diffusers", "transformers"):
            return self._of_family(component)
        found = getattr(import_module(library), name)
        assert isinstance(found, type)
        return found

    def check_class(self, component: str) -> None:
        """See `component_class`; nothing that the class needs is imported.

        Raises:
            UserError: a class that neither diffusers, transformers nor a family exports.
        """
        library, name = self.index.get(component) or (None, None)
        if name is None:
            return
        module = import_module(library) if library in ("diffusers", "transformers") else None
        # What is not listed, such as older names of tokenizers, is imported to see whether it is there.
        exported = name in getattr(module, "__all__", ()) or isinstance(getattr(module, str(name), None), type)
        if (exported and str(name)[:1].isupper()) or (module is None and self._of_family(component) is not None):
            return
        shown = f"{str(library)[:60]}.{str(name)[:60]}"
        line = (
            f"{self.field}: {self.name!r} says that its {component} is a {shown}, which diffusers and "
            "transformers do not export here; upgrade them, or take the base from who made it"
        )
        raise UserError("; ".join([line, *PLUGINS.problems()]))

    def _of_family(self, component: str) -> type | None:
        """The class that the index names, if it is a family's own; the index's module is compared, not imported."""
        library, name = self.index[component]
        known = [*self.classes, *(cls for family in PLUGINS.usable().values() for cls in family.classes)]
        found = next((cls for cls in known if (cls.__module__, cls.__name__) == (library, name)), None)
        if found is None or (self.path / component / f"{library}.py").exists():
            return None  # some versions of diffusers would run the file
        return found

    def config(self, component: str) -> dict[str, Any]:
        """A component's own configuration.

        Raises:
            UserError: it is missing, no JSON, or has sizes that no model has.
        """
        return read_model_config(self.path / component / "config.json", self.field)

    def check_weights(self, components: Sequence[str], variant: str | None = None) -> None:
        """See that the components' safetensors files are there and whole, by their headers; tensors are not read.

        Raises:
            UserError: pickles alone, another variant, a missing or cut-off file.
        """
        for component in components:
            if self.index.get(component) and self.index[component][1]:
                self._check_weights(component, variant)

    def _check_weights(self, component: str, variant: str | None) -> None:
        folder = self.path / component
        names = sorted(path.name for path in folder.glob("*")) if folder.is_dir() else []
        variants = {found["variant"] for name in names if (found := _WEIGHTS.fullmatch(name))}
        opening = f"{self.field}: the {component} of {self.name!r}"
        if not variants:
            pickles = [name for name in names if Path(name).suffix in PICKLE_SUFFIXES]
            there = f"holds a pickle ({pickles[0]}), which is refused" if pickles else "has no weights"
            raise UserError(f"{opening} {there}; take a base with .safetensors files")
        if variant not in variants and (None not in variants or component == "transformer"):
            known = ", ".join(sorted(found or "none" for found in variants))
            raise UserError(f"{opening} has no weights of variant {variant or 'none'!r}; variants there are: {known}")
        used = variant if variant in variants else None
        there = {name for name in names if (found := _WEIGHTS.fullmatch(name)) and found["variant"] == used}
        middle = f".{used}" if used else ""
        for index in folder.glob(f"*.safetensors.index{middle}.json"):
            wanted = read_json(index, self.field)
            shards = wanted.get("weight_map") if isinstance(wanted, dict) else None
            if not isinstance(shards, dict) or not all(isinstance(shard, str) for shard in shards.values()):
                raise UserError(f"{opening}: {str(index)!r} has no weight_map; download the base again")
            if missing := sorted(set(shards.values()) - there):
                raise UserError(f"{opening} lacks {missing[0]}; download the base again")
        for name in sorted(there):
            try:
                with safe_open(folder / name, "pt"):
                    pass
            except (SafetensorError, OSError) as error:
                reason = one_line(error, 120)
                raise UserError(
                    f"{opening}: {str(folder / name)!r} is damaged or cut off ({reason}); download the base again"
                ) from None


def open_pipeline(
    name: str,
    *,
    field: str,
    revision: str | None = None,
    weights: Sequence[str] = (),
    variant: str | None = None,
    classes: tuple[type, ...] = (),
) -> PipelineFolder:
    """Find a base, fetch what is wanted of it from the Hub, and check its index.

    Args:
        name: a folder, or the Hub's `user/name`.
        field: what the user called it.
        revision: branch, tag or commit on the Hub.
        weights: components whose weights are wanted, and checked by `PipelineFolder.check_weights`.
        variant: of the weights.
        classes: of the family, see `PipelineFolder`.

    Raises:
        UserError: one line for what is no pipeline, for what `fetch` tells, and for an index that names other code.
    """
    path = Path(name)
    if not path.exists():
        path = fetch(name, field=field, revision=revision, patterns=CONFIGS)
        index = _read_index(path, name, field)
        if weights:
            wanted = [f"{component}/*.safetensors" for component in weights]
            path = fetch(name, field=field, revision=revision, patterns=[*CONFIGS, *wanted], ignore=_unwanted(variant))
    else:
        index = _read_index(path, name, field)
    found = PipelineFolder(name, field, path, index, classes)
    for component in index:
        if not component.startswith("_") and isinstance(index[component], list):
            found.check_class(component)
    found.check_weights(weights, variant)
    return found


def _unwanted(variant: str | None) -> list[str]:
    return [f"*.{name}{end}" for name in ("fp16", "bf16") if name != variant for end in (".safetensors", "-*")]


def _read_index(folder: Path, name: str, field: str) -> dict[str, Any]:
    if not (folder / INDEX).is_file():
        raise UserError(f"{field}: {name!r} is no diffusers pipeline, it has no {INDEX}; {_instead(folder, name)}")
    index = read_json(folder / INDEX, field)
    if not isinstance(index, dict):
        raise UserError(f"{field}: {str(folder / INDEX)!r} must be an object of components; download the base again")
    for component, value in index.items():
        if isinstance(value, list) and not component.startswith("_"):
            if len(value) != 2 or not all(isinstance(part, str | None) for part in value):
                raise UserError(f"{field}: {str(folder / INDEX)!r}: {component[:60]!r} must be [library, class]")
        elif component in ("transformer", "vae", "text_encoder", "tokenizer", "scheduler") and value is not None:
            raise UserError(f"{field}: {str(folder / INDEX)!r}: {component!r} must be [library, class]")
    return index


def _instead(folder: Path, name: str) -> str:
    """The way out for a folder without an index."""
    above = folder.parent / INDEX
    if (folder / "config.json").is_file() and above.is_file():
        return f"give the folder above it, {str(folder.parent)!r}"
    original = any(folder.glob("*VAE.pth")) or any(folder.glob("models_t5*"))
    if (folder / "config.json").is_file() and not original:
        config = read_json(folder / "config.json", "config")
        original = isinstance(config, dict) and config.get("_class_name") == "WanModel"
    if original:
        return f"it is the original Wan repository; take the one for diffusers, whose name ends so: {name}-Diffusers"
    return "take a repository or folder that has one"


@contextmanager
def reading(name: str, field: str, what: str = "a diffusers pipeline") -> Iterator[None]:
    """Around a library that reads a model: what it raises becomes one line, and what it prints is left out.

    Raises:
        UserError: the model `name`, which the user called `field`, cannot be read as `what`.
    """
    import torch

    try:
        with quiet_libraries():
            yield
    except (UserError, torch.cuda.OutOfMemoryError):
        raise
    except Exception as error:  # a library may raise anything about a file that is not as it expects
        reason = one_line(error, 300)
        raise UserError(f"{field}: cannot read {name!r} as {what} ({reason})") from error
