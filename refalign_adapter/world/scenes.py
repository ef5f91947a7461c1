"""Clips of the world: one to three subjects, each with a motion, over a background, and the caption that says so.

The caption names the kinds, the motions and the background, never looks. Every clip comes from its own random stream,
made of the seed, the split and the clip's number, so a clip does not depend on how many others are drawn. What was
added to the world later draws from streams of its own, so that the clips of before stay as they were.
"""

from dataclasses import dataclass

import numpy as np
from PIL import Image

from .backgrounds import BACKGROUNDS, draw_background
from .motions import Pose, draw_paths, motions_of, place, same_path
from .portraits import SUPERSAMPLING, Portrait, cut_reference, draw_reference, sprite_size
from .subjects import KINDS, SPLITS, Light, Subject, draw_subject, random_subject

PAIRS = ("cross", "regular")
LATER = 17
"""Begins the streams of what was added later."""


@dataclass(frozen=True)
class Clip:
    """One drawn clip with its references.

    Attributes:
        frames: uint8 (num_frames, height, width, 3).
        caption: what happens, where, and the kinds of the subjects.
        subjects: one per reference, in the caption's order.
        references: RGB images (height, width), see `draw_clip`.
        masks: L images of the references, 255 on the subject and 0 elsewhere.
        frame_masks: bool (subjects, num_frames, height, width), where a subject is seen; no pixel is two subjects'.
        motions: of the subjects, names as in the caption.
        place: the background's name.
        poses: of each subject, one a frame.
        reference_poses: of the subjects in their references.
    """

    frames: np.ndarray
    caption: str
    subjects: list[Subject]
    references: list[Image.Image]
    masks: list[Image.Image]
    frame_masks: np.ndarray
    motions: list[str]
    place: str
    poses: list[list[Pose]]
    reference_poses: list[Pose]


def draw_clip(
    seed: int,
    number: int,
    *,
    split: str,
    height: int,
    width: int,
    num_frames: int,
    subjects: int | None = None,
    same_kind: bool = False,
    pairs: str = "cross",
    reference_backgrounds: bool = False,
) -> Clip:
    """Draw clip `number` of the world with this seed.

    Args:
        seed, number: which clip; the same pair gives the same clip.
        split: `train` or `eval`: which subjects may occur.
        height, width: of frames and references, in pixels.
        num_frames: frames in the clip.
        subjects: how many subjects, 1 to 3; None draws the number.
        same_kind: whether all subjects are of one kind, at least two if the number is drawn; the caption then tells
            them apart by what they do, and no two go the same way.
        pairs: `cross`: the references show another pose, scale and light than the frames; `regular`: they are cut out
            of a frame.
        reference_backgrounds: whether references stand before a background (`regular`: the frame's) or on white.
    """
    generator = np.random.default_rng([seed, SPLITS.index(split), number])
    count = int(generator.choice(3, p=(0.4, 0.42, 0.18))) + 1
    cast, motions = _cast(generator, split, subjects or (max(2, count) if same_kind else count), same_kind)
    background_name = str(generator.choice(list(BACKGROUNDS)))
    large = height * SUPERSAMPLING, width * SUPERSAMPLING
    background = draw_background(background_name, generator, *large)
    sprites = [draw_subject(subject, Light.random(generator), sprite_size(height, width)) for subject in cast]
    poses = draw_paths(generator, motions, num_frames)
    drawn = [_frame(background, sprites, [path[step] for path in poses]) for step in range(num_frames)]
    frames, frame_masks = np.stack([frame for frame, _ in drawn]), np.stack([seen for _, seen in drawn], axis=1)
    later = np.random.default_rng([seed, SPLITS.index(split), number, LATER])
    portraits = []
    for subject, path, seen in zip(cast, poses, frame_masks, strict=True):
        if pairs == "regular":
            portraits.append(cut_reference(frames, seen, path, later, background=reference_backgrounds))
        else:
            behind = _any_background(later, *large) if reference_backgrounds else None
            portraits.append(draw_reference(subject, generator, height, width, behind))
    return _clip(frames, frame_masks, cast, motions, background_name, poses, portraits)


def describe(kinds: list[str], motions: list[str], place: str) -> str:
    """The caption: `a ball rolls to the right while a star bounces and a fish spins, in a meadow`."""
    parts = [f"a {kind} {motion}" for kind, motion in zip(kinds, motions, strict=True)]
    rest = " and ".join(parts[1:])
    return f"{parts[0]}{f' while {rest}' if rest else ''}, {place}"


def _clip(
    frames: np.ndarray,
    frame_masks: np.ndarray,
    cast: list[Subject],
    motions: list[str],
    place: str,
    poses: list[list[Pose]],
    portraits: list[Portrait],
) -> Clip:
    return Clip(
        frames,
        describe([subject.kind for subject in cast], motions, place),
        cast,
        [portrait.image for portrait in portraits],
        [portrait.mask for portrait in portraits],
        frame_masks,
        motions,
        place,
        poses,
        [portrait.pose for portrait in portraits],
    )


def _cast(generator: np.random.Generator, split: str, count: int, same_kind: bool) -> tuple[list[Subject], list[str]]:
    """Subjects and their motions: of different kinds, so that a caption says which is which, or of one kind."""
    if not same_kind:
        kinds = generator.choice(list(KINDS), size=count, replace=False)
        cast = [random_subject(generator, split, str(kind)) for kind in kinds]
        return cast, [str(generator.choice(motions_of(subject.kind))) for subject in cast]
    kind = str(generator.choice(list(KINDS)))
    cast = []
    while len(cast) < count:
        subject = random_subject(generator, split, kind)
        cast += [subject] if subject not in cast else []
    motions: dict[str, str] = {}
    for motion in generator.permutation(motions_of(kind)):
        motions.setdefault(same_path(str(motion)), str(motion))
    return cast, list(motions.values())[:count]


def _any_background(generator: np.random.Generator, height: int, width: int) -> Image.Image:
    return draw_background(str(generator.choice(list(BACKGROUNDS))), generator, height, width)


def _frame(background: Image.Image, sprites: list[Image.Image], poses: list[Pose]) -> tuple[np.ndarray, np.ndarray]:
    """A frame, and where each sprite is seen in it: bool (sprites, height, width)."""
    canvas, owner = background.copy(), np.zeros(background.size[::-1], dtype=np.uint8)
    for number, (sprite, pose) in enumerate(zip(sprites, poses, strict=True), start=1):
        layer = place(sprite, pose, canvas.size)
        alpha = layer.getchannel("A")
        canvas.paste(layer, mask=alpha)
        owner[np.asarray(alpha) > 127] = number
    owned = owner == np.arange(1, len(sprites) + 1)[:, None, None]
    shares = [np.asarray(Image.fromarray(seen.astype(np.uint8) * 255).reduce(SUPERSAMPLING)) for seen in owned]
    return np.asarray(canvas.reduce(SUPERSAMPLING)), np.stack(shares) > 128  # of a pixel in halves nobody is the owner
