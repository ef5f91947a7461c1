"""A second objective, for tests alone: a linear head reads the mean colour of a random frame off the video's tokens.

Its target is made of the clip by no encoder at all, and is a part of the cache of its own.
"""

from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor, nn

from refalign_adapter.alignment.objective import Context, Features, Objective, ObjectiveOutput, Taps
from refalign_adapter.alignment.schedule import AlignmentSchedule
from refalign_adapter.batch import Batch
from refalign_adapter.data.cache.targets import Models, Sizes, Target

TEACHER = "mean colour"


@dataclass(frozen=True)
class MeanColour(Target):
    """(latent frames, 3): mean colours of the pixel frames behind each latent frame."""

    objective: ClassVar[str] = "toy"
    of: ClassVar[Literal["references", "video"]] = "video"
    teachers: tuple[str, ...] = (TEACHER,)
    gain: float = 1.0
    models: ClassVar[tuple[str, ...]] = ()

    def facts(self, teacher: str, sizes: Sizes, models: Models) -> dict[str, Any]:
        return {"gain": self.gain}

    def shape(self, teacher: str, sizes: Sizes, models: Models) -> tuple[int, ...]:
        return (sizes.video[0] - 1) // sizes.multiples[0] + 1, 3

    def encode(self, teacher: str, pixels: Tensor, sizes: Sizes, models: Models) -> Tensor:
        colours = pixels.mean((2, 3)).T * self.gain
        first, rest = colours[:1], colours[1:]
        return torch.cat([first, rest.unflatten(0, (-1, sizes.multiples[0])).mean(1)])


class Toy(Objective):
    """Squared error of the colour that a linear head sees in the tokens after `block`."""

    def __init__(self, block: int = 1, dim: int = 48, schedule: AlignmentSchedule | None = None, seed: int = 3):
        super().__init__(schedule or AlignmentSchedule(0.5))
        self.name, self.taps, self.logs = "toy", Taps(video=(block,)), ("toy/error",)
        self.targets = {TEACHER: 3}
        self.block = block
        self.head = nn.Linear(dim, 3)
        for parameter in self.head.parameters():
            nn.init.normal_(parameter, std=0.1, generator=torch.Generator().manual_seed(seed))

    def loss(self, features: Features, batch: Batch, context: Context) -> ObjectiveOutput:
        tokens, targets = features.video[self.block], batch.targets[self.name][TEACHER]
        frame = int(torch.randint(tokens.shape[1], (1,), generator=context.generator))
        seen = self.head(tokens[:, frame].mean((1, 2)).to(self.head.weight.dtype))
        error = (seen.float() - targets[:, frame].float()).square().mean()
        return ObjectiveOutput(error, {"toy/error": error.detach()})
