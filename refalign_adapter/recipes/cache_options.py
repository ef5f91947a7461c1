"""The cache that a recipe needs."""

from __future__ import annotations

from ..data.cache.options import CacheOptions
from ..media.sizes import parse_sizes
from .schema import Recipe


def options_of(recipe: Recipe) -> CacheOptions:
    """The cache that a training recipe needs.

    Args:
        recipe: see `schema`.

    Raises:
        ConfigError: values that make no cache.
    """
    data = recipe.data.model_dump(exclude={"validation_rows", "bucket_by_references", "buckets", "max_unreadable"})
    size = recipe.adapter_config().reference_size
    aligned = recipe.alignment.weight > 0 and recipe.adapter.align_layers not in (0, [])
    return CacheOptions(
        base_model=recipe.pretrained_model_name_or_path,
        revision=recipe.revision,
        family=recipe.family,
        variant=recipe.variant,
        max_sequence_length=recipe.adapter.max_sequence_length,
        teachers=tuple(recipe.adapter.teachers) if aligned else (),
        reference_scale=recipe.adapter.reference_scale,
        reference_size=None if size is None else (size[0], size[1]),
        drop_background=recipe.adapter.drop_background,
        buckets=parse_sizes(recipe.data.buckets or ()),
        **data,
    )
