"""Reading a cache: rows as samples read from their files.

Shape letters: C latent channels, F latent frames, H and W latent height and width, M references, S text tokens, D text
width, T a teacher's width.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import Dataset

from ...batch import REFERENCE, CachedSample
from ...errors import ReadError, UserError
from ..sources.manifest import missing_paths, sources_digest
from .collate import padded
from .contents import row_contents, text_contents
from .digests import FileDigests
from .entries import REMEDY
from .index import read_index, read_meta
from .options import CacheOptions
from .parts import CacheGoneError, DamagedPartError, PartStore, target_part


@dataclass(frozen=True)
class CacheMeta:
    """What a cache says of all its rows.

    Attributes:
        widths: objective -> teacher id -> T, of the targets that are read.
        max_sequence_length: text tokens that captions are padded to.
        empty_text: the transformer's argument -> what the empty prompt gave, such as (S, D) embeddings.
        options: the options it was made with, as JSON types.
        provenance: versions and settings of all encoders, as JSON types.
    """

    widths: dict[str, dict[str, int]]
    max_sequence_length: int
    empty_text: dict[str, Tensor]
    options: dict[str, Any]
    provenance: dict[str, Any]


class UnreadableRowError(UserError):
    """A row one of whose files is missing, damaged or not given by the system; the others may be fine."""


class CachedDataset(Dataset[CachedSample]):
    """The rows of a cache.

    Args:
        cache_dir: folder of the cache.
        rows: keys of the rows to serve, in this order; None serves all.
        split: "train" or "validation".
        targets: objective -> ids of the teachers whose targets are read; None reads all.

    Raises:
        UserError: there is no such cache, it has no such rows or targets, or it is damaged.
    """

    def __init__(
        self,
        cache_dir: str | Path,
        rows: Sequence[str] | None = None,
        *,
        split: str = "train",
        targets: Mapping[str, Sequence[str]] | None = None,
    ):
        meta = read_meta(cache_dir)
        self.store = PartStore(cache_dir)
        self.entries = read_index(cache_dir, split, meta)
        if rows is not None:
            known = {entry.key: entry for entry in self.entries}
            if missing := [key for key in rows if key not in known]:
                raise UserError(f"rows: {missing[0]!r} is no {split} row of the cache in {str(cache_dir)!r}")
            self.entries = [known[key] for key in rows]
        if not self.entries:
            raise UserError(f"cache_dir: {str(cache_dir)!r} has no {split} rows; {REMEDY}")
        shapes = {objective: facts["shapes"] for objective, facts in meta["targets"].items()}
        self.targets = {name: tuple(teachers) for name, teachers in (shapes if targets is None else targets).items()}
        for objective, teachers in self.targets.items():
            if missing := [name for name in teachers if name not in shapes.get(objective, {})]:
                what = "features" if objective == REFERENCE else f"targets for objective {objective}"
                raise UserError(f"cache_dir: {str(cache_dir)!r} has no {what} of {missing[0]!r}; {REMEDY}")
        self._of_references = frozenset(name for name, facts in meta["targets"].items() if facts["of"] != "video")
        self.split, self._meta = split, meta
        self._text = text_contents(meta, self.store)
        self.meta = CacheMeta(
            widths={
                objective: {name: shapes[objective][name][-1] for name in teachers}
                for objective, teachers in self.targets.items()
            },
            max_sequence_length=meta["options"]["max_sequence_length"],
            empty_text={name: self._empty_text(name, key) for name, key in meta["empty_text"].items()},
            options=meta["options"],
            provenance=meta["provenance"],
        )

    @property
    def keys(self) -> list[str]:
        """The rows' keys."""
        return [entry.key for entry in self.entries]

    @property
    def shapes(self) -> list[tuple[int, ...]]:
        """(C, F, H, W) of each row; only rows of equal shape can share a batch."""
        return [entry.shape for entry in self.entries]

    @property
    def reference_counts(self) -> list[int]:
        """M of each row."""
        return [len(entry.subjects) for entry in self.entries]

    @property
    def sources(self) -> list[int]:
        """Which of the manifest's sources each row is from, counted from 0."""
        return [entry.source for entry in self.entries]

    def __len__(self) -> int:
        return len(self.entries)

    def __getitem__(self, index: int) -> CachedSample:
        """The row as tensors read from its files, checked when each is read for the first time; texts get
        the zeros at their end back.

        Raises:
            UnreadableRowError: one of its files is missing, damaged or not given by the system.
            CacheGoneError: the system gives nothing of the cache any more.
        """
        entry = self.entries[index]
        parts, expected = entry.parts, dict(row_contents(entry, self._meta, self._text))

        def read(part: str, key: str) -> Tensor:
            return self.store.read(part, key, expected[part, key])

        try:
            return CachedSample(
                key=entry.key,
                latents=read("video", parts.video),
                text={name: self._whole(name, read("text", parts.text[name])) for name in self._text},
                references=_no_references(entry.shape)
                if parts.references is None
                else read("references", parts.references),
                targets={
                    objective: {
                        name: read(target_part(objective), parts.targets[objective][name]) for name in teachers
                    }
                    for objective, teachers in self.targets.items()
                    if entry.subjects or objective not in self._of_references
                },
                subjects=torch.tensor(entry.subjects, dtype=torch.int64),
                tokens=read("tokens", parts.tokens) if parts.tokens else None,
                of_references=self._of_references,
            )
        except CacheGoneError:
            raise
        except ReadError as error:
            raise UnreadableRowError(f"cache: {entry.place(self.split)}: {error}") from None
        except (DamagedPartError, KeyError) as error:
            reason = error if isinstance(error, DamagedPartError) else f"no features or text of {error}"
            raise UnreadableRowError(f"cache: {entry.place(self.split)}: {reason}; {REMEDY} to make it anew") from None

    def _whole(self, name: str, text: Tensor) -> Tensor:
        return padded(text, self._meta["text"][name]["shape"][0])

    def _empty_text(self, name: str, key: str) -> Tensor:
        try:
            return self._whole(name, self.store.read("text", key, self._text[name]))
        except DamagedPartError as error:
            raise UserError(f"cache: the empty text: {error}; {REMEDY} to make it anew") from None
        except ReadError as error:
            raise UserError(f"cache: the empty text: {error}") from None


def open_cache(
    options: CacheOptions,
    rows: Sequence[str] | None = None,
    *,
    split: str = "train",
    targets: Mapping[str, Sequence[str]] | None = None,
) -> CachedDataset:
    """Open the cache that `options` describe, without loading any encoder.

    Args:
        options: whose.
        rows: see `CachedDataset`.
        split: see `CachedDataset`.
        targets: read beside the options' own: objective -> teacher ids.

    Raises:
        UserError: there is no such cache, or it was made with other options or from another manifest.
    """
    meta = read_meta(options.cache_dir)
    wanted, made = options.compared(), meta["options"]
    differing = [name for name in wanted if made.get(name) != wanted[name]]
    if differing:
        listed = ", ".join(f"{name} {made.get(name)} instead of {wanted[name]}" for name in differing)
        raise UserError(f"cache_dir: the cache in {options.cache_dir!r} was made with {listed}; {REMEDY}")
    digest = _digest_of(options, split)
    if digest is not None and digest != meta["manifests"].get(split):
        raise UserError(f"{split}_data: it has changed since the cache in {options.cache_dir!r} was made; {REMEDY}")
    own = {target.objective: target.teachers for target in options.all_targets}
    return CachedDataset(options.cache_dir, rows, split=split, targets={**own, **(targets or {})})


def _digest_of(options: CacheOptions, split: str) -> str | None:
    """What the split's sources are now; None where they are not given or not here."""
    value = options.manifests.get(split)
    if not value or missing_paths(value):
        return None
    try:
        return sources_digest(value, FileDigests(options.cache_dir))
    except UserError:
        return None


def _no_references(latents: Sequence[int]) -> Tensor:
    """(1, 0, C, H, W) for a row whose latents are (C, F, H, W)."""
    channels, _, height, width = latents
    return torch.empty(1, 0, channels, height, width)
