"""The shapes of cached samples and of training batches, from options and configs.

Shape letters: B batch, C latent channels, F latent frames, H and W latent height and width, M references, h and w
those of a reference.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from ..batch import Batch
from ..data.cache.options import DTYPES, CacheOptions
from ..media.sizes import Size
from .models import Models


@dataclass(frozen=True)
class SampleShapes:
    """Shapes of one sample's tensors.

    Attributes:
        latents: (C, F, H, W).
        text: the transformer's argument -> shape and type, on "meta", of a caption's tensor (1, …).
        reference: (C, h, w) of one reference.
        targets: objective -> teacher id -> shape of the target of one reference or of the video, its width last.
        of_video: the objectives whose targets are of the video.
        grid: rows and columns of the tokens that the transformer makes of one reference.
        dtype: of all others.
    """

    latents: tuple[int, int, int, int]
    text: dict[str, Tensor]
    reference: tuple[int, int, int]
    targets: dict[str, dict[str, tuple[int, ...]]]
    grid: tuple[int, int]
    dtype: torch.dtype
    of_video: tuple[str, ...] = ()

    @property
    def widths(self) -> dict[str, dict[str, int]]:
        """Objective -> teacher id -> width."""
        return {name: {key: shape[-1] for key, shape in shapes.items()} for name, shapes in self.targets.items()}

    def captions(self, samples: int, device: torch.device | str) -> dict[str, Tensor]:
        """Random captions of full length, as `Batch.text`."""
        shapes = {name: (samples, *tensor.shape[1:]) for name, tensor in self.text.items()}
        return {
            name: torch.ones(shapes[name], dtype=tensor.dtype, device=device)
            if tensor.dtype == torch.bool
            else torch.randn(shapes[name], dtype=tensor.dtype, device=device)
            for name, tensor in self.text.items()
        }

    def batch(self, samples: int, references: int, device: torch.device | str) -> Batch:
        """Random samples with references of different subjects; mask and subjects are on the CPU.

        Args:
            samples: B.
            references: M of each.
            device: of the other tensors, meta included.
        """

        def draw(*shape: int) -> Tensor:
            return torch.randn(samples, *shape, dtype=self.dtype, device=device)

        channels, *canvas = self.reference
        return Batch(
            keys=[str(index) for index in range(samples)],
            latents=draw(*self.latents),
            text=self.captions(samples, device),
            references=draw(channels, references, *canvas),
            mask=torch.ones(samples, references, dtype=torch.bool),
            subjects=torch.arange(references).repeat(samples, 1),
            targets={
                objective: {
                    teacher: draw(*shape) if objective in self.of_video else draw(references, *shape)
                    for teacher, shape in shapes.items()
                }
                for objective, shapes in self.targets.items()
            },
        )


def largest_size(options: CacheOptions) -> Size:
    """The one of the options' sizes that takes most memory."""
    return max(options.sizes, key=lambda size: size.num_frames * size.height * size.width)


def sample_shapes(models: Models, options: CacheOptions) -> SampleShapes:
    """Shapes of samples of the options' largest size."""
    options = options.at(largest_size(options))
    encoders = models.encoders
    time, rows, columns = models.family.size_multiples(encoders.pipe, encoders.patch_size)
    _, patch_rows, patch_columns = encoders.patch_size
    grid = encoders.token_grid(options)
    return SampleShapes(
        latents=(
            models.channels,
            (options.num_frames - 1) // time + 1,
            options.height // rows * patch_rows,
            options.width // columns * patch_columns,
        ),
        text=encoders.texts(options),
        reference=(models.channels, grid[0] * patch_rows, grid[1] * patch_columns),
        targets=encoders.shapes(options),
        grid=grid,
        dtype=DTYPES[options.dtype],
        of_video=tuple(target.objective for target in options.all_targets if target.of == "video"),
    )
