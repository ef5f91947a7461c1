"""The recipe: everything a training run is told, as typed fields. Keys are those of diffusers' training scripts.

`file.load_recipe` reads one from YAML; `python -m refalign_adapter.train --help` prints this schema.
"""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from ..alignment.schedule import AlignmentSchedule
from ..config import RefAlignConfig
from .adapter_section import AdapterSection
from .field_types import Count, Few, FromZero, NotNegative, Positive, Rate, Section, Seed, Text, Workers
from .sections import (
    AlignmentSection,
    DataSection,
    DropoutSection,
    DropoutShares,
    FlowSection,
    SamplePrompt,
    SampleSection,
)

LearningRateSchedule = Literal[
    "linear", "cosine", "cosine_with_restarts", "polynomial", "constant", "constant_with_warmup"
]


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
