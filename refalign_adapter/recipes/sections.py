"""The other sections of a recipe: alignment, timesteps, dropped conditions, videos while training, data."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from pydantic import Field

from .field_types import (
    Count,
    Few,
    Frames,
    FromZero,
    NotNegative,
    Pixels,
    Positive,
    Rate,
    Section,
    Seed,
    Share,
    Sources,
    Text,
    Workers,
)


class AlignmentSection(Section):
    """The alignment loss and the schedule of its weight."""

    weight: NotNegative = Field(default=1.0, description="η, the alignment loss's weight; 0 = no alignment")
    warmup_steps: FromZero = Field(default=0, description="steps over which the weight rises from 0")
    decay: Literal["constant", "cosine"] = Field(
        default="constant", description="what the weight does after its warm-up"
    )
    decay_steps: Count | None = Field(
        default=None, description="length of the cosine decay; null = to the end of the run"
    )
    final_weight: NotNegative = Field(default=0.0, description="weight at the end of the cosine decay")
    cutoff_step: FromZero | None = Field(default=None, description="step from which the weight is 0; null = never")
    negative_weight: NotNegative = Field(default=1.0, description="λ, weight of the negative (other subjects) term")
    positive_margin: float = Field(default=0.0, ge=0, le=2, description="cosine distance that is close enough")
    negative_margin: float = Field(
        default=1.0, ge=0, le=2, description="δ, cosine distance to keep from other subjects"
    )
    timestep_gate: NotNegative | None = Field(
        default=None, description="power p of the factor (timestep / 1000)^p on a sample's alignment; null = none"
    )


class FlowSection(Section):
    """How timesteps are drawn."""

    timestep_sampling: Literal["uniform", "logit_normal"] = Field(
        default="uniform", description="distribution of timesteps"
    )
    logit_mean: float = Field(default=0.0, ge=-100, le=100, allow_inf_nan=False, description="mean of logit_normal")
    logit_std: Positive = Field(default=1.0, description="standard deviation of logit_normal")
    shift: Positive | None = Field(default=None, description="timestep shift; null = the one of the base's scheduler")


class DropoutSection(Section):
    """Conditions left out at random, so that guidance works at inference; the shares are exclusive."""

    text: Share | None = Field(default=None, description="share of samples without their text; null = 0.1")
    references: Share | None = Field(
        default=None,
        description="share of samples without their references; null = 0.1, or 0 with adapter.lora_scope=reference "
        "and adapter.null_reference=absent",
    )
    both: Share | None = Field(default=None, description="share of samples without either; null = as for references")


@dataclass(frozen=True)
class DropoutShares:
    """Shares of samples, in [0, 1], that lose their text, their references or both; see `DropoutSection`."""

    text: float
    references: float
    both: float


class SamplePrompt(Section):
    """One video to make while training."""

    prompt: Text = Field(description="what happens in the video")
    references: list[Text] = Field(default=[], description="reference images: paths")


class SampleSection(Section):
    """How videos are made while training."""

    negative_prompt: str = Field(default="", description="prompt in place of the empty text")
    height: Pixels | None = Field(default=None, description="pixels; null = data.height, or the first bucket's")
    width: Pixels | None = Field(default=None, description="pixels; null = data.width, or the first bucket's")
    num_frames: Frames | None = Field(
        default=None, description="frames; null = data.num_frames, or the first bucket's"
    )
    num_inference_steps: Few = Field(default=30, description="denoising steps of a video")
    image_guidance_scale: NotNegative = Field(default=5.0, description="guidance towards the references")
    guidance_scale: float = Field(default=7.5, ge=1, le=1e6, description="guidance towards the prompt; 1 = off")
    guidance_refresh: Few = Field(
        default=1, description="guidance is computed in the first two steps and every so many; 1 = in every step"
    )
    seed: Seed = Field(default=0, description="of the initial noise, the same every time")


class DataSection(Section):
    """Where the samples are and what is cached of them."""

    train_data: Sources | None = Field(
        default=None,
        description="the training rows: a path, {path, format, videos, ratio, max_rows, …}, or a list of those",
    )
    validation_data: Sources | None = Field(default=None, description="the held-out rows, in the same ways")
    validation_rows: FromZero = Field(
        default=0, description="last rows of train_data to hold out, without validation_data"
    )
    bucket_by_references: bool = Field(
        default=False, description="samples of a batch have the same number of references, so that none is padded"
    )
    cache_dir: Text = Field(description="folder of the cached latents, embeddings and teacher features")
    height: Pixels = Field(default=480, description="pixels")
    width: Pixels = Field(default=832, description="pixels")
    num_frames: Frames = Field(default=81, description="frames of a clip")
    buckets: list[Text] | None = Field(
        default=None,
        description="sizes in place of num_frames, height and width: frames x height x width, such as [81x480x832, "
        "81x832x480]; a clip goes to the one that suits it best. null = that one size",
    )
    fps: Rate | None = Field(
        default=16.0, description="frames per second that clips are sampled at; null = as they are"
    )
    max_references: Few = Field(default=4, description="references of a sample at most")
    augment_references: bool = Field(
        default=True, description="rotate, scale, flip, shear, blur and colour the references of regular pairs"
    )
    reference_variants: Few = Field(default=1, description="augmented versions of each reference that are cached")
    keep_background: bool = Field(default=False, description="keep what a reference's mask leaves out, inside its box")
    teacher_grid: Literal["match", "native"] = Field(
        default="match", description="references are shown to teachers on the DiT's token grid or on the teacher's own"
    )
    teacher_layer: int = Field(
        default=-1, ge=-1_000, le=1_000, description="hidden states of the teachers; -1 = the last"
    )
    dtype: Literal["fp32", "fp16", "bf16"] = Field(default="bf16", description="what the cache stores")
    text_encoder_dtype: Literal["fp32", "fp16", "bf16"] = Field(
        default="bf16", description="the text encoder computes in it"
    )
    num_workers: Workers = Field(default=0, description="processes that decode clips while the cache is made")
    max_unreadable: Share = Field(
        default=0.01,
        description="share of the training rows that may turn unreadable while training; others of their shape are "
        "taken instead, and the end lists them. More stop the run",
    )
