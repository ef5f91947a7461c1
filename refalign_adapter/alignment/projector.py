"""Projectors: small networks that map a block's reference tokens to a teacher's width. Used in training only.

Shape letters: B batch, M references, N tokens per reference.
Source: RefAlign (arXiv 2603.25743) and its released code, `blocks.{i}.input_mlp.proj.{0,2}.weight`.
"""

import math
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn

from ..errors import ConfigError, UserError


class Projector(nn.Module):
    """MLP dim -> dim / 2 -> teacher_dim with SiLU and without biases.

    Args:
        dim: width of the DiT, at least 2.
        teacher_dim: width of the teacher's features.
        generator: draws the initial weights, uniformly as in torch.nn.Linear; None: torch's global generator.
    """

    def __init__(self, dim: int, teacher_dim: int, generator: torch.Generator | None = None):
        super().__init__()
        first, last = _linear(dim, dim // 2, generator), _linear(dim // 2, teacher_dim, generator)
        self.proj = nn.Sequential(first, nn.SiLU(), last)

    def forward(self, features: Tensor) -> Tensor:
        """(..., dim) -> (..., teacher_dim), in the weights' type, or in autocast's where that is on."""
        return self.proj(features.to(next(self.parameters()).dtype))


class Projectors(nn.Module):
    """One `Projector` for every pair of an aligned block and a teacher.

    Args:
        blocks: indices of the aligned blocks.
        dim: width of the DiT.
        teachers: teacher id -> width of its features. Ids are free text: Hub ids and folders both work.
        generator: draws the initial weights, block by block in ascending order; None: torch's global generator.

    Raises:
        ConfigError: lists every problem at once.
    """

    def __init__(
        self,
        blocks: Sequence[int],
        dim: int,
        teachers: Mapping[str, int],
        generator: torch.Generator | None = None,
    ):
        super().__init__()
        if problems := _problems(blocks, dim, teachers):
            raise ConfigError(problems)
        self.blocks, self.dim, self.teachers = tuple(sorted(blocks)), dim, dict(teachers)
        self.heads = nn.ModuleDict(
            {
                head_name(block, teacher): Projector(dim, width, generator)
                for block in self.blocks
                for teacher, width in self.teachers.items()
            }
        )

    def forward(self, features: Mapping[int, Tensor]) -> dict[int, dict[str, Tensor]]:
        """Block index -> (B, M, N, dim) features to block index -> teacher id -> (B, M, N, teacher width).

        Raises:
            UserError: an aligned block without features, or features of another width.
        """
        if missing := [block for block in self.blocks if block not in features]:
            raise UserError(
                f"features must hold the aligned blocks {list(self.blocks)}, got {sorted(features)}: "
                f"capture {missing} too, or leave them out of align_layers"
            )
        return {block: self._project(block, features[block]) for block in self.blocks}

    def _project(self, block: int, features: Tensor) -> dict[str, Tensor]:
        if features.shape[-1] != self.dim:
            raise UserError(f"features of block {block} must have {self.dim} channels, got {features.shape[-1]}")
        return {teacher: self.heads[head_name(block, teacher)](features) for teacher in self.teachers}


def head_name(block: int, teacher: str) -> str:
    """Key of a head in `Projectors.heads`: dots, which module names cannot hold, are percent-encoded."""
    return f"{block}:{teacher.replace('%', '%25').replace('.', '%2E')}"


def _linear(inputs: int, outputs: int, generator: torch.Generator | None) -> nn.Linear:
    # On "meta" the layer does not draw weights of its own from the global generator.
    layer = nn.Linear(inputs, outputs, bias=False, device="meta").to_empty(device="cpu")
    nn.init.kaiming_uniform_(layer.weight, a=math.sqrt(5), generator=generator)
    return layer


def _problems(blocks: Sequence[int], dim: int, teachers: Mapping[str, int]) -> list[str]:
    problems = []
    if len(set(blocks)) != len(blocks) or any(block < 0 for block in blocks):
        problems.append(f"blocks must be distinct indices >= 0, got {list(blocks)}")
    if dim < 2:
        problems.append(f"dim must be at least 2, got {dim}")
    problems += [f"width of {name} must be at least 1, got {width}" for name, width in teachers.items() if width < 1]
    return problems
