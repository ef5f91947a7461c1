"""`ReferenceBranch`: references into a transformer, features out of it; which branches a transformer has.

Shape letters: B batch, C latent channels, M references, h and w latent height and width, N tokens per reference.
"""

from __future__ import annotations

import dataclasses
import weakref
from collections.abc import Iterator
from contextlib import AbstractContextManager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from ..config import RefAlignConfig
from ..errors import UserError
from ..export.adapter import save_adapter
from ..export.hub import push_adapter
from ..families.base import Family
from .attention import ReferenceAttention
from .fingerprint import Fingerprint
from .isolated import IsolatedAttention
from .joint import JointAttention
from .lora import lora_parameters, remove_lora, restore_trainable, trainable_state
from .lora_scope import LoraScope
from .reference_cache import ReferenceCache
from .saving_guard import guard_saving
from .state import BranchState, prepare_references

if TYPE_CHECKING:
    from huggingface_hub import CommitInfo

_MARK = "_refalign_branches"
_living: weakref.WeakSet[ReferenceBranch] = weakref.WeakSet()


class ReferenceBranch:
    """References into a transformer and features out of it. Made by `attach` or `load_adapter`.

    Attributes:
        transformer: the DiT, unchanged but for hooks and LoRA.
        config: what the adapter is, with `base` and `target_modules` filled in.
        family: the DiT's family.
        adapter_name: the LoRA's name in PEFT.
        align_blocks: indices of the blocks whose reference tokens are captured.
        fingerprint: called, says what besides the base decides the keys and values of references.
        merged: whether the LoRA is part of the transformer's weights for good; set by whoever merges it.
        always_on: whether there is no LoRA to switch: it is merged, or the adapter holds none (r 0).
        weights_digest: sha256 of the weights it was loaded with; "" of one that was attached.
    """

    def __init__(self, transformer: Any, config: RefAlignConfig, family: Family, adapter_name: str):
        self.transformer = transformer
        self.config = config
        self.family = family
        self.adapter_name = adapter_name
        self.align_blocks = config.align_blocks(len(family.blocks(transformer)))
        self.merged = False
        self.weights_digest = ""
        self._trainable_before: dict[str, bool] = {}
        self._state = BranchState()
        # Without a LoRA there is nothing to switch off on video tokens.
        self._scope = LoraScope(transformer, adapter_name, config.lora_scope == "reference" and config.r > 0)
        blocks = family.blocks(transformer)
        layers = [layer for block in blocks for layer in family.key_value_layers(block)]
        self.fingerprint = Fingerprint(self._scope, config, layers)
        self._hooks = self._build_hooks()
        transformer.__dict__.setdefault(_MARK, {})[adapter_name] = self
        _living.add(self)
        self._guard_saving()

    def _build_hooks(self) -> ReferenceAttention:
        common = (self.transformer, self.family, self._state, self._scope, self.align_blocks)
        if self.config.attention == "isolated":
            beyond = self.config.reference_place == "beyond"
            return IsolatedAttention(*common, reference_frame=self.config.reference_frame, beyond=beyond)
        return JointAttention(*common, clean=self.config.reference_timestep == "clean")

    @property
    def always_on(self) -> bool:
        """See the class."""
        return self.merged or self.config.r == 0

    def references(
        self, latents: Tensor | ReferenceCache | None, mask: Tensor | None = None, tokens: Tensor | None = None
    ) -> AbstractContextManager[None]:
        """Have references ride along with every call of the transformer inside the context.

        With isolated attention each call runs the references first, with gradients where they are on; give what
        `encode_references` returned to spare them that.

        Args:
            latents: (B, C, M, h, w) normalised latents of M references, on the video's canvas with joint attention, on
                a canvas of any size with isolated; or cached references; None or M = 0 runs without references.
            mask: (B, M) bool, True where a reference is real; None: all are.
            tokens: (B, M, rows, columns) bool, True where a reference's token is kept (isolated); None: all are.

        Raises:
            UserError: shapes that do not fit, references cached by another adapter, or an adapter that is switched
                off; when it is entered, another thread that uses the transformer with references.
        """
        if latents is None:
            return self._state.waiting(None)
        self.check_switched_on()
        if isinstance(latents, ReferenceCache):
            return self._state.waiting(self._check_cache(latents))
        self._scope.check_not_fused_over()
        return self._state.waiting(prepare_references(latents, mask, tokens))

    @torch.no_grad()
    def encode_references(
        self,
        latents: Tensor,
        mask: Tensor | None = None,
        tokens: Tensor | None = None,
        *,
        frames: int,
        size: tuple[int, int] | None = None,
    ) -> ReferenceCache | None:
        """Run references once, for any number of calls inside `references(cache)` (isolated attention).

        Args:
            latents, mask, tokens: as in `references`.
            frames: latent frames of the videos.
            size: their latent height and width; needed with `reference_place` "beyond" alone.

        Returns:
            Keys and values on the transformer's device; None when no reference is real. With `null_reference` "zeros",
            those of latents of zero too, for passes without references.

        Raises:
            UserError: shapes that do not fit, joint attention, no size where one is needed, or an adapter that is
                switched off.
        """
        self.check_switched_on()
        self._scope.check_not_fused_over()
        references = prepare_references(latents, mask, tokens)
        if references is None:
            return None
        patch = self._hooks.patch_size
        grid = None if size is None else (size[0] // patch[1], size[1] // patch[2])
        made: dict[str, Any] = {"adapter": self.fingerprint(), "adapter_name": self.adapter_name}
        made["canvas"] = tuple(references.latents.shape[-2:])
        with self._state.waiting(None):
            if self.config.null_reference == "zeros":
                zeros = dataclasses.replace(references, latents=torch.zeros_like(references.latents))
                made["null"] = dataclasses.replace(self._hooks.cache(zeros, frames // patch[0], grid), **made)
            cache = self._hooks.cache(references, frames // patch[0], grid)
        return dataclasses.replace(cache, **made)

    def _check_cache(self, cache: ReferenceCache) -> ReferenceCache:
        """Refuse keys and values that another adapter or base would read wrongly."""
        blocks = len(self.family.blocks(self.transformer))
        if self.config.attention != "isolated":
            raise UserError("references: joint attention reads no cached references; give it latents")
        if len(cache.keys) != blocks or cache.keys[0].shape[2:].numel() != self.family.hidden_size(self.transformer):
            raise UserError("references: cached with another base; encode them again")
        if cache.adapter != self.fingerprint():
            raise UserError(
                f"references: cached with adapter {cache.adapter_name!r} of other weights or another strength; encode "
                f"them again with {self.adapter_name!r}"
            )
        return cache

    def check_switched_on(self) -> None:
        """Refuse references while the adapter does not act.

        Raises:
            UserError: it is switched off, or its LoRA was taken off the transformer.
        """
        if not self.always_on:
            self._scope.check_switched_on()

    @property
    def capture(self) -> bool:
        """Whether calls keep the reference tokens of the aligned blocks in `features`."""
        return self._state.capture

    @capture.setter
    def capture(self, value: bool) -> None:
        if value != self._state.capture:
            self._state.capture = bool(value)
            self._hooks.set_capture(self._state.capture)

    @property
    def features(self) -> dict[int, Tensor]:
        """Block index -> (B, M, N, dim) reference tokens after that block, from the latest call; zero where padded.

        With isolated attention they depend on neither video nor prompt; calls with cached references have none.
        """
        return {} if self._state.latest is None else self._state.latest.given_features()

    def clear(self) -> None:
        """Let go of the latest call's features, and with them of its graph."""
        self._state.latest = None

    def named_parameters(self) -> Iterator[tuple[str, nn.Parameter]]:
        """The LoRA's parameters with their names in the transformer."""
        return lora_parameters(self.transformer, self.adapter_name)

    def save_pretrained(self, folder: str | Path, dtype: Any = None) -> Path:
        """Write the adapter folder: LoRA weights, `refalign_config.json`, model card. Atomic.

        Args:
            folder: where to; replaced when it exists.
            dtype: storage type of the weights, a torch dtype; None keeps theirs.
        """
        return save_adapter(self.transformer, self.adapter_name, self.config, folder, dtype=dtype)

    def push_to_hub(self, repo_id: str, *, private: bool = False, token: str | None = None) -> CommitInfo:
        """Write the adapter folder and upload it to the Hub as model `repo_id`.

        Raises:
            UserError: the Hub refused, with its reason.
        """
        return push_adapter(self.save_pretrained, repo_id, private=private, token=token)

    def detach(self) -> None:
        """Take hooks and LoRA off; the transformer is as it was before. A second call does nothing.

        Branches can go in any order: what one has frozen is given back with the last of them.
        """
        branches = branches_of(self.transformer)
        if branches.get(self.adapter_name) is not self:
            return
        later = list(branches.values())[list(branches).index(self.adapter_name) + 1 :]
        trainable = trainable_state(self.transformer)
        (later[0]._trainable_before if later else trainable).update(self._trainable_before)
        self._hooks.remove()
        self._state.latest = self._state.pending = None
        del branches[self.adapter_name]
        if not branches:
            delattr(self.transformer, _MARK)
        self._guard_saving()
        remove_lora(self.transformer, self.adapter_name)
        restore_trainable(self.transformer, trainable)

    def _guard_saving(self) -> None:
        """Have the transformer's own saving know the adapters that are on it now."""
        guard_saving(self.transformer, {name: branch.config for name, branch in branches_of(self.transformer).items()})


def branches_of(transformer: Any) -> dict[str, ReferenceBranch]:
    """The branches on `transformer` by their adapters' names, oldest first."""
    return getattr(transformer, _MARK, {})


def living_branches() -> list[ReferenceBranch]:
    """All branches that are on some transformer of this process."""
    return [branch for branch in _living if branches_of(branch.transformer).get(branch.adapter_name) is branch]
