"""What the judge reads right: `python tools/world/judge_report.py` measures the shipped judge and rewrites its report.

It reads drawn clips of held-out looks as it would read generated ones: plain, and after the shipped base's VAE, which
tells what a perfect model could still show, a ceiling. Accuracies of looks are over the frames where a subject was
found; their intervals take a subject's frames, which are much alike, together.

Shape letters: F frames, L looks (5), V values of all looks (31).
"""

import argparse
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import torch
from diffusers import AutoencoderKLWan
from judge_data import NUM_FRAMES, SIZE, look_indices, through_vae
from PIL import Image

from refalign_adapter.json_files import write_json
from refalign_adapter.world import base
from refalign_adapter.world.judge import LOOK_NAMES, LOOK_SIZES, SIDE, load_network
from refalign_adapter.world.reading import COUNTED_FROM, Judge, Reading
from refalign_adapter.world.scenes import Clip, draw_clip
from refalign_adapter.world.subjects import Subject, random_subject
from refalign_adapter.world.tracks import SMALLEST

CLIPS, SEED = 400, 7093
GALLERY = 16
GROUPS = ("1 subject", "2 subjects", "3 subjects", "same kind")
Shown = Callable[[np.ndarray], np.ndarray]
"""What is judged of frames uint8 (F, H, W, 3): themselves, or what a VAE makes of them."""


@dataclass(frozen=True)
class Case:
    """One subject of one clip or one reference: what was read of it, in the frames that show it.

    Attributes:
        subject: who it is.
        group: one of `GROUPS`.
        sizes: (F,) of the subject's own square, as shares of the frame.
        found: bool (F,).
        overlaps: (F,), intersection over union of the read and the drawn mask.
        right: bool (F, L), False where not found.
        probabilities: (V,) over all frames of the clip.
    """

    subject: Subject
    group: str
    sizes: np.ndarray
    found: np.ndarray
    overlaps: np.ndarray
    right: np.ndarray
    probabilities: np.ndarray


def judge_report(judge: Judge, vae: Any, *, clips: int = CLIPS, seed: int = SEED) -> dict[str, Any]:
    """Measure a judge on drawn held-out clips, a quarter of them of each of `GROUPS`, and on their references.

    Returns:
        `counted`, the looks that are right in `COUNTED_FROM` of the plain frames and more, and the `report`.
    """
    drawn = [draw_held_out(seed, number) for number in range(clips)]
    views: dict[str, Shown] = {"plain": lambda frames: frames, "vae": after_vae(vae)}
    cases = {name: [case for clip in drawn for case in clip_cases(judge, clip, view)] for name, view in views.items()}
    counted = [look for look in LOOK_NAMES if accuracy(cases["plain"], look)[0] >= COUNTED_FROM]
    counting = replace(judge, counted=tuple(counted))
    report: dict[str, Any] = {"clips": clips, "seed": seed}
    for name, view in views.items():
        report[name] = {"all": summary(counting, cases[name]), **_parts(counting, cases[name])}
        for number, ground in enumerate(("white", "background")):
            references = [case for clip in drawn[number::2] for case in reference_cases(judge, clip, view)]
            report[name][f"references on {ground}"] = summary(counting, references)
    return {"counted": counted, "report": report}


def draw_held_out(seed: int, number: int) -> Clip:
    """A clip of one of `GROUPS` in turn; every second one's references stand before a background."""
    group = number // 2 % len(GROUPS)
    return draw_clip(
        seed,
        number,
        split="eval",
        height=SIZE,
        width=SIZE,
        num_frames=NUM_FRAMES,
        subjects=group + 1 if group < 3 else 2 + number // 8 % 2,
        same_kind=group == 3,
        reference_backgrounds=bool(number % 2),
    )


def after_vae(vae: Any) -> Shown:
    """What a VAE makes of frames."""
    return lambda frames: through_vae(vae, torch.tensor(frames[None]))[0].numpy()


def clip_cases(judge: Judge, clip: Clip, view: Shown) -> list[Case]:
    """Read a clip. Subjects of one kind are taken from left to right, as the judge gives them."""
    kinds = [subject.kind for subject in clip.subjects]
    order = list(range(len(kinds)))
    if alike := len(set(kinds)) < len(kinds):
        order.sort(key=lambda place: np.mean([pose.x for pose in clip.poses[place]]))
    reading = judge.read(view(clip.frames), kinds)
    group = GROUPS[3] if alike else GROUPS[len(kinds) - 1]
    sizes = [np.array([pose.size for pose in path]) for path in clip.poses]
    return [
        _case(reading, read, clip.subjects[place], group, sizes[place], clip.frame_masks[place])
        for read, place in enumerate(order)
    ]


def reference_cases(judge: Judge, clip: Clip, view: Shown) -> list[Case]:
    """Read a clip's references, without their masks."""
    cases = []
    for subject, image, mask, pose in zip(
        clip.subjects, clip.references, clip.masks, clip.reference_poses, strict=True
    ):
        shown = Image.fromarray(view(np.asarray(image)[None])[0])
        reading = judge.read_reference(shown, None, subject.kind)
        cases.append(_case(reading, 0, subject, GROUPS[0], np.array([pose.size]), np.asarray(mask)[None] > 0))
    return cases


def _case(reading: Reading, read: int, subject: Subject, group: str, sizes: np.ndarray, masks: np.ndarray) -> Case:
    shown = masks.sum((1, 2)) >= SMALLEST * SIDE**2
    mine = reading.masks[read]
    union = (mine | masks).sum((1, 2)).clip(1)
    right = reading.looks[read] == look_indices(subject)
    return Case(
        subject,
        group,
        sizes[shown],
        reading.found[read][shown],
        ((mine & masks).sum((1, 2)) / union)[shown],
        right[shown],
        reading.over_frames()[read],
    )


def accuracy(cases: Sequence[Case], look: str, low: float = 0.0, high: float = np.inf) -> list[float]:
    """Share of found frames in which a look is right, and half of its 95 % interval, over subjects.

    Args:
        cases: of which subjects.
        look: one of `LOOK_NAMES`.
        low, high: sizes to take, from and below.
    """
    taken = [case.found & (case.sizes >= low) & (case.sizes < high) for case in cases]
    counts = np.array([rows.sum() for rows in taken])
    place = LOOK_NAMES.index(look)
    rights = np.array([case.right[rows, place].sum() for case, rows in zip(cases, taken, strict=True)])
    total = max(counts.sum(), 1)
    share = rights.sum() / total
    return [
        round(float(value), 4) for value in (share, 1.96 * np.sqrt(np.square(rights - share * counts).sum()) / total)
    ]


def summary(judge: Judge, cases: Sequence[Case]) -> dict[str, Any]:
    """Found, masks, looks and retrieval over some cases."""
    found, overlaps = (np.concatenate([getattr(case, name) for case in cases]) for name in ("found", "overlaps"))
    report: dict[str, Any] = {
        "subjects": len(cases),
        "frames": len(found),
        "found": found.mean(),
        "found in place": (overlaps > 0.5).mean(),
        "mean overlap": overlaps.mean(),
    }
    report |= {look: accuracy(cases, look) for look in LOOK_NAMES}
    report["over all frames"] = {look: _pooled(cases, look) for look in LOOK_NAMES}
    report[f"first among {GALLERY}"] = retrieval(judge, cases) if judge.counted else None
    return {name: round(float(value), 4) if isinstance(value, float) else value for name, value in report.items()}


def retrieval(judge: Judge, cases: Sequence[Case]) -> float:
    """Share of subjects whose own looks are likelier than those of 15 others of their kind; ties share the place."""
    generator = np.random.default_rng(SEED)
    shares = []
    for case in cases:
        others: set[Subject] = set()
        while len(others) < GALLERY - 1:
            others |= {random_subject(generator, "eval", case.subject.kind)} - {case.subject}
        scores = judge.likeness(case.probabilities[None], [case.subject, *sorted(others, key=str)])[0]
        best = scores >= scores.max() - 1e-12
        shares.append(best[0] / best.sum())
    return float(np.mean(shares))


def _pooled(cases: Sequence[Case], look: str) -> float:
    """Share of subjects whose look is right over all frames together."""
    place = LOOK_NAMES.index(look)
    edges = np.cumsum((0, *LOOK_SIZES))
    read = [case.probabilities[edges[place] : edges[place + 1]].argmax() for case in cases]
    truth = [look_indices(case.subject)[place] for case in cases]
    return round(float(np.mean(np.array(read) == truth)), 4)


def _parts(judge: Judge, cases: Sequence[Case]) -> dict[str, Any]:
    """By number of subjects, and by size: the smallest, the middle and the largest third of what the frames show."""
    grouped = {group: [case for case in cases if case.group == group] for group in GROUPS}
    report: dict[str, Any] = {group: summary(judge, members) for group, members in grouped.items() if members}
    bounds = [0.0, *np.quantile(np.concatenate([case.sizes for case in cases]), (1 / 3, 2 / 3)), 1.0]
    for low, high in zip(bounds, bounds[1:], strict=False):
        name = f"size {64 * low:.0f} to {64 * high:.0f} of 64 pixels"
        report[name] = {look: accuracy(cases, look, low, high) for look in LOOK_NAMES}
    return report


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--assets", default=str(base.ASSETS), help="the judge's folder; the shipped one if left out")
    parser.add_argument("--vae", default=None, help="a VAE's folder; the shipped base's if left out")
    parser.add_argument("--clips", type=int, default=CLIPS)
    arguments = parser.parse_args()
    network, about = load_network(arguments.assets)
    vae = load_vae(arguments.vae)
    about |= judge_report(Judge(network, ()), vae, clips=arguments.clips)
    write_json(Path(arguments.assets) / "judge.json", about)


def load_vae(folder: str | Path | None) -> AutoencoderKLWan:
    """A VAE's folder, or the shipped base's VAE."""
    with TemporaryDirectory() as temporary:
        path = folder or base.unpack_base(Path(temporary) / "base") / "vae"
        vae = AutoencoderKLWan.from_pretrained(path).eval().requires_grad_(False)
    for module in vae.modules():
        if isinstance(module, torch.nn.Conv3d):  # a third faster on the CPU
            module.weight.data = module.weight.data.to(memory_format=torch.channels_last_3d)
    return vae


if __name__ == "__main__":
    main()
