"""One row looked at as training will see it: its clip decoded, its references drawn; facts and findings are kept.

Everything is read by the functions that make the cache, so that a row without a problem here has none there.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import cache

import numpy as np
from PIL import Image
from torch.utils.data import Dataset

from ...errors import UserError
from ...hashes import file_digest, hash_of
from ...media.canvas import NEARLY_WHITE, cut_out, reference_size
from ...media.sizes import Size, VideoFacts, enlargement, kept_share
from ...media.video import TooShortError, probe_video
from ..cache.facts import Digest
from ..cache.options import CacheOptions
from ..cache.prepare import at_its_size, read_clip
from ..sources.pictures import Picture, draw_reference, open_picture, reference_facts
from ..sources.rows import Reference, Row
from .findings import Finding

TOKEN = (16, 16)
"""Pixel rows and columns that make one token of Wan; with another base, canvases may be rounded otherwise."""
ENLARGED_SUBJECT = 4.0
"""Factor beyond which a subject on its canvas is mostly made up of interpolated pixels: of 16, one was there."""
BLANK_SHARE = 0.99
"""Share of a subject's pixels that are white, from which on it is a mask or box gone wrong."""
BLANK_DEVIATION = 2.0
"""Standard deviation of 8-bit colours up to which a picture is one colour but for a codec's noise."""
COVERS_FRAME = 0.9
"""Share of a frame beyond which marking the subject leaves nothing out."""
KEPT_SHARE = 0.6
"""Share of a clip's picture below which subjects at its sides are cut off: 16:9 in a square keeps 0.56."""
ENLARGED_CLIP = 1.05
"""Factor from which on a clip counts as enlarged; sizes that were rounded to tokens ask for less."""
SLOWER = 0.99
"""Share of fps below which frames repeat; 23.976 counts as 24."""
STILL_CHANGE = 4.0
"""Largest change of a block's mean, in 8-bit levels, in a clip that stands still; codecs do not keep it exactly, and
at low quality change it by more, so that some still clips pass."""
STILL_BLOCK = 8
"""Side in pixels of such a block, over which noise averages out and a small thing that moves does not."""
CAPTION_WORDS = 3
"""Fewer words cannot both name a subject and say what it does."""
WORD = re.compile(r"[\u3040-\u30ff\u3400-\u9fff\uac00-\ud7af]|\w+")
"""A word; in scripts that put no spaces between words, a character."""


@dataclass(frozen=True)
class ReferenceLook:
    """What tells a row's reference from others.

    Attributes:
        picture: hash of its files' bytes and of what of them is used.
        canvas: hash of the pixels that are encoded.
    """

    picture: str
    canvas: str


@dataclass
class RowLook:
    """What is kept of a row; no pixels.

    Attributes:
        clip: sha256 of its file; None when that cannot be read.
        video: what its file says; None likewise.
        size: what it is brought to; None when it cannot be.
        references: one per reference; None where it cannot be drawn.
        findings: of the row alone, without its place.
    """

    clip: str | None = None
    video: VideoFacts | None = None
    size: Size | None = None
    references: list[ReferenceLook | None] = field(default_factory=list)
    findings: list[Finding] = field(default_factory=list)


class RowInspector(Dataset[RowLook]):
    """`inspect_row` of a row, its index; made to run in a DataLoader's worker processes.

    Args:
        options: the sizes and how references are drawn.
    """

    def __init__(self, options: CacheOptions):
        self.options = options

    def __getitem__(self, row: Row) -> RowLook:
        return inspect_row(row, self.options)


def inspect_row(row: Row, options: CacheOptions) -> RowLook:
    """Decode a row's clip and draw its references."""
    look, digest = RowLook(), cache(file_digest)  # references are often frames of the clip
    _inspect_clip(row, options, look, digest)
    if len(WORD.findall(row.caption)) < CAPTION_WORDS:
        look.findings.append(Finding("short_caption", f"caption: {row.caption!r}"))
    for index in range(len(row.references)):
        try:
            look.references.append(_inspect_reference(row, index, options, look, digest))
        except UserError as error:
            look.references.append(None)
            look.findings.append(Finding("reference", f"references.{index}: {error}"))
    return look


def canvas_of(size: Size | None, options: CacheOptions) -> tuple[int, int]:
    """Height and width of the canvas of references beside a clip of this size; to rounding, see `TOKEN`."""
    size = size or options.sizes[0]
    return reference_size(size.height, size.width, options.reference_scale, TOKEN, options.reference_size)


def _inspect_clip(row: Row, options: CacheOptions, look: RowLook, digest: Digest) -> None:
    try:
        look.clip = digest(row.clip)
        look.video = probe_video(row.clip, segment=row.segment, crop=row.crop)
        fps = options.fps
        look.size, frames = at_its_size(row, options.sizes, fps, lambda size: (size, read_clip(row, size, fps)))
    except UserError as error:
        kind = "too_short" if isinstance(error, TooShortError) else "clip"
        look.findings.append(Finding(kind, str(error)))
    else:
        look.findings += _clip_notes(look.video, look.size, options.fps)
        if _stands_still(frames):
            look.findings.append(Finding("frozen_clip", f"file_name: all {len(frames)} frames are the same"))


def _clip_notes(video: VideoFacts, size: Size, fps: float | None) -> Iterator[Finding]:
    shape = f"file_name: {video.width}x{video.height} pixels"
    target = f"{size.width}x{size.height}"
    if (factor := enlargement(size, video)) >= ENLARGED_CLIP:
        yield Finding("enlarged_clip", f"{shape} are enlarged {factor:.2f} times to cover {target}")
    if (kept := kept_share(size, video)) < KEPT_SHARE:
        yield Finding("cropped_clip", f"{shape} keep {kept:.0%} of the picture in {target}")
    if fps and 0 < video.fps < SLOWER * fps:
        yield Finding("low_fps", f"file_name: {video.fps:.4g} frames a second, data.fps is {fps:g}")


def _stands_still(frames: np.ndarray) -> bool:
    """Whether no part of the picture changes; frames are looked at one by one, so that memory stays as it is."""
    first, *others = (np.asarray(Image.fromarray(frame).reduce(STILL_BLOCK), np.int16) for frame in frames)
    return bool(others) and all(np.abs(other - first).max() <= STILL_CHANGE for other in others)


def _inspect_reference(row: Row, index: int, options: CacheOptions, look: RowLook, digest: Digest) -> ReferenceLook:
    """The reference's hashes; what is odd about it goes to the look's findings.

    Raises:
        UserError: it cannot be drawn.
    """
    height, width = canvas_of(look.size, options)
    reference = row.references[index]
    picture = open_picture(reference)
    background = options.keep_background
    canvas = draw_reference(reference, picture, height=height, width=width, keep_background=background)
    subject = cut_out(picture.image, mask=picture.mask, box=picture.box)
    notes = {
        "small_subject": _blown_up(subject, height, width),
        "blank_reference": _blank(subject),
        "box_outside": _box_outside(picture),
        "whole_picture": _whole_picture(row, picture, subject, options.augment_references),
        "covers_frame": _covers_frame(row, reference, picture, subject, look.video),
        "alpha_mask": f"mask {str(reference.mask)!r}" if picture.mask_by_alpha else None,
    }
    look.findings += [Finding(kind, f"references.{index}: {text}") for kind, text in notes.items() if text]
    facts = reference_facts(reference, digest)
    return ReferenceLook(hash_of(facts), hashlib.sha256(canvas.tobytes()).hexdigest()[:32])


def _blown_up(subject: Image.Image, height: int, width: int) -> str | None:
    factor = min(width / subject.width, height / subject.height)
    size = f"{subject.width}x{subject.height}"
    return f"{size} pixels are enlarged {factor:.1f} times" if factor > ENLARGED_SUBJECT else None


def _blank(subject: Image.Image) -> str | None:
    pixels = np.asarray(subject)
    pixels = pixels[pixels[..., 3] > 0][:, :3]
    if (white := float((pixels.min(-1) >= NEARLY_WHITE).mean())) >= BLANK_SHARE:
        return f"{white:.0%} of the subject is white"
    if pixels.std(0).max() <= BLANK_DEVIATION:
        red, green, blue = pixels.mean(0).round().astype(int).tolist()
        return f"all of the subject is one colour, rgb({red}, {green}, {blue})"
    return None


def _box_outside(picture: Picture) -> str | None:
    if picture.box is None:
        return None
    left, top, right, bottom = picture.box
    width, height = picture.image.size
    inside = left > -1 and top > -1 and right < width + 1 and bottom < height + 1  # annotators round
    return None if inside else f"box {list(picture.box)} leaves the picture of {width}x{height}"


def _whole_picture(row: Row, picture: Picture, subject: Image.Image, augmented: bool) -> str | None:
    marked = picture.mask is not None or picture.box is not None
    on_white = subject.size != picture.image.size  # a white margin was cut off: the subject is cut out already
    if row.pair != "regular" or marked or (on_white and not augmented):
        return None
    return f"all of {subject.width}x{subject.height} pixels is the subject: there is neither mask nor box"


def _covers_frame(
    row: Row, reference: Reference, picture: Picture, subject: Image.Image, video: VideoFacts | None
) -> str | None:
    marked = picture.mask is not None or picture.box is not None
    own = reference.frame is not None and reference.image == row.clip
    shot = row.pair == "regular" and video is not None and picture.image.size == (video.width, video.height)
    share = np.count_nonzero(np.asarray(subject.getchannel("A"))) / (picture.image.width * picture.image.height)
    return f"mask and box mark {share:.0%} of the frame" if marked and (own or shot) and share > COVERS_FRAME else None
