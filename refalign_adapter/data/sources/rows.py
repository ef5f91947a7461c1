"""What a data set consists of: rows, each one clip with its caption and the references of its subjects."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ...media.canvas import Box

PAIRS = ("regular", "cross")


@dataclass(frozen=True)
class RunLengthMask:
    """A mask as COCO writes it, see `masks`.

    Attributes:
        height, width: of the mask in pixels.
        counts: compressed run lengths.
    """

    height: int
    width: int
    counts: str


@dataclass(frozen=True)
class Reference:
    """One reference image: a picture, or a frame of a video.

    Attributes:
        image: picture of the subject, alone or among others; with `frame`, a video.
        mask: picture of the same size, bright on the subject; None: all of the image, or of the box.
        box: around the subject; None: all of the image, or what the mask covers.
        subject: references of a row with the same name are views of one subject; None: a subject of its own.
        frame: which frame of the video: a number from 0, or (a float) a share of its frames in [0, 1].
        crop: what of the frame is used; mask and box are in its coordinates.
        long_side: a longer picture is scaled down to this many pixels; the box is in the scaled picture's coordinates.
        rle: a mask in place of a picture of one.
    """

    image: Path
    mask: Path | None = None
    box: Box | None = None
    subject: str | None = None
    frame: int | float | None = None
    crop: tuple[int, int, int, int] | None = None
    long_side: int | None = None
    rle: RunLengthMask | None = None


@dataclass(frozen=True)
class Row:
    """One clip with its caption and references.

    Attributes:
        file_name: the clip as its data set names it.
        clip: the clip's path.
        caption: what happens in it.
        references: of its subjects; none where the clip is trained on by its caption alone.
        pair: "regular": the references are cut from the clip itself; "cross": they come from elsewhere.
        line: where it stands in its table, from 1.
        segment: the clip's first frame and the one after its last, counted from 0; None: the whole file.
        crop: what of its frames is used, (left, top, right, bottom) in pixels; None: all.
        source: which of the sources that are mixed it is from, counted from 0.
        caption_file: the file beside the clip that the caption is from; None: its table.
    """

    file_name: str
    clip: Path
    caption: str
    references: tuple[Reference, ...]
    pair: str = "cross"
    line: int = 0
    segment: tuple[int, int] | None = None
    crop: tuple[int, int, int, int] | None = None
    source: int = 0
    caption_file: Path | None = None

    @property
    def subjects(self) -> list[int]:
        """One number per reference, counted from 0; equal numbers are views of one subject."""
        numbers: dict[Any, int] = {}
        names = [index if item.subject is None else item.subject for index, item in enumerate(self.references)]
        return [numbers.setdefault(name, len(numbers)) for name in names]
