"""One manifest row to its cached parts: which files they are, what is decoded for them, what the encoders make of it.

Each part is named by a hash of the bytes and settings that decide it, so parts are shared by the rows they are equal
for, and a changed file, caption, model or setting makes exactly the parts it concerns anew.

Shape letters: B videos, F frames, H and W height and width in pixels, H' and W' those of a reference's canvas,
M references, S text tokens, D text width, V augmented variants, h and w a teacher's grid, T a teacher's width.
"""

from __future__ import annotations

import dataclasses
import os
from collections import Counter, defaultdict
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from time import perf_counter
from typing import Any, TypeVar

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset

from ...batch import REFERENCE
from ...errors import UserError
from ...hashes import file_digest, hash_of
from ...media.canvas import AUGMENTATION, content_tokens
from ...media.sizes import Size, choose_size
from ...media.video import TooShortError, probe_video, read_video
from ..sources.pictures import augmentation_key, draw_reference, open_pictures, reference_facts
from ..sources.rows import Row
from .captions import count_tokens
from .encoders import Encoders
from .entries import IndexEntry, RowParts
from .index import FORMAT
from .options import DTYPES, CacheOptions
from .parts import PartStore, target_part
from .targets import Sizes, Target

Result = TypeVar("Result")
Digest = Callable[[str | Path], str]
"""A file's sha256: `parts.file_digest`, or one that remembers, `digests.FileDigests`."""


@dataclass(frozen=True)
class Facts:
    """JSON facts that decide the parts besides the row itself.

    Attributes:
        video, references, text: of these parts.
        targets: objective -> teacher id -> of its targets.
        augmentation: of the references of regular pairs; None where they are not augmented.
        tokens: of the references' tokens that are kept; None where all are.
        of_video: the objectives whose targets are of the clip and not of the references.
    """

    video: dict[str, Any]
    references: dict[str, Any]
    text: dict[str, Any]
    targets: dict[str, dict[str, dict[str, Any]]]
    augmentation: dict[str, Any] | None
    tokens: dict[str, Any] | None = None
    of_video: tuple[str, ...] = ()


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


def facts_of(options: CacheOptions, encoders: Encoders) -> Facts:
    """The facts for these options, which have one size, and encoders."""
    size = {"height": options.height, "width": options.width}
    video = {**size, "num_frames": options.num_frames, "fps": options.fps}
    stored = {"format": FORMAT, "dtype": options.dtype}
    height, width = encoders.canvas_size(options)
    canvas = {"height": height, "width": width, "keep_background": options.keep_background}
    tokens = list(encoders.token_grid(options))
    augmentation = {
        "variants": options.reference_variants,
        "seed": options.seed,
        "ranges": dataclasses.asdict(AUGMENTATION),
    }
    return Facts(
        video={**stored, **video, "vae": encoders.vae},
        references={**stored, **canvas, "vae": encoders.vae},
        text={**stored, "max_sequence_length": options.max_sequence_length, "encoder": encoders.text_encoder},
        targets={
            target.objective: {
                teacher: stored
                | (video if target.of == "video" else {})
                | target.facts(teacher, encoders.sizes(options), encoders.models.get(target.objective, {}))
                for teacher in target.teachers
            }
            for target in options.all_targets
        },
        augmentation=augmentation if options.augment_references else None,
        tokens={"format": FORMAT, **canvas, "grid": tokens} if options.drop_background else None,
        of_video=tuple(target.objective for target in options.all_targets if target.of == "video"),
    )


def provenance_of(facts: Facts) -> dict[str, Any]:
    """What `meta.json` says of how parts were made; "teachers" are reference alignment's, as when it was alone."""
    values = dataclasses.asdict(facts)
    del values["of_video"]
    targets = values.pop("targets")
    values["teachers"] = targets.pop(REFERENCE, {})
    return values | ({"targets": targets} if targets else {})


def parts_of(row: Row, facts: Facts, digest: Digest = file_digest) -> RowParts:
    """The keys of the row's parts.

    Args:
        row: whose files are hashed.
        facts: what else decides.
        digest: hashes a file.

    Raises:
        UserError: a file that cannot be read.
    """
    images = [reference_facts(item, digest) for item in row.references]
    references = {"images": images, "augmentation": facts.augmentation if row.pair == "regular" else None}
    # Only what is there counts, so that the keys of whole clips stay what they were before there were segments.
    cut = [{"segment": row.segment, "crop": row.crop}] if row.segment or row.crop else []
    clip = digest(row.clip)

    def target_key(objective: str, fact: dict[str, Any]) -> str:
        return hash_of([clip, fact, *cut] if objective in facts.of_video else [references, fact])

    return RowParts(
        video=hash_of([clip, facts.video, *cut]),
        references=hash_of([references, facts.references]) if images else None,
        text=text_key(row.caption, facts),
        targets={
            objective: {teacher: target_key(objective, fact) for teacher, fact in teachers.items()}
            for objective, teachers in facts.targets.items()
            if images or objective in facts.of_video
        },
        tokens=hash_of([references, facts.tokens]) if facts.tokens and images else None,
    )


def text_key(caption: str, facts: Facts) -> str:
    """Name of a caption's part."""
    return hash_of([caption, facts.text])


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
            key=hash_of([parts.video, parts.references, parts.text, row.subjects]),
            file_name=row.file_name,
            line=row.line,
            parts=parts,
            shape=shape,
            variants=variants,
            subjects=tuple(row.subjects),
            source=row.source,
        )

    def encode_text(self, caption: str) -> str:
        """Write a caption's embedding (tokens, D) up to its last token; returns its key."""
        key = text_key(caption, self.facts)
        tokenizer = getattr(self.encoders.pipe, "tokenizer", None)
        self.cut += tokenizer is not None and count_tokens(tokenizer, caption) > self.options.max_sequence_length
        self._part("text", key, lambda: self._embedding(caption), "text encoder")
        return key

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

    def _embedding(self, caption: str) -> Tensor:
        length = self.options.max_sequence_length
        self.encoders.use("text")
        text = self.encoders.family.encode_text(self.encoders.pipe, [caption], length)[0]
        real = text.ne(0).any(-1).nonzero()
        return text[: int(real.max()) + 1 if len(real) else 1]


def _tokens(canvases: np.ndarray | None, grid: tuple[int, int]) -> Tensor:
    """bool (V, M, rows, columns): the tokens that show anything but white padding."""
    assert canvases is not None
    tokens = [[content_tokens(canvas, *grid) for canvas in variant] for variant in canvases]
    return torch.from_numpy(np.array(tokens))


def _images(canvases: np.ndarray | None) -> Tensor:
    """uint8 (V, M, H', W', 3) to float (V, M, 3, H', W') in [0, 1]."""
    assert canvases is not None
    return torch.from_numpy(canvases).movedim(-1, 2) / 255
