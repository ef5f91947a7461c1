"""One row to its cached parts: what the encoders make of what was decoded for them.

Shape letters: B videos, F frames, H and W height and width in pixels, H' and W' those of a reference's canvas,
M references, V augmented variants, h and w a teacher's grid, T a teacher's width.
"""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from time import perf_counter

import numpy as np
import torch
from torch import Tensor

from ...errors import UserError
from ...hashes import hash_of
from ...media.canvas import content_tokens
from ..sources.rows import Row
from .captions import count_tokens
from .encoders import Encoders
from .entries import IndexEntry, listed_text
from .facts import Facts, text_keys_of
from .options import DTYPES, CacheOptions
from .parts import PartStore, target_part
from .prepare import Plans, PreparedRow
from .targets import Sizes, Target


@dataclass
class RowEncoder:
    """Runs the encoders on prepared rows and writes the parts.

    Attributes:
        options, encoders, plans, store: how and where.
        made, reused: part -> files written, files that were there.
        seconds: encoder -> time it took.
        cut: captions that had more tokens than are encoded.
    """

    options: CacheOptions
    encoders: Encoders
    plans: Plans
    store: PartStore
    made: Counter[str] = field(default_factory=Counter)
    reused: Counter[str] = field(default_factory=Counter)
    seconds: defaultdict[str, float] = field(default_factory=lambda: defaultdict(float))
    cut: int = 0

    @property
    def facts(self) -> Facts:
        """Those of the first size; what they say of texts and encoders holds for all."""
        return next(iter(self.plans.values())).facts

    def encode(self, row: Row, prepared: PreparedRow) -> IndexEntry:
        """Write the parts that are missing but the caption's, see `encode_text`; returns the row's entry."""
        parts, size = prepared.parts, prepared.size
        assert parts is not None
        assert size is not None
        plan, variants = self.plans[size], 1
        shape = self._part("video", parts.video, lambda: self._latents(prepared.frames), "VAE")
        if parts.references is not None:
            variants, *_ = self._part(
                "references", parts.references, lambda: self._references(prepared.canvases), "VAE"
            )
        for target in plan.options.all_targets:
            for name, key in parts.targets.get(target.objective, {}).items():
                make = partial(self._target, target, name, prepared, plan.sizes)
                self._part(target_part(target.objective), key, make, f"teacher {name}")
        if parts.tokens:
            self._part("tokens", parts.tokens, partial(_tokens, prepared.canvases, plan.sizes.tokens), "tokens")
        return IndexEntry(
            key=hash_of([parts.video, parts.references, listed_text(parts.text), row.subjects]),
            file_name=row.file_name,
            line=row.line,
            parts=parts,
            shape=shape,
            variants=variants,
            subjects=tuple(row.subjects),
            source=row.source,
        )

    def encode_text(self, caption: str) -> dict[str, str]:
        """Write what a caption gives, each tensor up to its last row that is not zero; returns the keys, see
        `RowParts`."""
        keys, made = text_keys_of(caption, self.facts), {}
        tokenizer = getattr(self.encoders.pipe, "tokenizer", None)
        self.cut += tokenizer is not None and count_tokens(tokenizer, caption) > self.options.max_sequence_length

        def make(name: str) -> Tensor:
            made.update(made or self._texts(caption))  # one pass of the encoder makes them all
            return _without_end(made[name])

        for name, key in keys.items():
            self._part("text", key, partial(make, name), "text encoder")
        return keys

    def _part(self, part: str, key: str, make: Callable[[], Tensor], encoder: str) -> tuple[int, ...]:
        """Shape of the part, made by `encoder` if it is missing."""
        shape = self.store.shape(part, key)
        if shape is None:
            started = perf_counter()
            tensor = make()
            if tensor.is_floating_point():
                tensor = tensor.to(DTYPES[self.options.dtype])
            tensor = tensor.cpu()  # waits for the device, so that its time is counted here
            self.seconds[encoder] += perf_counter() - started
            self.store.write(part, key, tensor)
            self.made[part] += 1
            return tuple(tensor.shape)
        self.reused[part] += 1
        return shape

    def _latents(self, frames: np.ndarray | None) -> Tensor:
        assert frames is not None
        self.encoders.use("images")
        video = torch.from_numpy(frames).movedim(-1, 0).unsqueeze(0)
        return self.encoders.family.encode_video(self.encoders.pipe, video / 127.5 - 1)[0]

    def _references(self, canvases: np.ndarray | None) -> Tensor:
        images = _images(canvases)
        self.encoders.use("images")
        encode = self.encoders.family.encode_images
        return torch.stack([encode(self.encoders.pipe, variant * 2 - 1) for variant in images])

    def _target(self, target: Target, teacher: str, prepared: PreparedRow, sizes: Sizes) -> Tensor:
        self.encoders.use("images")
        models = self.encoders.models.get(target.objective, {})
        if target.of == "video":
            assert prepared.frames is not None
            return target.encode(teacher, torch.from_numpy(prepared.frames).movedim(-1, 0) / 255, sizes, models)
        images = _images(prepared.canvases)
        return torch.stack([target.encode(teacher, variant, sizes, models) for variant in images])

    def _texts(self, caption: str) -> dict[str, Tensor]:
        """The transformer's argument -> what the caption gives for it.

        Raises:
            UserError: the family's own file contradicts itself.
        """
        family = self.encoders.family
        self.encoders.use("text")
        texts = family.encode_text(self.encoders.pipe, [caption], self.options.max_sequence_length)
        got = {name: tuple(tensor.shape) for name, tensor in texts.items()}
        wanted = {name: tuple(tensor.shape) for name, tensor in self.encoders.texts(self.options).items()}
        if wanted != got:
            raise UserError(f"family: {family.key!r} encodes text to {got}, its no_text says {wanted}")
        return {name: tensor[0] for name, tensor in texts.items()}


def _without_end(tensor: Tensor) -> Tensor:
    """Up to the last row that is not zero; one row at least."""
    real = tensor.ne(0).flatten(1).any(-1).nonzero() if tensor.ndim > 1 else tensor.nonzero()
    return tensor[: int(real.max()) + 1 if len(real) else 1]


def _tokens(canvases: np.ndarray | None, grid: tuple[int, int]) -> Tensor:
    """bool (V, M, rows, columns): the tokens that show anything but white padding."""
    assert canvases is not None
    tokens = [[content_tokens(canvas, *grid) for canvas in variant] for variant in canvases]
    return torch.from_numpy(np.array(tokens))


def _images(canvases: np.ndarray | None) -> Tensor:
    """uint8 (V, M, H', W', 3) to float (V, M, 3, H', W') in [0, 1]."""
    assert canvases is not None
    return torch.from_numpy(canvases).movedim(-1, 2) / 255
