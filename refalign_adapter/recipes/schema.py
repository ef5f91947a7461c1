"""The recipe: everything a training run is told, as typed fields. Keys are those of diffusers' training scripts.

`file.load_recipe` reads one from YAML; `python -m refalign_adapter.train --help` prints this schema.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass
from types import UnionType
from typing import TYPE_CHECKING, Annotated, Any, Literal, Union, get_args, get_origin, get_type_hints

from pydantic import BaseModel, ConfigDict, Field, StringConstraints, create_model

from ..alignment.schedule import AlignmentSchedule
from ..config import RefAlignConfig

Text = Annotated[str, StringConstraints(min_length=1, max_length=4096, pattern=r"^[^\x00]*$")]
Count = Annotated[int, Field(ge=1, le=10**9)]
FromZero = Annotated[int, Field(ge=0, le=10**9)]
Few = Annotated[int, Field(ge=1, le=10**4)]
Pixels = Annotated[int, Field(ge=1, le=16_384)]
Frames = Annotated[int, Field(ge=1, le=100_000)]
Workers = Annotated[int, Field(ge=0, le=1_024)]
Seed = Annotated[int, Field(ge=0, lt=2**32)]
"""What every library that draws takes."""
Share = Annotated[float, Field(ge=0, le=1)]
NotNegative = Annotated[float, Field(ge=0, le=1e6, allow_inf_nan=False)]
Positive = Annotated[float, Field(gt=0, le=1e6, allow_inf_nan=False)]
Rate = Annotated[float, Field(gt=0, le=1e3, allow_inf_nan=False)]
Sources = Text | dict[str, Any] | list[Any]
"""Where rows are, see `data.manifest`; `checks` looks inside."""


LearningRateSchedule = Literal[
    "linear", "cosine", "cosine_with_restarts", "polynomial", "constant", "constant_with_warmup"
]


class Section(BaseModel):
    """A part of a recipe: unknown keys and loose types are errors."""

    model_config = ConfigDict(extra="forbid", strict=True, frozen=True, protected_namespaces=())


def _adapter_fields() -> dict[str, Any]:
    """Those of `RefAlignConfig` that a recipe sets, with its defaults; lists where it takes sequences."""
    hints, fields = get_type_hints(RefAlignConfig), {}
    for item in dataclasses.fields(RefAlignConfig):
        if "help" in item.metadata:
            made = item.default if item.default is not dataclasses.MISSING else item.default_factory()  # type: ignore
            default = list(made) if isinstance(made, tuple) else made
            fields[item.name] = (_with_lists(hints[item.name]), Field(default, description=item.metadata["help"]))
    return fields


def _with_lists(hint: Any) -> Any:
    """YAML has lists where Python takes any sequence."""
    if isinstance(hint, UnionType):
        return Union[tuple(map(_with_lists, get_args(hint)))]  # noqa: UP007  # of a number that is not written here
    return list[get_args(hint)] if get_origin(hint) is Sequence else hint


if TYPE_CHECKING:

    class _AdapterFields(RefAlignConfig, Section): ...  # pyright: ignore  # for its names alone

else:
    _AdapterFields = create_model("_AdapterFields", __base__=Section, **_adapter_fields())


class AdapterSection(_AdapterFields):
    """What the adapter is; see `RefAlignConfig`."""

    @property
    def without_references_is_base(self) -> bool:
        """Whether a step whose references are dropped trains nothing, as the base alone answers it."""
        return self.lora_scope == "reference" and self.null_reference == "absent"


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


class Recipe(Section):
    """A training run."""

    pretrained_model_name_or_path: Text = Field(description="base model: diffusers folder or Hub id")
    revision: Text | None = Field(default=None, description="the base's branch, tag or commit on the Hub")
    variant: Text | None = Field(default=None, description="the base's weight variant, such as fp16")
    family: Text | None = Field(
        default=None,
        description="the base's family, a key or package.module:attribute; null = found by the base's class",
    )
    output_dir: Text = Field(description="folder for checkpoints, logs and the adapter")
    init_adapter: Text | None = Field(
        default=None, description="adapter to start from, such as stage 1's; null = afresh"
    )
    seed: Seed = Field(default=0, description="of everything random")

    max_train_steps: Count = Field(default=3000, description="optimizer steps")
    train_batch_size: Few = Field(default=1, description="samples of a process at a time")
    gradient_accumulation_steps: Few = Field(default=1, description="batches per optimizer step")
    gradient_checkpointing: bool = Field(
        default=False, description="recompute blocks in backward: less memory, more time"
    )
    offload_activations: bool = Field(
        default=False,
        description="keep what gradient checkpointing keeps of each block in host memory: "
        "less GPU memory, a little time",
    )
    mixed_precision: Literal["no", "bf16"] | None = Field(
        default=None, description="null = what accelerate launch says"
    )
    quantization: Literal["nf4", "int8"] | None = Field(
        default=None, description="the frozen base in 4 or 8 bits, by bitsandbytes on a GPU; null = not quantised"
    )
    allow_tf32: bool = Field(default=False, description="TF32 matrix products on NVIDIA GPUs")
    dataloader_num_workers: Workers = Field(
        default=0, description="processes that read samples; 0 = the training process"
    )

    learning_rate: Rate = Field(default=1e-4, description="of the LoRA")
    projector_learning_rate: Rate | None = Field(default=None, description="of the projectors; null = learning_rate")
    lr_scheduler: LearningRateSchedule = Field(default="constant", description="as in diffusers")
    lr_warmup_steps: FromZero = Field(default=0, description="optimizer steps over which the learning rate rises")
    lr_num_cycles: Few = Field(default=1, description="restarts of cosine_with_restarts")
    lr_power: Positive = Field(default=1.0, description="power of polynomial")

    optimizer: Text = Field(
        default="adamw8bit",
        description="adamw8bit, paged_adamw8bit, adamw, or a class of torch.optim or bitsandbytes.optim",
    )
    adam_beta1: float = Field(default=0.9, ge=0, lt=1, description="first moment's decay")
    adam_beta2: float = Field(default=0.999, ge=0, lt=1, description="second moment's decay")
    adam_weight_decay: NotNegative = Field(default=0.01, description="weight decay")
    adam_epsilon: Positive = Field(default=1e-8, description="added to the denominator")
    max_grad_norm: Positive | None = Field(
        default=1.0, description="gradients are clipped to this norm; null = not at all"
    )
    min_8bit_size: Count = Field(
        default=4096, description="tensors with fewer elements keep 32-bit state in 8-bit optimizers"
    )
    ema_decay: float | None = Field(
        default=None, ge=0, lt=1, description="decay of the adapter's moving average; null = off"
    )

    max_bad_steps: Count = Field(
        default=3, description="steps in a row that may be skipped because their loss or gradient is no number"
    )

    checkpointing_steps: Count = Field(default=500, description="write a checkpoint every so many steps")
    checkpoints_total_limit: Count | None = Field(
        default=None, description="checkpoints to keep, the newest; null = all"
    )
    resume_from_checkpoint: Text | None = Field(
        default=None, description="latest, or a checkpoint's folder; null = afresh"
    )

    validation_steps: Count | None = Field(default=None, description="held-out loss every so many steps; null = never")
    validation_batches: Count | None = Field(default=None, description="batches of a validation at most; null = all")

    sample_steps: Count | None = Field(
        default=None, description="make videos in output_dir/samples/step-N/ every so many steps; null = never"
    )
    sample_prompts: list[SamplePrompt] = Field(default=[], description="what to make: a list of {prompt, references}")

    report_to: Text | list[Text] | None = Field(
        default="tensorboard", description="trackers that accelerate knows: tensorboard, wandb …; null = none"
    )
    logging_dir: Text = Field(default="logs", description="the trackers' folder inside output_dir")
    push_to_hub: bool = Field(default=False, description="upload the adapter at the end")
    hub_model_id: Text | None = Field(default=None, description="where to: user/name")
    hub_private: bool = Field(default=False, description="create the Hub repository as a private one")

    adapter: AdapterSection = Field(default=AdapterSection(), description=AdapterSection.__doc__)
    alignment: AlignmentSection = Field(default=AlignmentSection(), description=AlignmentSection.__doc__)
    flow: FlowSection = Field(default=FlowSection(), description=FlowSection.__doc__)
    dropout: DropoutSection = Field(default=DropoutSection(), description=DropoutSection.__doc__)
    data: DataSection = Field(description=DataSection.__doc__)
    sample: SampleSection = Field(default=SampleSection(), description=SampleSection.__doc__)

    def adapter_config(self) -> RefAlignConfig:
        """The adapter that this recipe trains.

        Raises:
            ConfigError: the adapter section's problems.
        """
        return RefAlignConfig(**self.adapter.model_dump(), base_model=self.pretrained_model_name_or_path)

    def dropout_shares(self) -> DropoutShares:
        """The shares of dropped conditions, with those that are not given filled in.

        A LoRA on references alone leaves the base itself as the model without references, where nothing stands for
        those: a step whose references are dropped would train nothing.
        """
        section, default = self.dropout, 0.1
        without = 0.0 if self.adapter.without_references_is_base else default
        return DropoutShares(
            text=default if section.text is None else section.text,
            references=without if section.references is None else section.references,
            both=without if section.both is None else section.both,
        )

    def alignment_schedule(self) -> AlignmentSchedule:
        """The schedule of η; a cosine without a length ends with the run.

        Raises:
            UserError: numbers that make no schedule.
        """
        section = self.alignment
        rest = self.max_train_steps - section.warmup_steps
        decay_steps = section.decay_steps or (max(1, rest) if section.decay == "cosine" else 0)
        return AlignmentSchedule(
            section.weight,
            warmup_steps=section.warmup_steps,
            decay=section.decay,
            decay_steps=decay_steps,
            final_weight=section.final_weight,
            cutoff_step=section.cutoff_step,
        )

    @property
    def trackers(self) -> list[str]:
        """Names of the trackers, none doubled."""
        names = [self.report_to] if isinstance(self.report_to, str) else self.report_to or []
        return list(dict.fromkeys(names))
