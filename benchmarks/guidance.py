"""What `guidance_refresh` saves and what it changes: passes, time and decibels for k from 1 to 8.

    python benchmarks/guidance.py --base BASE --adapter ADAPTER
    python benchmarks/guidance.py --base BASE --adapter ADAPTER --device cuda --height 480 --width 832 --frames 81

BASE and ADAPTER are folders, any that `load_adapter` takes together. Prompts and references are drawn as for the
demo's world, on whose base the decibels mean something.

Times are of whole calls without decoding: text, references and all steps; a round makes every video there and back, in
another order each, beside the stock pipeline's of as many steps. Ratios are medians over rounds. Passes count samples,
so that two of a batch are two. Decibels compare a video's frames with those of k = 1: the mean over videos of their
peak signal-to-noise ratio.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from functools import partial
from pathlib import Path
from typing import Annotated, Any

import _models as models
import _setting as options
import torch
import typer
from _measure import Times, time_in_turn
from _report import Bar, machine, print_bars, print_machine, print_table, start, write_json
from diffusers import DiffusionPipeline
from torch import Tensor

import refalign_adapter as ra
from refalign_adapter.errors import UserError
from refalign_adapter.world.scenes import Clip, draw_clip

WORLD = 5
"""Seed of the clips whose captions and references are taken."""
FEW = (8, 4)
"""Steps of few-step schedules."""
NAMES = ("plain", "interval", "batch", "few")
AIM = 3
"""The k that is to make a video with references no slower than one of the stock pipeline."""
COLUMNS = ("", "passes", "/ stock", "s", "/ stock", "dB")


@dataclass(frozen=True)
class Schedule:
    """One way of running the steps.

    Attributes:
        name: in tables.
        steps: of denoising.
        arguments: of the reference pipeline's call.
    """

    name: str
    steps: int
    arguments: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Videos:
    """What is generated.

    Attributes:
        stock: the base's pipeline, with a transformer of its own that shares the weights.
        pipe: the reference pipeline.
        clips: whose captions and references are taken; the first is timed.
        size: num_frames, height and width.
        guidance_scale, image_guidance_scale: of both pipelines.
    """

    stock: Any
    pipe: Any
    clips: list[Clip]
    size: dict[str, int]
    guidance_scale: float
    image_guidance_scale: float

    def plain(self, steps: int) -> None:
        """The stock pipeline's video."""
        length = self.pipe.branch.config.max_sequence_length
        self._make(self.stock, 0, steps, "latent", max_sequence_length=length)

    def ours(self, schedule: Schedule, refresh: int, number: int = 0, output_type: str = "latent") -> Tensor:
        """Latents, or frames in [0, 1], of video `number`."""
        given = {"reference_images": self.clips[number].references, "guidance_refresh": refresh}
        scale = self.image_guidance_scale
        arguments = {"image_guidance_scale": scale, **given, **schedule.arguments}
        return self._make(self.pipe, number, schedule.steps, output_type, **arguments)

    def _make(self, pipe: Any, number: int, steps: int, output_type: str, **arguments: Any) -> Tensor:
        return pipe(
            self.clips[number].caption,
            negative_prompt="",
            num_inference_steps=steps,
            guidance_scale=self.guidance_scale,
            generator=torch.Generator().manual_seed(number),
            output_type=output_type,
            **self.size,
            **arguments,
        ).frames


def open_videos(base: Path, adapter: Path, device: str, clips: list[Clip], **values: Any) -> Videos:
    """Load the pipelines; values are the other fields of `Videos`."""
    loaded: Any = DiffusionPipeline.from_pretrained(base).to(device)
    parts = loaded.components | {"transformer": models.sharing_weights(loaded.transformer)}
    stock = type(loaded)(**parts)
    pipe = ra.load_adapter(loaded, adapter)
    for each in (stock, pipe):
        each.set_progress_bar_config(disable=True)
    return Videos(stock, pipe, clips, **values)


def make_schedules(steps: int, names: list[str]) -> list[Schedule]:
    """Those that are named, of `NAMES`."""
    if unknown := sorted(set(names) - set(NAMES)):
        raise UserError(f"schedule must be one of {', '.join(NAMES)}, got {unknown[0]!r}")
    made = {
        "plain": [Schedule(f"{steps} steps", steps)],
        "interval": [Schedule(f"{steps} steps, guided in the first half", steps, {"guidance_interval": (0.0, 0.5)})],
        "batch": [Schedule(f"{steps} steps, batch_guidance", steps, {"batch_guidance": True})],
        "few": [Schedule(f"{few} steps", few) for few in FEW],
    }
    return [schedule for name in names for schedule in made[name]]


def count_passes(transformer: Any, work: Callable[[], Any]) -> int:
    """Samples of all calls on a video that `work` makes; the references' own pass, of single frames, is left out."""
    seen: list[int] = []

    def look(_: Any, arguments: tuple[Tensor, ...]) -> None:
        batch, _, frames, *_ = arguments[0].shape
        seen.append(batch if frames > 1 else 0)

    handle = transformer.patch_embedding.register_forward_pre_hook(look)
    try:
        work()
    finally:
        handle.remove()
    return sum(seen)


def decibels(frames: Tensor, exact: Tensor) -> float:
    """Peak signal-to-noise ratio of frames in [0, 1]; infinite where they are equal."""
    error = (frames.float() - exact.float()).pow(2).mean().item()
    return -10 * math.log10(error) if error else math.inf


@dataclass
class Result:
    """All that was measured; a video's name is its schedule's and its k.

    Attributes:
        times: seconds of every video, and of the stock pipeline's by number of steps.
        passes: likewise.
        decibels: of every video against k = 1.
    """

    times: Times
    passes: dict[str, int]
    decibels: dict[str, float]

    def bars(self, steps: int) -> list[Bar]:
        """What the aim has to reach, where it was run."""
        name, stock = f"{steps} steps, k = {AIM}", f"stock, {steps} steps"
        if name not in self.times:
            return []
        passes = self.passes[name] / self.passes[stock]
        return [
            Bar(f"{name}: passes / stock video", passes, 1.0),
            Bar(f"{name}: time / stock video", self.times.ratio(name, stock), 1.0),
        ]


@torch.no_grad()
def measure(videos: Videos, schedules: list[Schedule], most: int, rounds: int, device: str) -> Result:
    """Time all videos in turn, count their passes, compare their frames."""
    works: dict[str, Callable[[], Any]] = {
        f"stock, {steps} steps": partial(videos.plain, steps) for steps in {item.steps for item in schedules}
    }
    passes = {name: count_passes(videos.stock.transformer, work) for name, work in works.items()}
    quality = {}
    for schedule in schedules:
        exact = []
        for refresh in range(1, most + 1):
            name, frames = f"{schedule.name}, k = {refresh}", []

            def make_all(schedule: Schedule = schedule, refresh: int = refresh, frames: list[Tensor] = frames) -> None:
                frames += [videos.ours(schedule, refresh, number, "pt") for number in range(len(videos.clips))]

            passes[name] = count_passes(videos.pipe.transformer, make_all) // len(videos.clips)
            exact = exact or frames
            quality[name] = statistics.mean(map(decibels, frames, exact))
            works[name] = partial(videos.ours, schedule, refresh)
    return Result(time_in_turn(works, rounds, device), passes, quality)


def print_result(result: Result, schedules: list[Schedule], most: int) -> None:
    """A table for each schedule."""
    for schedule in schedules:
        stock = f"stock, {schedule.steps} steps"
        rows = [["stock", str(result.passes[stock]), "1", f"{result.times.median(stock):.2f}", "1", ""]]
        for refresh in range(1, most + 1):
            name = f"{schedule.name}, k = {refresh}"
            exact = math.isinf(result.decibels[name])
            rows.append(
                [
                    f"k = {refresh}",
                    str(result.passes[name]),
                    f"{result.passes[name] / result.passes[stock]:.2f}",
                    f"{result.times.median(name):.2f}",
                    f"{result.times.ratio(name, stock):.2f}",
                    "equal" if exact else f"{result.decibels[name]:.1f}",
                ]
            )
        print_table(schedule.name, COLUMNS, rows)


def main(
    base: Annotated[Path, typer.Option(help="Diffusers folder of the text-to-video model.")],
    adapter: Annotated[Path, typer.Option(help="Adapter folder.")],
    frames: Annotated[int, typer.Option(help="Video frames.")] = 9,
    height: Annotated[int, typer.Option(help="Video height in pixels.")] = 64,
    width: Annotated[int, typer.Option(help="Video width in pixels.")] = 64,
    references: Annotated[int, typer.Option(min=1, max=3, help="References of a video.")] = 3,
    steps: Annotated[int, typer.Option(min=1, help="Denoising steps.")] = 50,
    most: Annotated[int, typer.Option(min=1, help="The largest k.")] = 8,
    guidance_scale: Annotated[float, typer.Option(help="How strongly the prompt pulls.")] = 2.0,
    image_guidance_scale: Annotated[float, typer.Option(help="How strongly the references pull.")] = 3.0,
    videos: Annotated[int, typer.Option(min=1, help="Videos that are compared.")] = 6,
    schedule: Annotated[
        list[str] | None, typer.Option(help="plain, interval, batch or few; repeat for more; all if not given.")
    ] = None,
    rounds: options.RoundsOption = 3,
    device: options.DeviceOption = "cpu",
    threads: options.ThreadsOption = None,
    json: options.JsonOption = None,
) -> None:
    """Make videos with every k, beside the stock pipeline's."""
    if threads is not None:
        torch.set_num_threads(threads)
    size: dict[str, Any] = {"num_frames": frames, "height": height, "width": width}
    clips = [draw_clip(WORLD, number, split="eval", subjects=references, **size) for number in range(videos)]
    scales = {"guidance_scale": guidance_scale, "image_guidance_scale": image_guidance_scale}
    facts = machine(device)
    print_machine(facts)
    print(
        f"{frames} frames of {height} x {width}, {references} references, {scales}; {videos} videos, {rounds} rounds"
    )
    schedules = make_schedules(steps, schedule or list(NAMES))
    opened = open_videos(base, adapter, device, clips, size=size, **scales)
    result = measure(opened, schedules, most, rounds, device)
    print_result(result, schedules, most)
    print_bars(result.bars(steps))
    if json is not None:
        bars = [bar.to_dict() for bar in result.bars(steps)]
        write_json(json, {"machine": facts, "size": size, **scales, **asdict(result), "bars": bars})


if __name__ == "__main__":
    start(main)
