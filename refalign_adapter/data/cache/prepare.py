"""One row before any encoder sees it: which parts it lacks, its clip sampled, its references on their canvases.

Shape letters: F frames, H and W height and width in pixels, H' and W' those of a reference's canvas, M references,
V augmented variants.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import TypeVar

import numpy as np
from torch.utils.data import Dataset

from ...errors import UserError
from ...hashes import file_digest, hash_of
from ...media.sizes import Size, choose_size
from ...media.video import TooShortError, probe_video, read_video
from ..sources.pictures import augmentation_key, draw_reference, open_pictures, reference_facts
from ..sources.rows import Row
from .encoders import Encoders
from .entries import RowParts
from .facts import Digest, Facts, facts_of, parts_of
from .options import CacheOptions
from .parts import PartStore, target_part
from .targets import Sizes

Result = TypeVar("Result")


@dataclass(frozen=True)
class Plan:
    """How the rows of one size are encoded.

    Attributes:
        options: with that size alone.
        facts: what decides their parts.
        sizes: of clips and references.
    """

    options: CacheOptions
    facts: Facts
    sizes: Sizes


Plans = dict[Size, Plan]


def plans_of(options: CacheOptions, encoders: Encoders) -> Plans:
    """A plan for each of the options' sizes."""
    single = {size: options.at(size) for size in options.sizes}
    return {size: Plan(one, facts_of(one, encoders), encoders.sizes(one)) for size, one in single.items()}


@dataclass
class PreparedRow:
    """What a decoding process hands to the encoders.

    Attributes:
        size: what the clip is brought to.
        parts: the row's parts; None when the row cannot be read.
        frames: uint8 (F, H, W, 3); None when all that is made of them is in the cache.
        canvases: uint8 (V, M, H', W', 3); None when all that is made of them is in the cache.
        problem: why the row cannot be read.
        files: path -> sha256 of what it was made of.
    """

    size: Size | None = None
    parts: RowParts | None = None
    frames: np.ndarray | None = None
    canvases: np.ndarray | None = None
    problem: str | None = None
    files: dict[str, str] = field(default_factory=dict)


class RowPreparer(Dataset[PreparedRow]):
    """Reads what the encoders need of a row, its index; made to run in a DataLoader's worker processes.

    Args:
        plans: how, by size.
        store: where finished parts are; what is there is not decoded again.
        digest: hashes a file.
    """

    def __init__(self, plans: Plans, store: PartStore, digest: Digest = file_digest):
        self.plans, self.store, self.digest = plans, store, digest

    def __getitem__(self, row: Row) -> PreparedRow:
        sizes = list(self.plans)
        try:
            return at_its_size(row, sizes, self.plans[sizes[0]].options.fps, partial(self._prepared, row))
        except UserError as error:
            return PreparedRow(problem=str(error))

    def _prepared(self, row: Row, size: Size) -> PreparedRow:
        """The row at a size; what is in the cache is not decoded."""
        plan, files = self.plans[size], {}

        def digest(path: str | Path) -> str:
            return files.setdefault(os.path.abspath(path), self.digest(path))

        parts = parts_of(row, plan.facts, digest)
        if row.caption_file is not None:
            digest(row.caption_file)
        frames = canvases = None
        of_video = {"video", *map(target_part, plan.facts.of_video)}
        missing = {part for part, key in parts.files() if part != "text" and self.store.shape(part, key) is None}
        if missing & of_video:
            frames = read_clip(row, size, plan.options.fps)
        if missing - of_video:
            canvases = draw_canvases(row, plan.options, plan.sizes.canvas, digest)
        return PreparedRow(size, parts, frames, canvases, files=dict(sorted(files.items())))


def at_its_size(row: Row, sizes: Sequence[Size], fps: float | None, read: Callable[[Size], Result]) -> Result:
    """What `read` makes of the size that suits the row's clip; of a shorter one if its header tells more frames than
    there are.

    Raises:
        UserError: a clip that cannot be read or is too short for every size, or what `read` raises.
    """
    while True:
        size = size_of(row, sizes, fps)
        try:
            return read(size)
        except TooShortError:
            sizes = [other for other in sizes if other.num_frames < size.num_frames]
            if not sizes:
                raise


def size_of(row: Row, sizes: Sequence[Size], fps: float | None) -> Size:
    """The size that the row's clip is brought to, see `choose_size`; with a single one, the clip is not opened.

    Raises:
        UserError: a clip that cannot be read.
    """
    if len(sizes) == 1:
        return sizes[0]
    return choose_size(sizes, probe_video(row.clip, segment=row.segment, crop=row.crop), fps)


def read_clip(row: Row, size: Size, fps: float | None) -> np.ndarray:
    """The row's clip at a size, uint8 (F, H, W, 3), see `read_video`.

    Raises:
        UserError: a clip that cannot be read or is too short.
    """
    return read_video(
        row.clip,
        num_frames=size.num_frames,
        height=size.height,
        width=size.width,
        fps=fps,
        segment=row.segment,
        crop=row.crop,
    )


def draw_canvases(row: Row, options: CacheOptions, size: tuple[int, int], digest: Digest = file_digest) -> np.ndarray:
    """The row's references as the encoders see them, uint8 (V, M, H', W', 3); V is 1 where nothing is augmented.

    Args:
        row: whose references.
        options: how.
        size: H' and W'.
        digest: hashes a file.

    Raises:
        UserError: an image or mask that cannot be read or does not fit.
    """
    augmented = options.augment_references and row.pair == "regular"
    variants: list[list[np.ndarray]] = [[] for _ in range(options.reference_variants if augmented else 1)]
    for reference, picture in zip(row.references, open_pictures(row.references), strict=True):
        key = augmentation_key(reference_facts(reference, digest)) if augmented else ""
        for number, canvases in enumerate(variants):
            # A reference draws the same augmentation wherever it occurs.
            seed = int(hash_of([options.seed, key, number])[:16], 16) if augmented else None
            canvas = draw_reference(
                reference,
                picture,
                height=size[0],
                width=size[1],
                keep_background=options.keep_background,
                augmentation_seed=seed,
            )
            canvases.append(np.asarray(canvas))
    return np.stack([np.stack(canvases) for canvases in variants])
