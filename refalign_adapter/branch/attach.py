"""`attach`: a frozen DiT gets a LoRA and takes references; `detach` leaves it as it was.

Shape letters: B batch, C latent channels, M references, h and w latent height and width, N tokens per reference.
"""

from __future__ import annotations

import dataclasses
import weakref
from collections.abc import Iterator
from contextlib import AbstractContextManager
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from ..config import RefAlignConfig
from ..errors import UserError, shorten
from ..export.adapter import save_adapter
from ..export.formats import require_scope_all
from ..export.hub import push_adapter
from ..families.base import Family
from ..families.lookup import load_family
from .attention import ReferenceAttention
from .fingerprint import Fingerprint
from .isolated import IsolatedAttention
from .joint import JointAttention
from .lora import active_adapters, add_lora, lora_parameters, remove_lora, restore_trainable, trainable_state
from .lora_scope import LoraScope, dead_layers, lora_layers
from .reference_cache import ReferenceCache
from .state import BranchState, prepare_references

if TYPE_CHECKING:
    from huggingface_hub import CommitInfo

ADAPTER_NAME = "refalign"
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
        _guard_saving(transformer)

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
        self._check_not_fused_over()
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
        self._check_not_fused_over()
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

    def _check_not_fused_over(self) -> None:
        """Refuse references while another LoRA is fused into the layers: PEFT then passes over this one."""
        for layer in lora_layers(self.transformer):
            if self.adapter_name in layer.lora_A and layer.merged and self.adapter_name not in layer.merged_adapters:
                raise UserError(
                    f"references: adapter {self.adapter_name!r} does not act while {list(layer.merged_adapters)} are "
                    "fused into its layers; call unfuse_lora(), or use references that were encoded before"
                )

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
        _guard_saving(self.transformer)
        remove_lora(self.transformer, self.adapter_name)
        restore_trainable(self.transformer, trainable)


def branches_of(transformer: Any) -> dict[str, ReferenceBranch]:
    """The branches on `transformer` by their adapters' names, oldest first."""
    return getattr(transformer, _MARK, {})


def living_branches() -> list[ReferenceBranch]:
    """All branches that are on some transformer of this process."""
    return [branch for branch in _living if branches_of(branch.transformer).get(branch.adapter_name) is branch]


def _guard_saving(transformer: Any) -> None:
    """While an adapter for references alone is there, its `save_lora_adapter` refuses to write that one.

    It is diffusers' own, and what it writes is applied to all tokens by whoever reads it.
    """
    transformer.__dict__.pop("save_lora_adapter", None)
    if any(branch.config.lora_scope != "all" for branch in branches_of(transformer).values()):
        transformer.save_lora_adapter = partial(_save_lora_adapter, transformer)


def _save_lora_adapter(transformer: Any, save_directory: Any, adapter_name: str = "default", **options: Any) -> None:
    branch = branches_of(transformer).get(adapter_name)
    if branch is not None:
        require_scope_all(branch.config, "save_lora_adapter")
    type(transformer).save_lora_adapter(transformer, save_directory, adapter_name, **options)


def switched_on(transformer: Any) -> list[ReferenceBranch]:
    """The branches whose adapters act, as `set_adapters` chooses, or are merged into the weights; oldest first."""
    active = active_adapters(transformer)
    return [branch for name, branch in branches_of(transformer).items() if name in active or branch.always_on]


def branch_of(transformer: Any) -> ReferenceBranch | None:
    """The branch whose adapter is switched on, as `set_adapters` chooses; None without one.

    Raises:
        UserError: several are switched on.
    """
    found = switched_on(transformer)
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
    family: str | Family | None = None,
    seed: int | None = None,
) -> ReferenceBranch:
    """Freeze a DiT and give it a trainable reference branch.

    No forward is replaced: LoRA by PEFT, references and features by hooks. The update starts at zero, so that without
    references the output is the base's own. With r 0 there is no LoRA and nothing to train: for a base that was
    trained whole.

    Args:
        transformer: any DiT that a family knows, on any device (meta included).
        config: what the adapter is; None takes the defaults.
        adapter_name: the LoRA's name in PEFT.
        family: of the transformer: the object, its key or `package.module:attribute`; None goes by the transformer's
            class, see `load_family`.
        seed: of the LoRA's initial weights; None draws from torch's global generator.

    Raises:
        UserError: a model no family knows, one that has a branch already, or a config that does not fit it.
    """
    if branches_of(transformer):
        raise UserError("this transformer has a reference branch already; detach it first")
    found, config = fit_config(transformer, config or RefAlignConfig(), family)
    before = trainable_state(transformer)
    excluded: list[str] = []
    if config.lora_scope == "reference":
        excluded = dead_layers(transformer, found, config.align_blocks(len(found.blocks(transformer))))
    if config.r == 0:
        transformer.requires_grad_(False)
    else:
        add_lora(transformer, config, adapter_name, seed, excluded)
    branch = ReferenceBranch(transformer, config, found, adapter_name)
    branch._trainable_before = before
    return branch


def fit_config(
    transformer: Any, config: RefAlignConfig, family: str | Family | None = None
) -> tuple[Family, RefAlignConfig]:
    """Find the family and fill in what it decides: `base` and `target_modules`.

    Raises:
        UserError: a model no family knows, or a config that does not fit it.
    """
    found = load_family(transformer, family)
    config.align_blocks(len(found.blocks(transformer)))
    if config.max_sequence_length > found.max_text_tokens:
        raise UserError(
            f"adapter: max_sequence_length must be at most {found.max_text_tokens}, the longest prompt of "
            f"the base, got {config.max_sequence_length}"
        )
    base = found.describe(transformer)
    if config.base and config.base != base:
        differences = [
            f"{shorten(name)[1:-1]} {shorten(config.base.get(name))}, this one has {base.get(name)!r}"
            for name in sorted({*config.base, *base})
            if config.base.get(name) != base.get(name)
        ]
        made_for = f" ({shorten(config.base_model)[1:-1]})" if config.base_model else ""
        raise UserError(f"adapter: made for another base{made_for}: it has {'; '.join(differences)}")
    modules = config.target_modules
    if modules is None and config.r:
        modules = tuple(found.target_modules(transformer))
    return found, dataclasses.replace(config, base=base, target_modules=modules)
