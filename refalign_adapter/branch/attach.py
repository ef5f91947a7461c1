"""`attach`: a frozen DiT gets a LoRA and takes references; `detach` leaves it as it was.

Shape letters: B batch, C latent channels, M references, h and w latent height and width, N tokens per reference.
"""

from __future__ import annotations

import dataclasses
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
from ..families.base import Family, load_family
from .attention import ReferenceAttention
from .fingerprint import Fingerprint
from .isolated import IsolatedAttention
from .joint import JointAttention
from .lora import active_adapters, add_lora, lora_parameters, remove_lora, restore_trainable
from .lora_scope import LoraScope, check_switched_on, dead_layers
from .reference_cache import ReferenceCache
from .state import BranchState, prepare_references

if TYPE_CHECKING:
    from huggingface_hub import CommitInfo

ADAPTER_NAME = "refalign"
_MARK = "_refalign_branches"


class ReferenceBranch:
    """References into a transformer and features out of it. Made by `attach` or `load_adapter`.

    Attributes:
        transformer: the DiT, unchanged but for hooks and LoRA.
        config: what the adapter is, with `base` and `target_modules` filled in.
        family: the DiT's family.
        adapter_name: the LoRA's name in PEFT.
        align_blocks: indices of the blocks whose reference tokens are captured.
    """

    def __init__(self, transformer: Any, config: RefAlignConfig, family: Family, adapter_name: str):
        self.transformer = transformer
        self.config = config
        self.family = family
        self.adapter_name = adapter_name
        self.align_blocks = config.align_blocks(len(family.blocks(transformer)))
        self._trainable_before: set[str] = set()
        self._state = BranchState()
        self._fingerprint = Fingerprint(transformer, adapter_name, config)
        self._hooks = self._build_hooks()
        transformer.__dict__.setdefault(_MARK, {})[adapter_name] = self

    def _build_hooks(self) -> ReferenceAttention:
        scope = LoraScope(self.adapter_name, self.config.lora_scope == "reference")
        common = (self.transformer, self.family, self._state, scope, self.align_blocks)
        if self.config.attention == "isolated":
            return IsolatedAttention(*common, reference_frame=self.config.reference_frame)
        return JointAttention(*common)

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
        check_switched_on(self.transformer, self.adapter_name)
        if isinstance(latents, ReferenceCache):
            return self._state.waiting(self._check_cache(latents))
        return self._state.waiting(prepare_references(latents, mask, tokens))

    @torch.no_grad()
    def encode_references(
        self, latents: Tensor, mask: Tensor | None = None, tokens: Tensor | None = None, *, frames: int
    ) -> ReferenceCache | None:
        """Run references once, for any number of calls inside `references(cache)` (isolated attention).

        Args:
            latents, mask, tokens: as in `references`.
            frames: latent frames of the videos.

        Returns:
            Keys and values on the transformer's device; None when no reference is real.

        Raises:
            UserError: shapes that do not fit, joint attention, or an adapter that is switched off.
        """
        check_switched_on(self.transformer, self.adapter_name)
        references = prepare_references(latents, mask, tokens)
        if references is None:
            return None
        with self._state.waiting(None):
            cache = self._hooks.cache(references, frames // self._hooks.patch_size[0])
        return dataclasses.replace(cache, adapter=self._fingerprint(), adapter_name=self.adapter_name)

    def _check_cache(self, cache: ReferenceCache) -> ReferenceCache:
        """Refuse keys and values that another adapter or base would read wrongly."""
        blocks = len(self.family.blocks(self.transformer))
        if self.config.attention != "isolated":
            raise UserError("references: joint attention reads no cached references; give it latents")
        if len(cache.keys) != blocks or cache.keys[0].shape[2:].numel() != self.family.hidden_size(self.transformer):
            raise UserError("references: cached with another base; encode them again")
        if cache.adapter != self._fingerprint():
            raise UserError(
                f"references: cached with adapter {cache.adapter_name!r} of other weights or another strength; encode "
                f"them again with {self.adapter_name!r}"
            )
        return cache

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
        latest = self._state.latest
        if latest is None or latest.references is None:
            return {}
        references, features = latest.references, latest.features
        if latest.writes:
            features = {index: references.of_all(tokens) for index, tokens in features.items()}
        return {index: references.restore(tokens) for index, tokens in features.items()}

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
        """Take hooks and LoRA off; the transformer is as it was before. A second call does nothing."""
        branches = branches_of(self.transformer)
        if branches.get(self.adapter_name) is not self:
            return
        self._hooks.remove()
        self._state.latest = self._state.pending = None
        del branches[self.adapter_name]
        if not branches:
            delattr(self.transformer, _MARK)
        remove_lora(self.transformer, self.adapter_name)
        restore_trainable(self.transformer, self._trainable_before)


def branches_of(transformer: Any) -> dict[str, ReferenceBranch]:
    """The branches on `transformer` by their adapters' names, oldest first."""
    return getattr(transformer, _MARK, {})


def branch_of(transformer: Any) -> ReferenceBranch | None:
    """The branch whose adapter is switched on, as `set_adapters` chooses; None without one.

    Raises:
        UserError: several are switched on.
    """
    branches = branches_of(transformer)
    if getattr(transformer, "peft_config", None):
        switched_on = [branches[name] for name in active_adapters(transformer) if name in branches]
        merged = [branch for name, branch in branches.items() if name not in transformer.peft_config]
        found = [*switched_on, *merged]
    else:
        found = list(branches.values())
    if len(found) > 1:
        names = [branch.adapter_name for branch in found]
        raise UserError(
            f"references: the reference adapters {names} are all switched on; choose one with set_adapters, such as "
            f"set_adapters({names[0]!r})"
        )
    return found[0] if found else None


def attach(
    transformer: Any,
    config: RefAlignConfig | None = None,
    *,
    adapter_name: str = ADAPTER_NAME,
    family: str | None = None,
    seed: int | None = None,
) -> ReferenceBranch:
    """Freeze a DiT and give it a trainable reference branch.

    No forward is replaced: LoRA by PEFT, references and features by hooks. The update starts at zero, so that without
    references the output is the base's own.

    Args:
        transformer: any DiT that `families/` knows, on any device (meta included).
        config: what the adapter is; None takes the defaults.
        adapter_name: the LoRA's name in PEFT.
        family: a family's key or `package.module:attribute`; None looks at the transformer.
        seed: of the LoRA's initial weights; None draws from torch's global generator.

    Raises:
        UserError: a model no family knows, one that has a branch already, or a config that does not fit it.
    """
    if branches_of(transformer):
        raise UserError("this transformer has a reference branch already; detach it first")
    found, config = fit_config(transformer, config or RefAlignConfig(), family)
    before = {name for name, parameter in transformer.named_parameters() if parameter.requires_grad}
    excluded: list[str] = []
    if config.lora_scope == "reference":
        excluded = dead_layers(transformer, found, config.align_blocks(len(found.blocks(transformer))))
    add_lora(transformer, config, adapter_name, seed, excluded)
    branch = ReferenceBranch(transformer, config, found, adapter_name)
    branch._trainable_before = before
    return branch


def fit_config(transformer: Any, config: RefAlignConfig, family: str | None = None) -> tuple[Family, RefAlignConfig]:
    """Find the family and fill in what it decides: `base` and `target_modules`.

    Raises:
        UserError: a model no family knows, or a config that does not fit it.
    """
    found = load_family(transformer, family)
    config.align_blocks(len(found.blocks(transformer)))
    base = found.describe(transformer)
    if config.base and config.base != base:
        differences = [
            f"{name} {config.base.get(name)!r}, this one has {base.get(name)!r}"
            for name in sorted({*config.base, *base})
            if config.base.get(name) != base.get(name)
        ]
        made_for = f" ({config.base_model})" if config.base_model else ""
        raise UserError(f"adapter: made for another base{made_for}: it has {'; '.join(differences)}")
    modules = config.target_modules if config.target_modules is not None else tuple(found.target_modules(transformer))
    return found, dataclasses.replace(config, base=base, target_modules=modules)
