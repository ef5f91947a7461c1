"""`attach`: a frozen DiT gets a LoRA and takes references; `detach` leaves it as it was.

Shape letters: B batch, C latent channels, M references, h and w latent height and width, N tokens per reference.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from contextlib import AbstractContextManager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from torch import Tensor, nn

from ..config import RefAlignConfig
from ..errors import UserError
from ..export.adapter import save_adapter
from ..export.hub import push_adapter
from ..families.base import Family, load_family
from .joint import JointAttention
from .lora import add_lora, lora_parameters, remove_lora, restore_trainable
from .state import BranchState, prepare_references

if TYPE_CHECKING:
    from huggingface_hub import CommitInfo

ADAPTER_NAME = "refalign"
_ATTENTIONS = {"joint": JointAttention}
_MARK = "_refalign_branch"


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
        self._hooks = _ATTENTIONS[config.attention](transformer, family, self._state, self.align_blocks)
        setattr(transformer, _MARK, self)

    def references(self, latents: Tensor | None, mask: Tensor | None = None) -> AbstractContextManager[None]:
        """Have references ride along with every call of the transformer inside the context.

        Args:
            latents: (B, C, M, h, w) normalised latents of M references, on the video's canvas with joint attention;
                None or M = 0 runs without references.
            mask: (B, M) bool, True where a reference is real; None: all are.

        Raises:
            UserError: shapes that do not fit.
        """
        return self._state.waiting(None if latents is None else prepare_references(latents, mask))

    @property
    def capture(self) -> bool:
        """Whether calls keep the reference tokens of the aligned blocks in `features`."""
        return self._state.capture

    @capture.setter
    def capture(self, value: bool) -> None:
        self._state.capture = bool(value)

    @property
    def features(self) -> dict[int, Tensor]:
        """Block index -> (B, M, N, dim) reference tokens after that block, from the latest call; zero where padded."""
        latest = self._state.latest
        if latest is None or latest.references is None:
            return {}
        return {index: latest.references.restore(tokens) for index, tokens in latest.features.items()}

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
        if getattr(self.transformer, _MARK, None) is not self:
            return
        self._hooks.remove()
        self._state.latest = self._state.pending = None
        delattr(self.transformer, _MARK)
        remove_lora(self.transformer, self.adapter_name)
        restore_trainable(self.transformer, self._trainable_before)


def branch_of(transformer: Any) -> ReferenceBranch | None:
    """The branch on `transformer`, or None."""
    return getattr(transformer, _MARK, None)


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
    found, config = fit_config(transformer, config or RefAlignConfig(), family)
    before = {name for name, parameter in transformer.named_parameters() if parameter.requires_grad}
    add_lora(transformer, config, adapter_name, seed)
    branch = ReferenceBranch(transformer, config, found, adapter_name)
    branch._trainable_before = before
    return branch


def fit_config(transformer: Any, config: RefAlignConfig, family: str | None = None) -> tuple[Family, RefAlignConfig]:
    """Find the family and fill in what it decides: `base` and `target_modules`.

    Raises:
        UserError: a model no family knows, one that has a branch already, or a config that does not fit it.
    """
    found = load_family(transformer, family)
    if branch_of(transformer) is not None:
        raise UserError("this transformer has a reference branch already; detach it first")
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
