"""A row of the families' case table, and what its tests share.

Shape letters: B batch, C latent channels, F latent frames, H and W latent height and width, M references, S text
tokens.
"""

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

import refalign_adapter as ra
from refalign_adapter.families.base import Family, Text

F, H, W, S = 3, 4, 6, 5
MODES = [("joint", "all"), ("isolated", "reference"), ("isolated", "all")]


def draw(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float32) -> Tensor:
    """Normal numbers, the same for every type."""
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


@dataclass(frozen=True)
class Case:
    """A family with what its tests need.

    Attributes:
        family: the object.
        pipeline: makes its pipeline, small and random, with 3 blocks and the parts of `tiny_models`.
        released: name -> (configuration of a released transformer, how many parameters that has).
        shifts: tokens of a video -> the flow shift of that pipeline's scheduler.
    """

    family: Family
    pipeline: Callable[[], Any]
    released: dict[str, tuple[dict[str, Any], int]] = field(default_factory=dict)
    shifts: dict[int, float] = field(default_factory=lambda: {12: 3.0, 32_760: 3.0})

    def tokens(self, transformer: Any) -> int:
        """Of an image of H × W latents."""
        _, rows, columns = self.family.patch_size(transformer)
        return H // rows * (W // columns)

    def size(self, pipe: Any) -> tuple[int, int, int]:
        """Frames, height and width of a video of 2 latent frames, 2 rows and 3 columns of tokens."""
        time, rows, columns = self.family.size_multiples(pipe, self.family.patch_size(pipe.transformer))
        return time + 1, 2 * rows, 3 * columns

    def named_size(self, pipe: Any) -> dict[str, int]:
        """Likewise, as a pipeline's arguments."""
        return dict(zip(("num_frames", "height", "width"), self.size(pipe), strict=True))

    def arguments(self, transformer: Any, batch: int = 2, seed: int = 1) -> dict[str, Any]:
        """A call's, the last sample with a shorter prompt."""
        latents = draw(batch, self.family.channels(transformer), F, H, W, seed=seed, dtype=transformer.dtype)
        text = self.text(transformer, latents, seed + 1)
        sigmas = torch.linspace(0.3, 0.7, batch, dtype=transformer.dtype)
        return self.family.forward_arguments(transformer, latents, sigmas, text)

    def text(self, transformer: Any, like: Tensor, seed: int = 2) -> Text:
        """Random, of S tokens; the last sample has two fewer."""
        text = self.family.no_text(transformer, like, S)
        for name, zeros in text.items():
            mask = zeros.dtype == torch.bool
            text[name] = torch.ones_like(zeros) if mask else draw(*zeros.shape, seed=seed, dtype=zeros.dtype)
            text[name][-1, S - 2 :] = 0
        return text

    def velocity(self, transformer: Any, arguments: dict[str, Any]) -> Tensor:
        """(B, C, F, H, W)."""
        return self.family.prediction(transformer, arguments, transformer(**arguments))

    def references(self, transformer: Any, batch: int = 2, count: int = 2) -> Tensor:
        """(B, C, M, H, W)."""
        return draw(batch, self.family.channels(transformer), count, H, W, seed=5, dtype=transformer.dtype)

    def attached(
        self, attention: str, scope: str, dtype: torch.dtype = torch.float32, **fields: Any
    ) -> tuple[Any, ra.ReferenceBranch]:
        """A transformer and its branch, with a LoRA that makes a difference."""
        transformer = self.pipeline().transformer.to(dtype)
        options = {"r": 4, "align_layers": 2, "max_sequence_length": 16} | fields
        config = ra.RefAlignConfig(attention=attention, lora_scope=scope, **options)
        branch = ra.attach(transformer, config, family=self.family, seed=0)
        for index, (name, parameter) in enumerate(branch.named_parameters()):
            parameter.data = parameter.data.to(dtype)
            if "lora_B" in name:
                parameter.data += 0.1 * draw(*parameter.shape, seed=index, dtype=dtype)
        return transformer, branch
