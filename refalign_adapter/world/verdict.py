"""What watched videos say: identity, confusion, copy-paste and motion, by the measures of `analysis/`.

Shape letters: V videos, M subjects of each, S = V · M subjects, K candidates, F frames, L looks.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from ..analysis.confusion import Confusion, confusion
from ..analysis.copy_paste import angle_slope, mirrored_alike, ncc, pasted
from ..analysis.estimate import Estimate
from ..analysis.identity import Identity, looks_right, most_common, retrieval
from ..analysis.mixing import Mixing, mixing
from ..analysis.motion import motion_right
from ..analysis.results import Result
from .angles import estimate_pose
from .crops import canonical
from .judge import LOOK_NAMES
from .paths import motion_templates
from .portraits import draw_reference
from .reading import Judge
from .scenes import Clip
from .subjects import KINDS, Subject, random_subject
from .watching import Watched

CANDIDATES = 16
VIEWS = 8
TURNING = ("rolls", "spins", "sways")
"""Begin the motions in which a subject turns."""
LEANING = np.pi / 3
"""More than others lean, and than references do."""


@dataclass(frozen=True)
class CopyPaste(Result):
    """Whether references are pasted.

    Attributes:
        pasted: likeness to the reference as shown above that to other views of the same subject.
        angle_slope: of the generated angle on the reference's, over subjects that do not turn.
        mirrored_alike: share mirrored as in the reference.
    """

    pasted: Estimate
    angle_slope: Estimate
    mirrored_alike: Estimate


@dataclass(frozen=True)
class Verdict(Result):
    """What is measured of videos with M subjects each.

    Attributes:
        identity: share of looks that are right, over subjects and frames.
        top1: share of subjects whose own reference is first among 16 of its kind.
        confusion, mixing: of several subjects; None with one.
        copy_paste: see `CopyPaste`.
        motion: share of subjects that do what the caption says.
    """

    identity: Identity
    top1: Estimate
    confusion: Confusion | None
    mixing: Mixing | None
    copy_paste: CopyPaste
    motion: Estimate


def verdict(judge: Judge, watched: Watched, *, seed: int = 0) -> Verdict:
    """Measure; intervals are over clips, whatever the number of seeds.

    Args:
        judge: whose counted looks decide.
        watched: see `Watched`.
        seed: of candidates, other views and bootstraps.
    """
    several = watched.read.shape[1] > 1
    owners = np.repeat(watched.numbers, watched.read.shape[1])
    truth, read = watched.truth, watched.read
    counted = np.isin(LOOK_NAMES, judge.counted)
    seen = most_common(read.reshape(-1, *read.shape[2:])).reshape(truth.shape)
    return Verdict(
        looks_right(read.reshape(-1, *read.shape[2:]), truth.reshape(-1, truth.shape[-1]), counted, owners, seed=seed),
        retrieval(_among_candidates(judge, watched, seed), owners, seed=seed),
        confusion(_among_each_other(judge, watched), watched.numbers, seed=seed) if several else None,
        mixing(seen[..., counted], truth[..., counted], watched.numbers, seed=seed) if several else None,
        copy_paste(watched, seed=seed),
        _motion(watched, owners, seed),
    )


def candidates(subject: Subject, seed: int) -> list[Subject]:
    """A held-out subject and 15 others of its kind, itself first."""
    generator = np.random.default_rng([seed, 23, list(KINDS).index(subject.kind), subject.number])
    found = [subject]
    while len(found) < CANDIDATES:
        other = random_subject(generator, subject.split, subject.kind)
        found += [other] if other not in found else []
    return found


def copy_paste(watched: Watched, *, seed: int = 0) -> CopyPaste:
    """Compare each subject, in the frame that shows it largest, with its reference and other views of it."""
    rows = [
        _compare(clip, place, video, masks[place], seed, number)
        for number, clip, video, masks in zip(
            watched.numbers, watched.clips, watched.videos, watched.masks, strict=True
        )
        for place in range(len(clip.subjects))
        if masks[place].any()
    ]
    found = [row for row in rows if np.isfinite([row.shown, *row.others]).all()]
    upright = [row for row in rows if not row.turning]
    return CopyPaste(
        pasted(
            np.array([row.shown for row in found]),
            np.array([row.others for row in found]).reshape(-1, VIEWS),
            [row.number for row in found],
            seed=seed,
        ),
        angle_slope(
            np.array([row.angle for row in upright]),
            np.array([row.reference_angle for row in upright]),
            [row.number for row in upright],
            seed=seed,
        ),
        mirrored_alike(
            np.array([row.mirrored for row in rows], dtype=bool),
            np.array([row.reference_mirrored for row in rows], dtype=bool),
            [row.number for row in rows],
            seed=seed,
        ),
    )


@dataclass(frozen=True)
class _Comparison:
    number: int
    turning: bool
    shown: float
    others: list[float]
    angle: float
    mirrored: bool
    reference_angle: float
    reference_mirrored: bool


def _compare(clip: Clip, place: int, video: np.ndarray, masks: np.ndarray, seed: int, number: int) -> _Comparison:
    subject, pose = clip.subjects[place], clip.reference_poses[place]
    frame = int(masks.sum((1, 2)).argmax())
    crop, mask = canonical(video[frame], masks[frame])
    generator = np.random.default_rng([seed, 29, list(KINDS).index(subject.kind), subject.number])
    height, width = masks.shape[1:]
    pictures = [(clip.references[place], clip.masks[place])]
    for _ in range(VIEWS):
        view = draw_reference(subject, generator, height, width)
        pictures.append((view.image, view.mask))
    views = [canonical(np.asarray(image), np.asarray(other) > 0) for image, other in pictures]
    both = np.stack([mask & other for _, other in views])
    alike = ncc(np.stack([crop] * len(views)), np.stack([view for view, _ in views]), both)
    turning = clip.motions[place].startswith(TURNING)
    angle, mirrored = estimate_pose(crop, mask, subject, within=np.pi if turning else LEANING)
    return _Comparison(
        number,
        turning,
        float(alike[0]),
        alike[1:].tolist(),
        angle,
        mirrored,
        pose.angle,
        pose.mirrored,
    )


def _among_candidates(judge: Judge, watched: Watched, seed: int) -> np.ndarray:
    """Likeness (S, K), the right one first."""
    return np.array(
        [
            judge.likeness(row[None], candidates(subject, seed))[0]
            for clip, rows in zip(watched.clips, watched.probabilities, strict=True)
            for subject, row in zip(clip.subjects, rows, strict=True)
        ]
    )


def _among_each_other(judge: Judge, watched: Watched) -> np.ndarray:
    """Likeness (V, M, M) of generated subjects to the references of their video."""
    pairs = zip(watched.clips, watched.probabilities, strict=True)
    return np.array([judge.likeness(rows, clip.subjects) for clip, rows in pairs])


def _motion(watched: Watched, owners: np.ndarray, seed: int) -> Estimate:
    paths = watched.paths
    said = [motion for clip in watched.clips for motion in clip.motions]
    templates = motion_templates(paths.shape[1], paths.shape[2])
    return motion_right(paths.reshape(-1, *paths.shape[2:]), said, templates, owners, seed=seed)
