"""One training step, the whole method on a page: drop conditions, add noise, predict, flow loss, alignment loss.

Shape letters: B batch, C latent channels, F latent frames, H and W latent height and width, M references, N tokens per
reference, S text tokens, D text width, h and w a teacher's grid, T a teacher's width.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from ..alignment.projector import Projectors
from ..alignment.reference.loss import reference_alignment_loss
from ..alignment.schedule import timestep_gate
from ..batch import Batch, StepOutput
from ..branch.attach import ReferenceBranch
from ..flow import TimestepSampling, flow_loss, interpolate, sample_sigmas, velocity_target
from ..grids import resample_grid


@dataclass(frozen=True)
class StepOptions:
    """What a step draws and weighs.

    Attributes:
        timestep_sampling, logit_mean, logit_std, shift: how sigmas are drawn, see `flow.sample_sigmas`.
        text_dropout, reference_dropout, both_dropout: shares of samples that lose text, references or both.
        positive_margin, negative_margin, negative_weight: of the alignment loss, see `reference_alignment_loss`.
        timestep_gate: power p of the factor sigma^p on a sample's alignment term; None: no factor. The released code
            has 3, the paper's text does not mention it.
    """

    timestep_sampling: TimestepSampling = "uniform"
    logit_mean: float = 0.0
    logit_std: float = 1.0
    shift: float = 1.0
    text_dropout: float = 0.1
    reference_dropout: float = 0.1
    both_dropout: float = 0.1
    positive_margin: float = 0.0
    negative_margin: float = 1.0
    negative_weight: float = 1.0
    timestep_gate: float | None = None


@dataclass(frozen=True)
class Shown:
    """What the transformer sees of a batch's conditions.

    Attributes:
        text: (B, S, D).
        references: (B, C, M, H', W') latents.
        mask: (B, M) bool, True where one of them rides along.
        aligned: (B, M) bool, True where it is one of the batch's own, to be aligned.
    """

    text: Tensor
    references: Tensor
    mask: Tensor
    aligned: Tensor


class TrainingStep(nn.Module):
    """Transformer, branch and projectors as the one module that accelerate wraps.

    Args:
        branch: a reference branch; its transformer becomes a submodule.
        projectors: a head per aligned block and teacher; None trains on the flow loss alone.
        options: see `StepOptions`.
    """

    def __init__(self, branch: ReferenceBranch, projectors: Projectors | None, options: StepOptions):
        super().__init__()
        self.transformer: Any = branch.transformer
        self.projectors = projectors
        self.branch = branch
        self.options = options

    def forward(
        self,
        batch: Batch,
        empty_text: Tensor,
        *,
        generator: torch.Generator,
        alignment_weight: float,
        drop_conditions: bool = True,
        sigmas: Tensor | None = None,
        noise: Tensor | None = None,
    ) -> StepOutput:
        """Losses of one batch.

        Args:
            batch: see `Batch`.
            empty_text: (S, D) embedding of the empty prompt.
            generator: a CPU generator; all of the step's randomness comes from it.
            alignment_weight: η of this step; 0 skips the alignment.
            drop_conditions: whether text and references are dropped at random (training) or kept (validation).
            sigmas: (B,) in [0, 1], instead of drawn ones.
            noise: of the latents' shape, likewise.
        """
        shown = Shown(batch.text, batch.references, batch.mask, batch.mask)
        if drop_conditions:
            shown = self._drop_conditions(batch, empty_text, generator)
        if noise is None:
            noise = torch.randn(batch.latents.shape, generator=generator)
        noise = noise.to(batch.latents.device)
        if sigmas is None:
            sigmas = self._draw_sigmas(len(batch.keys), generator)
        sigmas = sigmas.to(noise.device)
        latents = batch.latents.float()

        dtype = self.transformer.dtype
        family = self.branch.family
        noisy = interpolate(latents, noise, sigmas).to(dtype)
        arguments = family.forward_arguments(self.transformer, noisy, sigmas, shown.text.to(dtype))
        self.branch.capture = self.projectors is not None and alignment_weight > 0
        with self.branch.references(shown.references.to(dtype), shown.mask, tokens=batch.tokens):
            prediction = family.prediction(self.transformer, arguments, self.transformer(**arguments))
        flow = flow_loss(prediction, velocity_target(latents, noise)).mean()

        features = self.branch.features
        self.branch.clear()
        output = StepOutput(loss=flow, flow=flow.detach())
        if features:
            output.loss = flow + alignment_weight * self._align(features, batch, shown.aligned, sigmas, output)
        else:  # every process must have a gradient for every parameter
            output.loss = flow + 0.0 * sum(parameter.sum() for parameter in self._left_out(prediction))
        return output

    def _left_out(self, prediction: Tensor) -> list[nn.Parameter]:
        """Trained parameters that the flow loss may not reach."""
        left_out = [] if self.projectors is None else list(self.projectors.parameters())
        # Of a LoRA on references alone, the video reads nothing without references, and with them nothing that comes
        # after the last block's keys and values.
        if not prediction.requires_grad or self.branch.config.lora_scope == "reference":
            left_out += [parameter for _, parameter in self.branch.named_parameters()]
        return left_out

    def _drop_conditions(self, batch: Batch, empty_text: Tensor, generator: torch.Generator) -> Shown:
        """Dropped prompts are replaced by the empty one, dropped references by what the adapter has in their place."""
        options = self.options
        draw = torch.rand(len(batch.keys), generator=generator).to(batch.mask.device)
        only_text = draw < options.text_dropout
        only_references = ~only_text & (draw < options.text_dropout + options.reference_dropout)
        none = ~only_text & ~only_references
        both = none & (draw < options.text_dropout + options.reference_dropout + options.both_dropout)
        text = torch.where((only_text | both)[:, None, None], empty_text.to(batch.text), batch.text)
        dropped = only_references | both
        kept = batch.mask & ~dropped[:, None]
        if self.branch.config.null_reference == "absent":
            return Shown(text, batch.references, kept, kept)
        zeros = torch.zeros((), dtype=batch.references.dtype, device=batch.references.device)
        references = torch.where(dropped.to(zeros.device)[:, None, None, None, None], zeros, batch.references)
        return Shown(text, references, batch.mask, kept)

    def _draw_sigmas(self, batch: int, generator: torch.Generator) -> Tensor:
        options = self.options
        return sample_sigmas(
            batch,
            sampling=options.timestep_sampling,
            shift=options.shift,
            logit_mean=options.logit_mean,
            logit_std=options.logit_std,
            generator=generator,
        )

    def _align(
        self, features: dict[int, Tensor], batch: Batch, mask: Tensor, sigmas: Tensor, output: StepOutput
    ) -> Tensor:
        """Mean alignment term over blocks and teachers; fills in the parts of `output`."""
        assert self.projectors is not None
        patch = self.branch.family.patch_size(self.transformer)
        grid = (batch.references.shape[-2] // patch[1], batch.references.shape[-1] // patch[2])
        targets = {
            name: resample_grid(target, grid).flatten(2, 3).to(batch.references.device)
            for name, target in batch.teacher.items()
        }
        gate = timestep_gate(sigmas, self.options.timestep_gate)
        shown = {"mask": mask.cpu(), "subjects": batch.subjects.cpu()}  # the loss reads them on the host, every time
        if batch.tokens is not None:
            shown["tokens"] = batch.tokens.flatten(2).cpu()
        output.references = int(shown["mask"].sum())
        totals = []
        for block, students in self.projectors(features).items():
            parts = [self._block_loss(student, targets[name], shown, gate) for name, student in students.items()]
            totals += [part[0] for part in parts]
            means = torch.stack([torch.stack(part[1:]) for part in parts]).mean(0)
            output.positive[block], output.negative[block], output.cosine[block] = means.unbind()
        return torch.stack(totals).mean()

    def _block_loss(
        self, student: Tensor, target: Tensor, shown: dict[str, Tensor], gate: Tensor
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """(total, positive, negative, cosine) of one block and teacher; a sample's total is multiplied by its gate.

        `shown` holds the loss's mask, subjects and, where some are left out, tokens.
        """
        margins = (self.options.positive_margin, self.options.negative_margin, self.options.negative_weight)
        if self.options.timestep_gate is None:
            loss = reference_alignment_loss(student, target, *margins, **shown)
            return loss.total, loss.positive, loss.negative, loss.cosine
        losses = [
            reference_alignment_loss(
                student[i], target[i], *margins, **{name: values[i] for name, values in shown.items()}
            )
            for i in range(len(student))
        ]
        total = torch.stack([loss.total for loss in losses]) @ gate.to(losses[0].total)
        names = ("positive", "negative", "cosine")
        positive, negative, cosine = (torch.stack([getattr(loss, name) for loss in losses]).mean() for name in names)
        return total / len(losses), positive, negative, cosine
