"""What all reference pipelines have in common: the branch, checks of their inputs, encoded references, unloading.

Shape letters: B prompts, C latent channels, M references (padded to the largest number among the prompts), H and W the
video's height and width in pixels, h and w its latents'.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ..branch.attach import ReferenceBranch
from ..branch.lora import restore_trainable
from ..errors import ConfigError, UserError
from .references import group_by_prompt, load_canvases

MAX_REFERENCES = 8


class ReferencePipeline:
    """Mixed into a diffusers pipeline class. `load_adapter` makes it; it shares the given pipeline's components.

    Attributes:
        branch: references into the transformer; None once unloaded.
        changes: what loading changed in the shared components, one sentence each.
        max_references: most references a prompt may have. Each takes the memory and time of one more latent frame; the
            limit is there to catch slips and can be raised.
    """

    branch: ReferenceBranch | None = None
    changes: tuple[str, ...] = ()
    max_references: int = MAX_REFERENCES
    transformer: Any
    vae: Any
    _trainable_before: frozenset[str] = frozenset()

    def unload(self) -> None:
        """Take LoRA and hooks off the shared transformer: the pipeline given to `load_adapter` is as it was before.

        Bit by bit, unless the LoRA was fused in between, which rounds. After `merge_and_unload` only the hooks are
        taken off, as the base's own weights are gone. A second call does nothing.
        """
        if self.branch is None:
            return
        branch, self.branch, self.changes = self.branch, None, ()
        if is_merged(branch.transformer, branch.adapter_name):
            self.unfuse_lora()  # type: ignore[attr-defined]  # of diffusers' LoRA mixin
        branch.detach()
        restore_trainable(branch.transformer, set(self._trainable_before))

    def _loaded_branch(self) -> ReferenceBranch:
        if self.branch is None:
            raise UserError("pipe: no reference adapter is loaded (any more); call load_adapter(pipe, ...)")
        return self.branch

    def _check_numbers(self, height: int, width: int, frames: int, **counts: int) -> None:
        """Refuse sizes that the model cannot cut into tokens, and counts below 1; all at once."""
        branch = self._loaded_branch()
        patch_size = branch.family.patch_size(branch.transformer)
        time, rows, columns = branch.family.size_multiples(self, patch_size)
        problems = [f"{name} must be at least 1, got {value}" for name, value in counts.items() if value < 1]
        if frames < 1 or (frames - 1) % time:
            near = max(0, round((frames - 1) / time)) * time + 1
            problems.append(f"num_frames must be a multiple of {time} plus 1, got {frames}; try {near}")
        for name, value, multiple in (("height", height, rows), ("width", width, columns)):
            if value < 1 or value % multiple:
                near = max(1, round(value / multiple)) * multiple
                problems.append(f"{name} must be a multiple of {multiple}, got {value}; try {near}")
        if problems:
            raise ConfigError(problems)

    def _read_references(self, images: Any, prompts: int, height: int, width: int) -> tuple[Tensor, Tensor] | None:
        """Canvases (B, M, 3, H, W) and mask (B, M), see `load_canvases`; None without any reference."""
        groups = group_by_prompt(images, prompts, self.max_references)
        return None if groups is None else load_canvases(groups, height, width)

    def _encode_references(self, canvases: Tensor, mask: Tensor) -> Tensor:
        """(B, M, 3, H, W) canvases to (B, C, M, h, w) normalised latents, zero where padded.

        One image at a time, which bounds memory; the same image is the same latent in any company.
        """
        family = self._loaded_branch().family
        if (hook := getattr(self.vae, "_hf_hook", None)) is not None:
            hook.pre_forward(self.vae)  # offloaded, it comes to its device only when called; families ask where it is
        places = mask.nonzero().tolist()
        encoded = [family.encode_images(self, canvases[b, m].unsqueeze(0))[0] for b, m in places]
        latents = torch.zeros(*mask.shape, *encoded[0].shape, device=encoded[0].device)
        for (b, m), latent in zip(places, encoded, strict=True):
            latents[b, m] = latent
        return latents.transpose(1, 2)


def is_merged(transformer: Any, adapter_name: str) -> bool:
    """Whether the adapter is fused into the base's weights."""
    return any(adapter_name in getattr(module, "merged_adapters", ()) for module in transformer.modules())
