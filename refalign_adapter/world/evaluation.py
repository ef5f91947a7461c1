"""All that is measured of an adapter on the world's base: videos that the judge reads, and losses on held-out clips.

Held-out clips are drawn from a seed of their own, so that no demo's and no training's are among them.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from ..analysis.attribution import Attribution, reference_attribution
from ..analysis.results import to_json
from ..analysis.sensitivity import Sensitivity, reference_sensitivity
from ..branch.reference_branch import ReferenceBranch
from .encoding import Encoded, encode_clips
from .reading import Judge
from .sampling import Sampling
from .verdict import Verdict, verdict
from .watching import held_out_clips, watch

SEED = 1001
SIZE: dict[str, Any] = {"height": 64, "width": 64, "num_frames": 9}


@dataclass(frozen=True)
class Scenes:
    """How many clips are generated of each sort.

    Attributes:
        one, two: with so many subjects, of different kinds.
        same_kind: with two subjects of one kind.
        size: height, width, num_frames.
    """

    one: int = 16
    two: int = 12
    same_kind: int = 0
    size: Mapping[str, Any] = field(default_factory=lambda: SIZE)


@dataclass(frozen=True)
class Losses:
    """What held-out flow losses say.

    Attributes:
        sensitivity: with the right, wrong and no references.
        attribution: number of references -> which reference is used for which subject.
    """

    sensitivity: Sensitivity
    attribution: dict[int, Attribution]


def watch_scenes(
    pipe: Any, judge: Judge, scenes: Scenes, sampling: Sampling, *, seeds: Sequence[int] = (0,), batch_size: int = 8
) -> dict[str, Verdict]:
    """Generate, read and judge: `one`, `two`, `same_kind` -> what is measured of these scenes, those that there are.

    Args:
        pipe: a reference pipeline of the world's base.
        judge: reads the videos.
        scenes: how many clips.
        sampling: how videos are sampled.
        seeds: of the noise; every clip is generated with each.
        batch_size: videos at a time.
    """
    sorts = {"one": (scenes.one, 1, False), "two": (scenes.two, 2, False), "same_kind": (scenes.same_kind, 2, True)}
    return {
        name: verdict(
            judge,
            watch(
                pipe,
                judge,
                held_out_clips(count, subjects, seed=SEED, same_kind=same_kind, **scenes.size),
                sampling,
                seeds=seeds,
                batch_size=batch_size,
            ),
        )
        for name, (count, subjects, same_kind) in sorts.items()
        if count
    }


def measure_losses(
    pipe: Any,
    branch: ReferenceBranch,
    clips: int,
    *,
    seed: int = 0,
    batch_size: int = 8,
    size: Mapping[str, Any] = SIZE,
) -> Losses:
    """Flow losses on so many held-out clips for each number of subjects, one to three.

    Args:
        pipe: whose encoders are used.
        branch: the adapter on the pipeline's transformer.
        clips: how many.
        seed: of noise and pairing.
        batch_size: clips at a time.
        size: height, width, num_frames.
    """
    drawn = [clip for count in (1, 2, 3) for clip in held_out_clips(clips, count, seed=SEED, **size)]
    encoded = encode_clips(pipe, drawn, text_tokens=branch.config.max_sequence_length, seed=seed)
    samples = [item.sample for item in encoded]
    return Losses(
        reference_sensitivity(branch, samples, seed=seed, batch_size=batch_size),
        _attribution(branch, encoded, seed, batch_size),
    )


def attribution_of_drawn(
    pipe: Any,
    branch: ReferenceBranch,
    clips: int,
    *,
    subjects: int,
    seed: int = 0,
    batch_size: int = 8,
    size: Mapping[str, Any] = SIZE,
) -> dict[int, Attribution]:
    """Attribution alone, of clips with so many subjects; arguments as of `measure_losses`."""
    drawn = held_out_clips(clips, subjects, seed=SEED, **size)
    encoded = encode_clips(pipe, drawn, text_tokens=branch.config.max_sequence_length, seed=seed)
    return _attribution(branch, encoded, seed, batch_size)


def _attribution(
    branch: ReferenceBranch, encoded: Sequence[Encoded], seed: int, batch_size: int
) -> dict[int, Attribution]:
    return reference_attribution(
        branch,
        [item.sample for item in encoded],
        [item.masks for item in encoded],
        [item.replacements for item in encoded],
        seed=seed,
        batch_size=batch_size,
    )


def facts(verdicts: Mapping[str, Verdict], losses: Losses | None) -> dict[str, Any]:
    """What report.json holds of them, as JSON types: `reference_sensitivity`, `identity`, `confusion`, `copy_paste`,
    `motion` and `attribution`. Identity, copy-paste and motion are of single subjects, under `two` and `same_kind` of
    others; confusion is of two subjects, under `same_kind` of two of one kind."""
    of_losses = (
        {}
        if losses is None
        else {
            "reference_sensitivity": losses.sensitivity.to_dict(),
            "attribution": to_json(losses.attribution),
        }
    )
    return {
        **of_losses,
        "identity": _by_sort("one", {name: _identity(found) for name, found in verdicts.items()}),
        "confusion": _by_sort("two", {name: _confusion(found) for name, found in verdicts.items() if found.mixing}),
        "copy_paste": _by_sort("one", {name: to_json(found.copy_paste) for name, found in verdicts.items()}),
        "motion": _by_sort("one", {name: to_json(found.motion) for name, found in verdicts.items()}),
    }


def _by_sort(first: str, found: dict[str, dict[str, Any]]) -> dict[str, Any]:
    return {**found.get(first, {}), **{name: item for name, item in found.items() if name != first}}


def _identity(found: Verdict) -> dict[str, Any]:
    top1 = found.top1.to_dict()
    return {"top1": top1.pop("value"), **top1, **to_json(found.identity)}


def _confusion(found: Verdict) -> dict[str, Any]:
    return {**to_json(found.confusion), "mixing": to_json(found.mixing)}
