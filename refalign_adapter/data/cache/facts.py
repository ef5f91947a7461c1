"""What decides the parts of a row: the bytes of its files, every model, revision, layer and setting.

Each part is named by a hash of these, so parts are shared by the rows they are equal for, and a changed file, caption,
model or setting makes exactly the parts it concerns anew.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ...batch import EMBEDDING, REFERENCE
from ...hashes import file_digest, hash_of
from ...media.canvas import AUGMENTATION
from ..sources.pictures import reference_facts
from ..sources.rows import Row
from .encoders import Encoders
from .entries import RowParts
from .index import FORMAT
from .options import CacheOptions

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
        text_arguments: names of what a caption gives.
    """

    video: dict[str, Any]
    references: dict[str, Any]
    text: dict[str, Any]
    targets: dict[str, dict[str, dict[str, Any]]]
    augmentation: dict[str, Any] | None
    tokens: dict[str, Any] | None = None
    of_video: tuple[str, ...] = ()
    text_arguments: tuple[str, ...] = (EMBEDDING,)


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
        text_arguments=encoders.family.text_arguments,
    )


def provenance_of(facts: Facts) -> dict[str, Any]:
    """What `meta.json` says of how parts were made; "teachers" are reference alignment's, as when it was alone."""
    values = dataclasses.asdict(facts)
    del values["of_video"], values["text_arguments"]
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
        text=text_keys_of(row.caption, facts),
        targets={
            objective: {teacher: target_key(objective, fact) for teacher, fact in teachers.items()}
            for objective, teachers in facts.targets.items()
            if images or objective in facts.of_video
        },
        tokens=hash_of([references, facts.tokens]) if facts.tokens and images else None,
    )


def text_keys_of(caption: str, facts: Facts) -> dict[str, str]:
    """The transformer's argument -> name of a caption's part for it."""
    return {
        name: hash_of([caption, facts.text] if name == EMBEDDING else [caption, facts.text, name])
        for name in facts.text_arguments
    }
