"""Which of the subjects that a data set's annotators found in a clip become references.

The paper's loader (RefAlign, arXiv 2603.25743) keeps subjects by two scores, at most the three largest. On real
records that alone picks grass and the same park twice, so backgrounds and masks of what is already chosen are left out
as well.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass

import numpy as np

from .masks import mask_areas, mask_overlaps
from .rows import RunLengthMask


@dataclass(frozen=True)
class Candidate:
    """A subject that a clip shows.

    Attributes:
        name: what it is called; "person".
        mask: where it is.
        aesthetic: how good its picture looks, about 0 to 10; None: not scored.
        gme: how well name and picture match, a cosine; None: not scored.
    """

    name: str
    mask: RunLengthMask
    aesthetic: float | None = None
    gme: float | None = None


def select_subjects(
    candidates: Sequence[Candidate],
    *,
    background: Collection[str] = (),
    min_aesthetic: float = 4.5,
    min_gme: float = 0.6,
    max_overlap: float = 0.95,
    max_subjects: int = 3,
) -> list[int]:
    """Indices of the subjects to use, the largest first.

    Args:
        candidates: what there is, masks all of one frame.
        background: names that are no subjects, in any case.
        min_aesthetic, min_gme: one of the two scores has to reach its bound.
        max_overlap: intersection over union with a larger one that is used, above which it is taken to be the same.
        max_subjects: how many at most.
    """
    scenery = {name.strip().lower() for name in background}
    kept = [
        index
        for index, item in enumerate(candidates)
        if (_reaches(item.aesthetic, min_aesthetic) or _reaches(item.gme, min_gme))
        and item.name.strip().lower() not in scenery
    ]
    masks = [candidates[index].mask for index in kept]
    areas, overlaps = mask_areas(masks), mask_overlaps(masks)
    chosen: list[int] = []
    for place in np.argsort([-area for area in areas], kind="stable").tolist():
        if len(chosen) < max_subjects and areas[place] and not (overlaps[place, chosen] > max_overlap).any():
            chosen.append(place)
    return [kept[place] for place in chosen]


def _reaches(score: float | None, bound: float) -> bool:
    return score is not None and score >= bound
