"""What can be found in a data set: problems, which have to be mended, and notes, which are for people to look at."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Kind:
    """A kind of finding.

    Attributes:
        title: what the findings of this kind are.
        advice: the way out; empty where each finding says it itself.
        problem: whether training must not start with it.
    """

    title: str
    advice: str = ""
    problem: bool = False


def _problem(title: str, advice: str = "") -> Kind:
    return Kind(title, advice, problem=True)


KINDS = {
    "table": _problem("what the table says of a row"),
    "clip": _problem("clips that cannot be read", "replace the file or remove the row"),
    "too_short": _problem("clips that are too short"),
    "reference": _problem("references that cannot be drawn", "mend the file, or what the row says of it"),
    "same_picture": _problem(
        "one picture as two subjects of a row",
        "the loss would push equal targets apart: give both one subject name, or leave one out",
    ),
    "repeated_row": _problem("rows that occur twice", "remove one of them"),
    "leak": _problem("clips in both splits", "remove it from one: as it is, validation tells nothing of new clips"),
    "subject_names": Kind(
        "one picture under two subject names", "within a row it would be pushed apart from itself; is it one subject?"
    ),
    "repeated_clip": Kind("clips that occur twice", "they count twice in training; captions of one clip may differ"),
    "small_subject": Kind(
        "subjects that are blown up", "a reference so small shows few details; look for a larger one"
    ),
    "blank_reference": Kind("references of one colour", "there is nothing to learn from; look at mask and box"),
    "box_outside": Kind("boxes that leave their picture", "they are clipped, and may be of a picture of another size"),
    "whole_picture": Kind(
        "references of regular pairs without mask and box",
        "what is not marked counts as the subject: a frame's background is learnt as something to copy, and a white "
        "ground is tinted by augmentation; add masks",
    ),
    "covers_frame": Kind(
        "references that cover their frame", "nearly the whole frame is the subject, which is learnt as copying it"
    ),
    "enlarged_clip": Kind(
        "clips that are enlarged", "they are blurred at their size; use larger clips or smaller sizes"
    ),
    "cropped_clip": Kind("clips that are cropped a lot", "subjects may be cut off; add a size of the clips' shape"),
    "low_fps": Kind(
        "clips with fewer frames a second than fps", "their frames repeat; lower data.fps or leave them out"
    ),
    "frozen_clip": Kind("clips in which nothing moves", "they teach videos that stand still"),
    "outside": Kind("files outside their data set's folder", "fine for your own data; they will not travel with it"),
    "alpha_mask": Kind(
        "masks read by their alpha channel", "what is not transparent counts as the subject, whatever its colour"
    ),
    "long_caption": Kind("captions that are cut", "what comes after max_sequence_length tokens is not seen"),
    "short_caption": Kind("short captions", "a caption names each subject's kind and says what it does"),
    "common_caption": Kind("captions that many rows share", "a caption is to describe its own clip"),
    "few_subjects": Kind("too few subjects", "the adapter would learn one subject's looks, not to follow references"),
    "no_references": Kind(
        "rows without references",
        "their clips are trained on by the caption alone, and teach nothing to an adapter for references alone",
    ),
    "one_subject": Kind(
        "no row with two subjects",
        "the alignment loss pushes apart subjects of a row, so its negative term is always 0",
    ),
}
"""By name; problems first, then notes, in the order in which they are told."""


@dataclass(frozen=True)
class Finding:
    """One thing that was found.

    Attributes:
        kind: its name in `KINDS`.
        text: the field and the value received.
        place: the table and the row's line in it.
        clip: the row's clip as its table names it.
        row: the row's number in the check; None: of a row that cannot be made, or of the whole set.
    """

    kind: str
    text: str
    place: str = ""
    clip: str = ""
    row: int | None = None

    @property
    def problem(self) -> bool:
        """Whether it has to be mended."""
        return KINDS[self.kind].problem

    def line(self) -> str:
        """Where and what it is in one line; a problem's ends with the way out, which notes say once for their kind."""
        advice = KINDS[self.kind].advice
        text = f"{self.text}; {advice}" if self.problem and advice else self.text
        return ": ".join(part for part in (self.place, self.clip, text) if part)


def by_kind(findings: list[Finding]) -> dict[str, list[Finding]]:
    """The findings of each kind that occurs, in the order of `KINDS`."""
    groups: dict[str, list[Finding]] = {kind: [] for kind in KINDS}
    for finding in findings:
        groups[finding.kind].append(finding)
    return {kind: found for kind, found in groups.items() if found}
