"""Reading a cache: rows as samples read from their files, and samples stacked into a batch.

Shape letters: B batch, C latent channels, F latent frames, H and W latent height and width, M references, S text
tokens, D text width, V augmented variants, h and w a teacher's grid, T a teacher's width.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import pad
from torch.utils.data import Dataset

from ...batch import Batch, CachedSample
from ...errors import ReadError, UserError
from ..sources.manifest import missing_paths, sources_digest
from .contents import row_contents, text_contents
from .digests import FileDigests
from .index import REMEDY, read_index, read_meta
from .options import CacheOptions
from .parts import CacheGoneError, DamagedPartError, PartStore


@dataclass(frozen=True)
class CacheMeta:
    """What a cache says of all its rows.

    Attributes:
        teachers: teacher id -> T.
        max_sequence_length: S.
        empty_text: (S, D) embedding of the empty prompt.
        options: the options it was made with, as JSON types.
        provenance: versions and settings of all encoders, as JSON types.
    """

    teachers: dict[str, int]
    max_sequence_length: int
    empty_text: Tensor
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
        teachers: ids of the teachers whose features are read; None reads all.

    Raises:
        UserError: there is no such cache, it has no such rows or teachers, or it is damaged.
    """

    def __init__(
        self,
        cache_dir: str | Path,
        rows: Sequence[str] | None = None,
        *,
        split: str = "train",
        teachers: Sequence[str] | None = None,
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
        self.teachers = tuple(meta["teachers"] if teachers is None else teachers)
        if missing := [name for name in self.teachers if name not in meta["teachers"]]:
            raise UserError(f"cache_dir: {str(cache_dir)!r} has no features of {missing[0]!r}; {REMEDY}")
        self.split, self._meta = split, meta
        self._text = text_contents(meta, self.store)
        length = meta["options"]["max_sequence_length"]
        self.meta = CacheMeta(
            teachers={name: meta["teachers"][name] for name in self.teachers},
            max_sequence_length=length,
            empty_text=_padded(self._empty_text(meta["empty_text"]), length),
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
        """The row as tensors read from its files, checked when each is read for the first time; text is padded with
        zeros to S.

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
                text=_padded(read("text", parts.text), self.meta.max_sequence_length),
                references=read("references", parts.references),
                teacher={name: read("teacher", parts.teachers[name]) for name in self.teachers},
                subjects=torch.tensor(entry.subjects, dtype=torch.int64),
                tokens=read("tokens", parts.tokens) if parts.tokens else None,
            )
        except CacheGoneError:
            raise
        except ReadError as error:
            raise UnreadableRowError(f"cache: {entry.place(self.split)}: {error}") from None
        except (DamagedPartError, KeyError) as error:
            reason = error if isinstance(error, DamagedPartError) else f"no features of teacher {error}"
            raise UnreadableRowError(f"cache: {entry.place(self.split)}: {reason}; {REMEDY} to make it anew") from None

    def _empty_text(self, key: str) -> Tensor:
        try:
            return self.store.read("text", key, self._text)
        except DamagedPartError as error:
            raise UserError(f"cache: the empty text: {error}; {REMEDY} to make it anew") from None
        except ReadError as error:
            raise UserError(f"cache: the empty text: {error}") from None


def open_cache(options: CacheOptions, rows: Sequence[str] | None = None, *, split: str = "train") -> CachedDataset:
    """Open the cache that `options` describe, without loading any encoder.

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
    return CachedDataset(options.cache_dir, rows, split=split, teachers=options.teachers)


def _digest_of(options: CacheOptions, split: str) -> str | None:
    """What the split's sources are now; None where they are not given or not here."""
    value = options.manifests.get(split)
    if not value or missing_paths(value):
        return None
    try:
        return sources_digest(value, FileDigests(options.cache_dir))
    except UserError:
        return None


def collate(samples: Sequence[CachedSample], *, variants: Sequence[int] | None = None) -> Batch:
    """Stack samples of one shape; references are padded at the end to the largest number among them.

    Args:
        samples: at least one.
        variants: a number per sample that chooses among its V augmented variants (taken modulo V); None: the first.

    Raises:
        UserError: tensors of the samples do not go together, which no cache run makes.
    """
    _require_alike(samples)
    choices = [0] * len(samples) if variants is None else list(variants)
    most = max(len(sample.subjects) for sample in samples)

    def stack(tensors: list[Tensor]) -> Tensor:
        chosen = [tensor[number % len(tensor)] for tensor, number in zip(tensors, choices, strict=True)]
        return torch.stack([_padded(tensor, most) for tensor in chosen])

    counts = torch.tensor([len(sample.subjects) for sample in samples])
    tokens = [sample.tokens for sample in samples if sample.tokens is not None]
    return Batch(
        keys=[sample.key for sample in samples],
        latents=torch.stack([sample.latents for sample in samples]),
        text=torch.stack([sample.text for sample in samples]),
        references=stack([sample.references for sample in samples]).transpose(1, 2).contiguous(),
        mask=torch.arange(most) < counts[:, None],
        subjects=torch.stack([_padded(sample.subjects, most, -1) for sample in samples]),
        teacher={name: stack([sample.teacher[name] for sample in samples]) for name in samples[0].teacher},
        tokens=stack(tokens) if tokens else None,
    )


def _require_alike(samples: Sequence[CachedSample]) -> None:
    """References' canvases and teachers' grids follow from a row's size, so rows that share a batch have the same."""
    first = samples[0]
    for sample in samples[1:]:
        pairs = [(sample.latents[:, :1], first.latents[:, :1]), (sample.references[0, 0], first.references[0, 0])]
        pairs += [(sample.teacher[name][0, 0], features[0, 0]) for name, features in first.teacher.items()]
        if sample.tokens is not None and first.tokens is not None:
            pairs.append((sample.tokens[0, 0], first.tokens[0, 0]))
        if any(ours.shape != others.shape for ours, others in pairs) or _kinds(sample) != _kinds(first):
            raise UserError(
                f"cache: rows {sample.key[:12]} and {first.key[:12]} have references or features of different sizes; "
                f"delete the cache and {REMEDY}"
            )


def _kinds(sample: CachedSample) -> tuple[bool, int]:
    return sample.tokens is None, sample.text.shape[-1]


def _padded(tensor: Tensor, length: int, value: int = 0) -> Tensor:
    """(length, ...) with `value` after the tensor's own entries on its first axis; longer ones are cut."""
    missing = length - len(tensor)
    if missing <= 0:
        return tensor[:length]
    return pad(tensor, [0, 0] * (tensor.ndim - 1) + [0, missing], value=value)
