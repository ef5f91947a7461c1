"""The settings that benchmarks share: a model of any size, its video, its references, and what it runs on."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import torch
import typer

from refalign_adapter.errors import ConfigError

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}
DEVICES = ("cpu", "cuda")

PresetOption = Annotated[
    str | None, typer.Option(help="small, 1.3b, 14b, 5b of Wan 2.2, or ltx; small on the CPU, else 1.3b.")
]
DimOption = Annotated[int | None, typer.Option(help="Width of a token.")]
HeadsOption = Annotated[int | None, typer.Option(help="Attention heads.")]
LayersOption = Annotated[int | None, typer.Option(help="Transformer blocks.")]
FfnOption = Annotated[int | None, typer.Option(help="Width of the feed-forward layers.")]
FramesOption = Annotated[int | None, typer.Option(help="Video frames, 4k + 1 (ltx: 8k + 1).")]
HeightOption = Annotated[int | None, typer.Option(help="Video height in pixels, a multiple of 16 (5b, ltx: 32).")]
WidthOption = Annotated[int | None, typer.Option(help="Video width in pixels, a multiple of 16 (5b, ltx: 32).")]
ReferencesOption = Annotated[int, typer.Option(min=1, help="References of a video.")]
ScaleOption = Annotated[
    float, typer.Option(help="Isolated: canvas of a reference as a share of the video's, at most 1.")
]
DroppedOption = Annotated[float, typer.Option(help="Isolated: share of reference tokens left out as white padding.")]
BatchOption = Annotated[int, typer.Option(min=1, help="Videos at a time.")]
RankOption = Annotated[int, typer.Option(min=1, help="Of the LoRA.")]
DtypeOption = Annotated[str | None, typer.Option(help="float32 or bfloat16; float32 on the CPU, else bfloat16.")]
DeviceOption = Annotated[str, typer.Option(help="cpu or cuda.")]
BackendOption = Annotated[str | None, typer.Option(help="diffusers' attention backend, such as native or xformers.")]
RoundsOption = Annotated[int, typer.Option(min=1, help="Paired timings.")]
ThreadsOption = Annotated[int | None, typer.Option(min=1, help="CPU threads.")]
JsonOption = Annotated[Path | None, typer.Option(help="File for all figures.")]


@dataclass(frozen=True)
class Size:
    """Of a model and of the latents it denoises.

    Attributes:
        dim, heads, layers, ffn: width of a token, attention heads, blocks, width of the feed-forward layers.
        frames, height, width: of the latents.
        channels, pixels, stride: of the VAE: latent channels, pixel rows and columns per latent one, and video frames
            per latent one after the first.
        patch: latent rows and columns of a token.
        family: its key.
        text_tokens: of a prompt.
        timestep_per_token: whether the pipeline gives every token a timestep of its own.
    """

    dim: int
    heads: int
    layers: int
    ffn: int
    frames: int
    height: int
    width: int
    channels: int = 16
    pixels: int = 8
    stride: int = 4
    patch: int = 2
    family: str = "wan"
    text_tokens: int = 512
    timestep_per_token: bool = False

    @property
    def tokens(self) -> int:
        """Of a video."""
        return self.frames * (self.height // self.patch) * (self.width // self.patch)

    def __str__(self) -> str:
        model = f"{self.family}: dim {self.dim}, {self.heads} heads, {self.layers} blocks, ffn {self.ffn}"
        return f"{model}; latents {self.frames}x{self.height}x{self.width} = {self.tokens:,} tokens"


PRESETS = {
    "small": Size(dim=384, heads=6, layers=4, ffn=1536, frames=21, height=30, width=52),
    "1.3b": Size(dim=1536, heads=12, layers=30, ffn=8960, frames=21, height=60, width=104),
    "14b": Size(dim=5120, heads=40, layers=40, ffn=13824, frames=21, height=60, width=104),
    "5b": Size(
        dim=3072,
        heads=24,
        layers=30,
        ffn=14336,
        frames=31,
        height=44,
        width=80,
        channels=48,
        pixels=16,
        timestep_per_token=True,
    ),
    "ltx": Size(
        dim=2048,
        heads=32,
        layers=28,
        ffn=8192,
        frames=21,
        height=16,
        width=22,
        channels=128,
        pixels=32,
        stride=8,
        patch=1,
        family="ltx",
        text_tokens=128,
    ),
}
"""Wan 2.1's own sizes at 81 frames of 480 x 832 pixels, one that a CPU can run, at 240 x 416, Wan 2.2 TI2V-5B at 121
frames of 704 x 1280, and LTX-Video 0.9 at 161 frames of 512 x 704."""


@dataclass(frozen=True)
class Setting:
    """What is measured, and on what.

    Attributes:
        size: of model and video.
        references: of each video.
        scale: isolated attention: height and width of a reference's canvas as a share of the video's.
        dropped: isolated attention: share of reference tokens left out, in [0, 1).
        batch: videos at a time.
        rank: of the LoRA.
        device, dtype: cpu or cuda, and the type of the base's weights.
        backend: diffusers' attention backend; None: its default.
        rounds: paired timings.
        checkpointing: whether blocks run again in backward instead of keeping their activations (training).
        nf4: whether the base's blocks are quantised to four bits (training).
    """

    size: Size
    references: int
    scale: float
    dropped: float
    batch: int
    rank: int
    device: str
    dtype: torch.dtype
    backend: str | None
    rounds: int
    checkpointing: bool = False
    nf4: bool = False

    def __str__(self) -> str:
        references = (
            f"{self.references} references at scale {self.scale:g}, {self.dropped:.0%} of their tokens dropped"
        )
        backend = f"attention backend {self.backend or 'native'}"
        dtype = f"{str(self.dtype).removeprefix('torch.')}{', blocks in NF4' if self.nf4 else ''}"
        return (
            f"{self.size}\nbatch {self.batch}, {references}; LoRA rank {self.rank}\n"
            f"{self.device}, {dtype}, {backend}; {self.rounds} rounds"
        )


def choose_size(
    preset: str | None,
    device: str,
    *,
    model: Mapping[str, int | None],
    video: Mapping[str, int | None],
) -> Size:
    """A preset with changes; None leaves a value as it is.

    Args:
        preset: a key of `PRESETS`; None: the device's own.
        device: cpu or cuda.
        model: the model's fields of `Size`.
        video: frames, height, width in frames and pixels.

    Raises:
        ConfigError: lists every problem at once.
    """
    preset = preset or ("small" if device == "cpu" else "1.3b")
    if preset not in PRESETS:
        raise ConfigError([f"preset must be one of {sorted(PRESETS)}, got {preset!r}"])
    model_values = {name: value for name, value in model.items() if value is not None}
    video_values = {name: value for name, value in video.items() if value is not None}
    given = {**model_values, **video_values}
    problems = [f"{name} must be at least 1, got {value}" for name, value in given.items() if value < 1]
    frames, of = video_values.pop("frames", None), PRESETS[preset]
    if frames is not None and frames % of.stride != 1:
        problems.append(f"frames must be {of.stride}k + 1, got {frames}")
    multiple = of.pixels * of.patch
    problems += [
        f"{name} must be a multiple of {multiple}, got {value}"
        for name, value in video_values.items()
        if value % multiple
    ]
    latents = {name: value // of.pixels for name, value in video_values.items()}
    if frames is not None:
        latents["frames"] = (frames - 1) // of.stride + 1
    size = dataclasses.replace(of, **model_values, **latents)
    if not problems and size.dim % (2 * size.heads):
        problems.append(f"dim must be an even multiple of heads, got {size.dim} and {size.heads}")
    if size.family == "ltx" and size.ffn != 4 * size.dim:
        problems.append(f"ffn must be four times dim in LTX-Video, {4 * size.dim}, got {size.ffn}")
    if problems:
        raise ConfigError(problems)
    return size


def make_setting(
    size: Size, *, dtype: str | None, device: str, scale: float, dropped: float, **values: Any
) -> Setting:
    """Check what options say.

    Args:
        size: see `choose_size`.
        dtype: a key of `DTYPES`; None: the device's own.
        device: cpu or cuda.
        scale, dropped, values: the other fields of `Setting`.

    Raises:
        ConfigError: lists every problem at once.
    """
    name = dtype or ("float32" if device == "cpu" else "bfloat16")
    problems = [] if name in DTYPES else [f"dtype must be one of {sorted(DTYPES)}, got {name!r}"]
    if device not in DEVICES:
        problems.append(f"device must be one of {list(DEVICES)}, got {device!r}")
    elif device == "cuda" and not torch.cuda.is_available():
        problems.append("device: torch finds no GPU, got 'cuda'; use cpu")
    problems += [] if 0 < scale <= 1 else [f"reference-scale must be in (0, 1], got {scale}"]
    problems += [] if 0 <= dropped < 1 else [f"dropped must be in [0, 1), got {dropped}"]
    if problems:
        raise ConfigError(problems)
    return Setting(size, dtype=DTYPES[name], device=device, scale=scale, dropped=dropped, **values)
