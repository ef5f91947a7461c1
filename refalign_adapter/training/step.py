"""One training step, the whole method on a page: drop conditions, add noise, predict, flow loss, the objectives' sum.

Shape letters: B batch, C latent channels, F latent frames, H and W latent height and width, M references.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from ..alignment.objective import Context, Features, Objective, problems_of, zero_of
from ..batch import Batch, StepOutput, moved_text
from ..branch.reference_branch import ReferenceBranch
from ..errors import ConfigError
from ..flow import Shift, TimestepSampling, flow_loss, interpolate, sample_sigmas, unshifted, velocity_target
from .taps import video_tokens


@dataclass(frozen=True)
class StepOptions:
    """What a step draws.

    Attributes:
        timestep_sampling, logit_mean, logit_std: how sigmas are drawn, see `flow.sample_sigmas`.
        shift: by which they are shifted.
        text_dropout, reference_dropout, both_dropout: shares of samples that lose text, references or both.
    """

    timestep_sampling: TimestepSampling = "uniform"
    logit_mean: float = 0.0
    logit_std: float = 1.0
    shift: Shift = unshifted
    text_dropout: float = 0.1
    reference_dropout: float = 0.1
    both_dropout: float = 0.1


@dataclass(frozen=True)
class Shown:
    """What the transformer sees of a batch's conditions.

    Attributes:
        text: the transformer's argument -> (B, …).
        references: (B, C, M, H', W') latents.
        mask: (B, M) bool, True where one of them rides along.
        aligned: (B, M) bool, True where it is one of the batch's own, to be aligned.
    """

    text: dict[str, Tensor]
    references: Tensor
    mask: Tensor
    aligned: Tensor


class TrainingStep(nn.Module):
    """Transformer, branch and the objectives' heads as the one module that accelerate wraps.

    Args:
        branch: a reference branch; its transformer becomes a submodule.
        objectives: what is added to the flow loss; without any it is all.
        options: see `StepOptions`.

    Raises:
        ConfigError: objectives that do not go together, or tap what is not there.
    """

    def __init__(self, branch: ReferenceBranch, objectives: Sequence[Objective], options: StepOptions):
        super().__init__()
        self.transformer: Any = branch.transformer
        blocks = len(branch.family.blocks(branch.transformer))
        if problems := list(problems_of(objectives, blocks, branch.align_blocks)):
            raise ConfigError(problems)
        self.objectives: Any = nn.ModuleList(objectives)
        self.branch = branch
        self.options = options

    @property
    def logs(self) -> list[str]:
        """Names of all that a step's output may tell besides its losses."""
        return [name for objective in self.objectives for name in objective.logs]

    def forward(
        self,
        batch: Batch,
        empty_text: Mapping[str, Tensor],
        *,
        generator: torch.Generator,
        weights: Mapping[str, float],
        drop_conditions: bool = True,
        sigmas: Tensor | None = None,
        noise: Tensor | None = None,
    ) -> StepOutput:
        """Losses of one batch.

        Args:
            batch: see `Batch`.
            empty_text: the transformer's argument -> what the empty prompt gave, without B.
            generator: a CPU generator; all of the step's randomness comes from it.
            weights: objective -> its weight in this step; one of 0 or that is not here is left out.
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
            sigmas = self._draw_sigmas(batch.latents, generator)
        sigmas = sigmas.to(noise.device)
        latents = batch.latents.float()

        dtype = self.transformer.dtype
        family = self.branch.family
        noisy = interpolate(latents, noise, sigmas).to(dtype)
        arguments = family.forward_arguments(self.transformer, noisy, sigmas, moved_text(shown.text, dtype=dtype))
        weighing = [objective for objective in self.objectives if weights.get(objective.name, 0.0) > 0]
        self.branch.capture = any(objective.taps.reference for objective in weighing)
        with (
            self._video_tokens(weighing, latents) as tapped,
            self.branch.references(shown.references.to(dtype), shown.mask, tokens=batch.tokens),
        ):
            prediction = family.prediction(self.transformer, arguments, self.transformer(**arguments))
        flow = flow_loss(prediction, velocity_target(latents, noise)).mean()

        features = Features(self.branch.features, tapped)
        self.branch.clear()
        context = Context(sigmas, shown.aligned, self._reference_grid(batch), generator)
        output = StepOutput(loss=flow, flow=flow.detach())
        for objective in weighing:
            term = objective.loss(features, batch, context)
            output.loss = output.loss + weights[objective.name] * term.total
            output.logs |= term.logs
            output.counts |= term.counts
        # Every process must have a gradient for every parameter.
        left_out = [*self._heads_without_weight(weighing), *self._lora_out_of_reach(prediction, features)]
        if left_out:
            output.loss = output.loss + zero_of(left_out)
        return output

    def _video_tokens(self, objectives: Sequence[Objective], latents: Tensor) -> Any:
        """See `video_tokens`; of all blocks that the objectives tap."""
        blocks = {block for objective in objectives for block in objective.taps.video}
        return video_tokens(self.transformer, self.branch.family, blocks, self._grid(latents))

    def _grid(self, latents: Tensor) -> tuple[int, int, int]:
        """Frames, rows and columns of tokens of videos (B, C, F, H, W)."""
        frames, rows, columns = self.branch.family.patch_size(self.transformer)
        _, _, length, height, width = latents.shape
        return length // frames, height // rows, width // columns

    def _reference_grid(self, batch: Batch) -> tuple[int, int]:
        _, rows, columns = self.branch.family.patch_size(self.transformer)
        return batch.references.shape[-2] // rows, batch.references.shape[-1] // columns

    def _heads_without_weight(self, weighing: Sequence[Objective]) -> list[nn.Parameter]:
        return [
            parameter
            for objective in self.objectives
            if objective not in weighing
            for parameter in objective.heads.parameters()
        ]

    def _lora_out_of_reach(self, prediction: Tensor, features: Features) -> list[nn.Parameter]:
        """The LoRA where the loss may not reach all of it."""
        # Of a LoRA on references alone, the video reads nothing without references, and with them nothing that comes
        # after the last block's keys and values; tapped references have that too.
        reached = prediction.requires_grad and self.branch.config.lora_scope != "reference"
        return [] if features.reference or reached else [parameter for _, parameter in self.branch.named_parameters()]

    def _drop_conditions(self, batch: Batch, empty_text: Mapping[str, Tensor], generator: torch.Generator) -> Shown:
        """Dropped prompts are replaced by the empty one, dropped references by what the adapter has in their place."""
        options = self.options
        draw = torch.rand(len(batch.keys), generator=generator).to(batch.mask.device)
        only_text = draw < options.text_dropout
        only_references = ~only_text & (draw < options.text_dropout + options.reference_dropout)
        none = ~only_text & ~only_references
        both = none & (draw < options.text_dropout + options.reference_dropout + options.both_dropout)
        text = {name: _replaced(own, only_text | both, empty_text[name]) for name, own in batch.text.items()}
        dropped = only_references | both
        kept = batch.mask & ~dropped[:, None]
        if self.branch.config.null_reference == "absent":
            return Shown(text, batch.references, kept, kept)
        zeros = torch.zeros((), dtype=batch.references.dtype, device=batch.references.device)
        references = torch.where(dropped.to(zeros.device)[:, None, None, None, None], zeros, batch.references)
        return Shown(text, references, batch.mask, kept)

    def shift(self, latents: Tensor) -> float:
        """The timestep shift of videos (B, C, F, H, W)."""
        return self.options.shift(math.prod(self._grid(latents)))

    def _draw_sigmas(self, latents: Tensor, generator: torch.Generator) -> Tensor:
        options = self.options
        return sample_sigmas(
            len(latents),
            sampling=options.timestep_sampling,
            shift=self.shift(latents),
            logit_mean=options.logit_mean,
            logit_std=options.logit_std,
            generator=generator,
        )


def _replaced(tensor: Tensor, rows: Tensor, value: Tensor) -> Tensor:
    """(B, …) with `value` in the rows (B,) that are True."""
    return torch.where(rows.view(-1, *[1] * value.ndim), value.to(tensor), tensor)
