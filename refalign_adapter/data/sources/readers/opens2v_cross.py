"""OpenS2V-5M's cross pairs: a clip's references are the same subjects in another clip.

`path` is the file of pairs, `clusters` the cluster map (default: `cluster_videos.json` beside it), `parts` the folder
of the regular parts that both name as `part/clip` (default: that of the pairs), `videos` the folder of their videos.
A pair serves both ways: each of its clips is trained on with the other's subject.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field, replace
from itertools import islice
from pathlib import Path
from typing import Any, ClassVar

from ....errors import UserError
from ..masks import mask_overlaps
from ..opens2v import SELECTION, Clip, Subject, Unusable, read_clip
from ..rows import Row
from ..selection import select_subjects
from ..tables import local_path, read_records
from .base import Reader, Reading, Source, clip_folder

PAIRS_NAME = "cross_pairs.json"


class CrossReader(Reader):
    """See the module; `min_text` and `min_image` are the similarities that a pair has to reach (or exceed)."""

    options: ClassVar[dict[str, Any]] = {
        **SELECTION,
        "clusters": None,
        "parts": None,
        "min_text": 0.6,
        "min_image": 0.6,
    }

    def tables(self, source: Source) -> list[Path]:
        pairs, clusters, parts = _places(source)
        if missing := [path for path in (pairs, clusters) if not path.is_file()]:
            raise UserError(f"cannot read {str(missing[0])!r} (No such file or directory)")
        found = sorted(path for path in parts.rglob("*.json") if path not in (pairs, clusters))
        if not found:
            raise UserError(f"parts: {str(parts)!r} has no .json of a regular part")
        return [pairs, clusters, *found]

    def read(self, source: Source, *, max_references: int | None = None) -> Reading:
        pairs, clusters, *parts = self.tables(source)
        members = {
            name: {key for key in keys if isinstance(key, str)}
            for name, keys in read_records(clusters)
            if isinstance(keys, list)
        }
        reading, found = Reading(), _Pairs(source.options)
        for cluster, listed in read_records(pairs):
            for pair in listed if isinstance(listed, list) else []:
                found.add(pair, members.get(cluster, set()))
        reading.left_out += found.left_out
        most = min(source.options["max_subjects"], max_references or source.options["max_subjects"])
        used = dict(islice(found.by_clip.items(), source.max_rows))
        clips = _Clips(parts, clip_folder(source, pairs.parent), used)
        for number, (key, subjects) in enumerate(used.items(), 1):
            try:
                row = _row(clips, key, subjects, {**source.options, "max_subjects": most})
            except Unusable as error:
                reading.left_out[f"clips {error}"] += 1
            else:
                reading.add(replace(row, line=number), ())
        return reading


READER = CrossReader()


def _places(source: Source) -> tuple[Path, Path, Path]:
    """The file of pairs, the cluster map, the folder of parts."""
    path = local_path(source.path, ["*.json"], revision=source.revision)
    pairs = path / PAIRS_NAME if path.is_dir() else path
    clusters, parts = source.options["clusters"], source.options["parts"]
    return (
        pairs,
        Path(clusters) if clusters else pairs.parent / "cluster_videos.json",
        Path(parts) if parts else pairs.parent,
    )


@dataclass(frozen=True)
class _Match:
    """A subject's counterpart in another clip: that clip, its mask's number, how alike they look."""

    clip: str
    mask: str
    likeness: float


@dataclass
class _Pairs:
    """Pairs that can be used, by the clip to train on and its mask: the counterparts."""

    options: Any
    by_clip: dict[str, dict[str, list[_Match]]] = field(default_factory=dict)
    left_out: Counter[str] = field(default_factory=Counter)

    def add(self, pair: Any, members: set[str]) -> None:
        try:
            ends = [(str(pair[f"{end}_id"]), str(pair[f"{end}_class_id"])) for end in ("cur", "aft")]
            text, image = float(pair["text_similarity"]), float(pair["image_similarity"])
        except (KeyError, TypeError, ValueError, OverflowError):
            self.left_out["pairs lack a key"] += 1
            return
        (one, one_mask), (other, other_mask) = ends
        if one.rpartition("/")[2] == other.rpartition("/")[2]:
            self.left_out["pairs are one clip in two parts"] += 1
        elif not {one, other} <= members:
            self.left_out["pairs are not of their cluster"] += 1
        elif not (text >= self.options["min_text"] and image > self.options["min_image"]):  # NaN is not alike
            self.left_out["pairs are not alike enough"] += 1
        else:
            self._of(one, one_mask).append(_Match(other, other_mask, image))
            self._of(other, other_mask).append(_Match(one, one_mask, image))

    def _of(self, clip: str, mask: str) -> list[_Match]:
        return self.by_clip.setdefault(clip, {}).setdefault(mask, [])


class _Clips:
    """Clips by `part/key`: of all parts, those that are used and their counterparts; each part is read once."""

    def __init__(self, parts: list[Path], videos: Path, used: dict[str, dict[str, list[_Match]]]):
        self.parts = {path.stem for path in parts}
        self.found: dict[str, Clip | Unusable] = {}
        counterparts = (match.clip for subjects in used.values() for matches in subjects.values() for match in matches)
        wanted = {*used, *counterparts}
        named = {key.partition("/")[0] for key in wanted}
        for path in parts:
            if path.stem in named:
                self._read(path, wanted, videos)

    def _read(self, path: Path, wanted: set[str], videos: Path) -> None:
        for name, record in read_records(path):
            if (key := f"{path.stem}/{name}") in wanted:
                try:
                    self.found[key] = read_clip(record, [videos / path.stem, videos])
                except Unusable as error:
                    self.found[key] = error

    def __call__(self, key: str) -> Clip:
        found, part = self.found.get(key), key.partition("/")[0]
        if found is None:
            missing = "are not in their part" if part in self.parts else f"are in a part that is not here ({part})"
            raise Unusable(missing)
        if isinstance(found, Unusable):
            raise found
        return found


def _row(clips: _Clips, key: str, matches: dict[str, list[_Match]], options: dict[str, Any]) -> Row:
    """The clip with the best counterpart of each of its subjects."""
    clip = clips(key)
    pairs = _matched(clips, {item: matches[item.key] for item in clip.subjects if item.key in matches}, options)
    # Where the subject is and what it is called is read off the clip; how good its picture is, off the reference.
    candidates = [
        replace(subject.candidate, aesthetic=other.candidate.aesthetic, gme=other.candidate.gme)
        for subject, _, other in pairs
    ]
    limits = {name: options[name] for name in SELECTION}
    chosen = select_subjects(candidates, background=clip.background, **limits)
    if not chosen:
        raise Unusable("have no subject that passes the selection")
    references = tuple(other.reference(shown, subject.key) for subject, other, shown in (pairs[i] for i in chosen))
    return Row(clip.file_name, clip.path, clip.caption, references, "cross", 0, clip.segment, clip.crop)


def _matched(
    clips: _Clips, matches: dict[Subject, list[_Match]], options: dict[str, Any]
) -> list[tuple[Subject, Clip, Subject]]:
    """(subject, other clip, its counterpart there), the likest first; no counterpart stands for two subjects."""
    found: list[tuple[Subject, Clip, Subject]] = []
    limits = {name: options[name] for name in ("min_aesthetic", "min_gme")}
    for subject, match in _likest(matches):
        shown = _open(clips, match)
        if shown is None or any(subject is other for other, _, _ in found):
            continue
        clip, counterpart = shown
        taken = [mask.candidate.mask for _, other, mask in found if other.path == clip.path]
        overlaps = mask_overlaps([counterpart.candidate.mask, *taken])[0, 1:]
        good = select_subjects([counterpart.candidate], background=clip.background, **limits)
        if good and not (overlaps > options["max_overlap"]).any():
            found.append((subject, *shown))
    return found


def _likest(matches: dict[Subject, list[_Match]]) -> list[tuple[Subject, _Match]]:
    """Each subject with what is likest to it in each other clip, the likest of all first.

    Less alike ones are mostly other subjects of its kind.
    """
    best: dict[tuple[Subject, str], _Match] = {}
    for subject, listed in matches.items():
        for match in sorted(listed, key=lambda match: -match.likeness):
            best.setdefault((subject, match.clip), match)
    pairs = [(subject, match) for (subject, _), match in best.items()]
    return sorted(pairs, key=lambda pair: -pair[1].likeness)


def _open(clips: _Clips, match: _Match) -> tuple[Clip, Subject] | None:
    """The other clip and the subject there; None where that clip is not here."""
    try:
        clip = clips(match.clip)
    except Unusable:
        return None
    return next(((clip, subject) for subject in clip.subjects if subject.key == match.mask), None)
