"""Disk that a cache takes, from the shapes of its parts."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from ..data.cache.options import CacheOptions
from ..data.cache.parts import target_part
from ..data.sources.rows import Row
from .shapes import SampleShapes

HEADER = 120
"""Bytes of a part's file beside its numbers: safetensors' length, description and checksum."""


@dataclass(frozen=True)
class CacheSize:
    """Bytes of a cache at most.

    Attributes:
        bytes_of: part -> bytes of all rows, or of one row where no rows are known.
        rows: number of rows; None: not known.
    """

    bytes_of: dict[str, int]
    rows: int | None

    @property
    def total(self) -> int:
        """Bytes of all parts."""
        return sum(self.bytes_of.values())

    @property
    def per_row(self) -> float:
        """Mean bytes of a row."""
        return self.total / (self.rows or 1)


def cache_size(options: CacheOptions, shapes: SampleShapes, rows: Sequence[Row]) -> CacheSize:
    """Bytes of the cache of these rows.

    At most: every clip is taken to be of the largest size, every caption of the maximum length, and no two rows to
    share a file.
    """
    sizes: dict[str, int] = {}
    for row in rows:
        augmented = options.augment_references and row.pair == "regular"
        variants = options.reference_variants if augmented else 1
        for part, size in row_bytes(options, shapes, len(row.references), variants).items():
            sizes[part] = sizes.get(part, 0) + size
    return CacheSize(sizes, len(rows))


def assumed_cache_size(options: CacheOptions, shapes: SampleShapes, rows: int | None) -> CacheSize:
    """Bytes of a cache whose rows are not known: each has the most references, all of them augmented where any are.

    Args:
        options, shapes: of the cache.
        rows: how many; None: of one.
    """
    variants = options.reference_variants if options.augment_references else 1
    one = row_bytes(options, shapes, options.max_references, variants)
    return CacheSize({part: size * (rows or 1) for part, size in one.items()}, rows)


def row_bytes(options: CacheOptions, shapes: SampleShapes, references: int, variants: int) -> dict[str, int]:
    """Part -> bytes of one row's files.

    Args:
        options, shapes: of the cache.
        references: of the row.
        variants: of each of them that are cached.
    """
    width, images = shapes.dtype.itemsize, references * variants
    sizes = {
        "video": math.prod(shapes.latents) * width + HEADER,
        "references": images * math.prod(shapes.reference) * width + HEADER if images else 0,
        "text": sum(tensor.nbytes + HEADER for tensor in shapes.text.values()),
    }
    for objective, targets in shapes.targets.items():
        count = 1 if objective in shapes.of_video else images
        size = sum(count * math.prod(shape) * width + HEADER for shape in targets.values())
        sizes[target_part(objective)] = size if count else 0
    if options.drop_background and images:
        sizes["tokens"] = images * math.prod(shapes.grid) + HEADER
    return sizes
