"""A pipeline's reference adapters by name: which one references go by, switching, taking off.

They are the transformer's, which pipelines share: what one of them switches, all of them see.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from diffusers import __version__ as diffusers_version
from packaging.version import Version

from ..branch.lora import active_adapters, remove_lora, restore_trainable, trainable_state
from ..branch.reference_branch import ReferenceBranch, branches_of
from ..branch.switched_on import branch_of, switched_on
from ..errors import UserError
from .exporting import check_exportable
from .fusing import check_fusible, is_merged, remember_strengths, restore_strengths

WEIGHS_ANY_MODEL = Version("0.38")


class NamedAdapters:
    """Mixed into a diffusers pipeline class, in front of it: its LoRA methods, aware of reference adapters.

    Attributes:
        changes: what loading changed in the shared components, one sentence each; empty once unloaded.
    """

    transformer: Any
    changes: tuple[str, ...] = ()
    _own: ReferenceBranch | None = None
    _switched_off: tuple[str, ...] = ()

    @property
    def branch(self) -> ReferenceBranch | None:
        """The reference adapter that is switched on, by which references go; None when none is.

        Raises:
            UserError: several are.
        """
        return branch_of(self.transformer)

    def _loaded_branch(self) -> ReferenceBranch:
        """One that is switched on, or else any: for what does not depend on which it is."""
        branches = [*switched_on(self.transformer), *branches_of(self.transformer).values()]
        if not branches:
            raise UserError("pipe: no reference adapter is loaded (any more); call load_adapter(pipe, ...)")
        return branches[0]

    def _reference_branch(self) -> ReferenceBranch:
        """The one by which references go.

        Raises:
            UserError: not exactly one is switched on.
        """
        some, branch = self._loaded_branch(), self.branch
        if branch is None:
            names = [*active_adapters(self.transformer), some.adapter_name]
            raise UserError(
                f"references: of the reference adapters {list(branches_of(self.transformer))} none is switched on; "
                f"call set_adapters({names!r}), or leave references out"
            )
        branch.check_switched_on()
        return branch

    def set_adapters(self, adapter_names: str | Sequence[str], adapter_weights: Any = None) -> None:
        """Switch on these adapters at these weights, all others off; as in diffusers.

        The weight of a reference adapter with lora_scope "reference" scales what the LoRA does to references.

        Args:
            adapter_names: one or several, with at most one reference adapter where references are to be given.
            adapter_weights: one for all, or one each; None: 1.
        """
        names = [adapter_names] if isinstance(adapter_names, str) else list(adapter_names)
        bare = [name for name, branch in branches_of(self.transformer).items() if branch.config.r == 0]
        if given := [name for name in bare if name in names]:
            raise UserError(
                f"set_adapters: {given[0]!r} holds no LoRA (r 0): it has no weight and is on as long as it is loaded; "
                "leave it out"
            )
        _let_weigh(type(self.transformer).__name__)
        with _trainable_kept(self.transformer):
            super().set_adapters(adapter_names, adapter_weights)  # type: ignore[misc]  # of diffusers' LoRA mixin

    def delete_adapters(self, adapter_names: str | Sequence[str]) -> None:
        """Take adapters off, reference adapters with their hooks; the others are on or off as before.

        Args:
            adapter_names: one or several; names that are not there are passed over, as in diffusers.
        """
        names = [adapter_names] if isinstance(adapter_names, str) else list(adapter_names)
        for name in names:
            if name not in branches_of(self.transformer) and is_merged(self.transformer, name):
                raise UserError(
                    f"delete_adapters: {name!r} is fused into the transformer's weights and would stay there; call "
                    "unfuse_lora() first"
                )
        for name in names:
            if (branch := branches_of(self.transformer).get(name)) is not None:
                self._take_off(branch)
            elif name in getattr(self.transformer, "peft_config", {}):
                with _trainable_kept(self.transformer):
                    remove_lora(self.transformer, name)
        if self._own is None or self._own.adapter_name in names:
            self.changes = ()
        super().delete_adapters(names)  # type: ignore[misc]  # those of other components

    def unload_lora_weights(self) -> None:
        """Take all LoRAs off the transformer, reference adapters with their hooks."""
        for branch in list(branches_of(self.transformer).values()):
            self._take_off(branch)
        self.changes = ()
        super().unload_lora_weights()  # type: ignore[misc]  # of diffusers' LoRA mixin

    def unload(self) -> None:
        """Take off what `load_adapter` put on the shared transformer: the pipeline given to it is as it was before.

        Reference adapters that loading had switched off are on again; adapters that were loaded later stay. Bit by
        bit, unless LoRAs were fused in between, which rounds. After `merge_and_unload` only the hooks are taken off,
        as the base's own weights are gone. A second call does nothing.
        """
        own, self._own, self.changes = self._own, None, ()
        if own is None or branches_of(own.transformer).get(own.adapter_name) is not own:
            return
        was_on = own in switched_on(own.transformer)
        self._take_off(own)
        before = [name for name in self._switched_off if name in branches_of(own.transformer)]
        if was_on and before and not switched_on(own.transformer):
            switch_on(own.transformer, [*active_adapters(own.transformer), *before])

    def _take_off(self, branch: ReferenceBranch) -> None:
        if is_merged(branch.transformer, branch.adapter_name):
            self.unfuse_lora()  # type: ignore[attr-defined]  # of diffusers' LoRA mixin
        branch.detach()

    @classmethod
    def save_lora_weights(
        cls, save_directory: Any, transformer_lora_layers: Any = None, *args: Any, **kwargs: Any
    ) -> None:
        """Write LoRA weights for stock loaders; as in diffusers.

        Raises:
            UserError: they are those of an adapter that acts on references alone, which stock loaders would apply to
                video tokens too.
        """
        check_exportable(transformer_lora_layers, "save_lora_weights")
        super().save_lora_weights(save_directory, transformer_lora_layers, *args, **kwargs)  # type: ignore[misc]

    def fuse_lora(
        self,
        components: Any = ("transformer",),
        lora_scale: float = 1.0,
        safe_fusing: bool = False,
        adapter_names: Any = None,
        **kwargs: Any,
    ) -> None:
        """Add LoRAs to the weights, to be taken out again by `unfuse_lora`; as in diffusers.

        Raises:
            UserError: one of them acts on references alone, or references would not be what they are without it.
        """
        names = [adapter_names] if isinstance(adapter_names, str) else adapter_names
        check_fusible(self.transformer, names)
        remember_strengths(self.transformer)
        super().fuse_lora(  # type: ignore[misc]  # of diffusers' LoRA mixin
            list(components), lora_scale=lora_scale, safe_fusing=safe_fusing, adapter_names=names, **kwargs
        )

    def unfuse_lora(self, components: Any = ("transformer",), **kwargs: Any) -> None:
        """Take fused LoRAs out of the weights; each acts at the strength it had before, whatever `lora_scale` was."""
        super().unfuse_lora(list(components), **kwargs)  # type: ignore[misc]  # of diffusers' LoRA mixin
        restore_strengths(self.transformer)


def switch_on(transformer: Any, names: Sequence[str]) -> None:
    """Have exactly these LoRAs act, each at the strength it has; no parameter becomes trainable by it."""
    with _trainable_kept(transformer):
        transformer.set_adapter(list(names))


def _let_weigh(model_class: str) -> None:
    """Enter a model class that is not diffusers' own, a plug-in's, in the table by which old versions spread weights
    out over blocks; they fail at classes that are not in it, where later ones take the weights as they are.
    """
    if Version(diffusers_version) < WEIGHS_ANY_MODEL:
        from diffusers.loaders import peft

        table: Any = peft._SET_ADAPTER_SCALE_FN_MAPPING
        table.setdefault(model_class, lambda _, weights: weights)


@contextmanager
def _trainable_kept(transformer: Any) -> Iterator[None]:
    """Undo what PEFT does to `requires_grad` when it switches."""
    before = trainable_state(transformer)
    try:
        yield
    finally:
        restore_trainable(transformer, before)
