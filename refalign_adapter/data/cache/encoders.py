"""The frozen encoders that make a cache, and their versions: the base's VAE and text encoder, and the teachers."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import try_to_load_from_cache
from torch import Tensor, nn

from ...batch import REFERENCE
from ...errors import ConfigError
from ...families._base_model import read_base_model
from ...families._pipeline_folder import open_pipeline, reading
from ...families.base import Family
from ...hashes import file_digest
from ...media.canvas import fixed_size_problems, reference_size
from ...media.sizes import size_misfits
from ...teachers.base import Teacher
from ...teachers.lookup import load_teacher
from .options import DTYPES, CacheOptions, model_id
from .targets import Sizes

PIPELINE_CONFIG = "model_index.json"
FIELD = "base_model"


@dataclass
class Encoders:
    """What encodes rows, on one device: first captions, then clips and references, as all together need more memory.

    Attributes:
        family: the base's family.
        pipe: the base's pipeline without its transformer.
        transformer: the base's, of which only the configuration is asked; on "meta" it does.
        models: objective -> id -> teacher.
        vae: JSON facts that decide latents.
        text_encoder: JSON facts that decide text embeddings.
        device: where encoders work; those that do not wait in host memory.
    """

    family: Family
    pipe: Any
    transformer: Any
    models: dict[str, dict[str, Teacher]] = field(default_factory=dict)
    vae: dict[str, Any] = field(default_factory=dict)
    text_encoder: dict[str, Any] = field(default_factory=dict)
    device: torch.device | str = "cpu"

    def __post_init__(self) -> None:
        self._at_work: str | None = None

    def use(self, kind: str) -> None:
        """Have the encoders of captions ("text") or of clips and references ("images") on the device, no others."""
        if self._at_work == kind:
            return
        components = [(name, item) for name, item in vars(self.pipe).items() if isinstance(item, nn.Module)]
        texts = [item for name, item in components if name.startswith("text_encoder")]
        images = [item for name, item in components if not name.startswith("text_encoder")]
        come, go = (texts, images) if kind == "text" else (images, texts)
        for module in go:
            module.to("cpu")
        for module in come:
            module.to(self.device)
        for teacher in (teacher for teachers in self.models.values() for teacher in teachers.values()):
            teacher.to("cpu" if kind == "text" else self.device)
        self._at_work = kind

    @property
    def patch_size(self) -> tuple[int, int, int]:
        """Latent frames, rows and columns that make one token."""
        return self.family.patch_size(self.transformer)

    @property
    def teachers(self) -> dict[str, Teacher]:
        """Those of reference alignment."""
        return self.models.get(REFERENCE, {})

    @property
    def widths(self) -> dict[str, dict[str, int]]:
        """Objective -> teacher id -> width, of loaded teachers."""
        return {name: {key: teacher.dim for key, teacher in models.items()} for name, models in self.models.items()}

    def sizes(self, options: CacheOptions) -> Sizes:
        """What rows are brought to, of options with one size."""
        return Sizes(
            video=(options.num_frames, options.height, options.width),
            canvas=self.canvas_size(options),
            keep_background=options.keep_background,
            tokens=self.token_grid(options),
            multiples=self.family.size_multiples(self.pipe, self.patch_size),
        )

    def shapes(self, options: CacheOptions) -> dict[str, dict[str, tuple[int, ...]]]:
        """Objective -> teacher id -> shape of one reference's or one row's target, of options with one size."""
        sizes = self.sizes(options)
        return {
            target.objective: {
                teacher: target.shape(teacher, sizes, self.models.get(target.objective, {}))
                for teacher in target.teachers
            }
            for target in options.all_targets
        }

    def texts(self, options: CacheOptions) -> dict[str, Tensor]:
        """Shapes and types, on "meta", of a caption's tensors (1, …): the transformer's argument -> its tensor."""
        like = torch.empty(1, dtype=DTYPES[options.dtype], device="meta")
        return self.family.no_text(self.transformer, like, options.max_sequence_length)

    def target_facts(self, options: CacheOptions) -> dict[str, Any]:
        """What `meta.json` says of the targets, see `index`."""
        shapes = self.shapes(options.at(options.sizes[0]))
        return {
            target.objective: {
                "of": target.of,
                "shapes": {
                    name: [*[None] * (len(shape) - 1), shape[-1]] for name, shape in shapes[target.objective].items()
                },
            }
            for target in options.all_targets
        }

    def canvas_size(self, options: CacheOptions) -> tuple[int, int]:
        """Height and width of a reference's canvas in pixels."""
        _, rows, columns = self.family.size_multiples(self.pipe, self.patch_size)
        scale, fixed = options.reference_scale, options.reference_size
        return reference_size(options.height, options.width, scale, (rows, columns), fixed)

    def token_grid(self, options: CacheOptions) -> tuple[int, int]:
        """Rows and columns of tokens that the base's transformer makes of a reference."""
        _, rows, columns = self.family.size_multiples(self.pipe, self.patch_size)
        height, width = self.canvas_size(options)
        return height // rows, width // columns

    def check_sizes(self, options: CacheOptions) -> None:
        """Refuse sizes that the base cannot cut into tokens, and frames a second that it would take for others.

        Raises:
            ConfigError: lists every such size, each with the nearest that fits.
        """
        multiples = self.family.size_multiples(self.pipe, self.patch_size)
        problems = [problem for size in options.sizes for problem in size_misfits(size, multiples)]
        if options.buckets:
            problems = [f"data.buckets {problem}" for problem in problems]
        problems += fixed_size_problems(options.reference_size, multiples[1:])
        rate = self.family.frame_rate
        if rate is not None and options.fps not in (None, rate):
            got = f"got {options.fps:g}"
            problems.append(f"data.fps must be {rate:g}, of which {self.family.key!r} makes positions, or null; {got}")
        if problems:
            raise ConfigError(list(dict.fromkeys(problems)))


def load_encoders(options: CacheOptions, device: torch.device | str = "cpu") -> Encoders:
    """Load VAE, text encoder and teachers, to work on `device`; the base's transformer is only asked for its config.

    Raises:
        UserError: a base or teacher that cannot be read or is not supported.
        ConfigError: sizes that the base cannot cut into tokens.
    """
    name = options.base_model
    model = read_base_model(name, field=FIELD, revision=options.revision, family=options.family)
    text_dtype = DTYPES[options.text_encoder_dtype]
    base = open_pipeline(
        name,
        field=FIELD,
        revision=options.revision,
        weights=("vae", "text_encoder"),
        variant=options.variant,
        classes=model.family.classes,
    )
    with reading(name, FIELD):
        pipe = model.family.load_encoders(
            str(base.path), variant=options.variant, dtype={"vae": torch.float32, "default": text_dtype}
        )
    models = {
        target.objective: {name: load_teacher(name, layer=target.layer) for name in target.models}
        for target in options.all_targets
    }
    facts = {"id": model_id(name), "variant": options.variant}
    encoders = Encoders(
        model.family,
        pipe,
        model.transformer,
        models,
        vae={**facts, "version": version_of(options, ("vae",)), "dtype": "fp32"},
        text_encoder={
            **facts,
            "version": version_of(options, ("text_encoder", "tokenizer")),
            "dtype": options.text_encoder_dtype,
        },
        device=device,
    )
    encoders.check_sizes(options)
    return encoders


def version_of(
    options: CacheOptions, components: tuple[str, ...], file_digest: Callable[[str | Path], str] = file_digest
) -> str | None:
    """What version of a base's components is here: the Hub's commit, or a digest of a local folder's files.

    Args:
        options: name the base.
        components: beginnings of the subfolders' names, such as "tokenizer".
        file_digest: a file's sha256; `digests.FileDigests` reads no file twice that has not changed.

    Returns:
        None when the base is neither a folder with their weights nor in the Hub's cache.
    """
    if not os.path.isdir(options.base_model):
        path = try_to_load_from_cache(options.base_model, PIPELINE_CONFIG, revision=options.revision)
        return Path(path).parent.name if isinstance(path, str) else None
    digest = hashlib.sha256()
    inside = sorted(path for path in Path(options.base_model).glob("*/*") if path.parent.name.startswith(components))
    if not any(path.suffix == ".safetensors" for path in inside):
        return None
    for path in inside:
        if path.is_file():
            digest.update(f"{path.parent.name}/{path.name}".encode())
            digest.update(bytes.fromhex(file_digest(path)))
    return f"sha256:{digest.hexdigest()}"
