"""`load_adapter`: a text-to-video pipeline and an adapter folder give the family's reference pipeline."""

from __future__ import annotations

import logging
import re
from pathlib import Path
from typing import Any

from ..branch.attach import ADAPTER_NAME, fit_config
from ..branch.lora import active_adapters, remove_lora, restore_trainable, trainable_state
from ..branch.lora_scope import lora_layers
from ..branch.reference_branch import ReferenceBranch, branches_of
from ..branch.switched_on import switched_on
from ..config import RefAlignConfig
from ..errors import UserError, shorten
from ..export.folder import open_adapter
from ..families.base import Family
from ..families.lookup import load_family
from ..media.canvas import fixed_size_problems
from .adapters import switch_on
from .merge import HOOKED, MERGED, merged_into
from .reference_class import build_pipeline
from .weights import check_fits, load_weights, weights_digest

logger = logging.getLogger(__name__)

NAME = re.compile(r"[A-Za-z0-9_-]{1,64}")


def load_adapter(
    pipe: Any,
    source: str | Path,
    adapter_name: str = ADAPTER_NAME,
    *,
    revision: str | None = None,
    token: str | None = None,
    family: str | Family | None = None,
) -> Any:
    """Load a reference adapter onto a text-to-video pipeline.

    The returned pipeline is another object of the family's reference class; no component is copied, cast or moved. So
    the shared transformer changes, and with it what `pipe` generates: the returned pipeline's `changes` tell how, and
    its `unload()` undoes it. Switch offloading on in the returned pipeline, not in `pipe`.

    A base that an adapter was merged into, saved and loaded again, takes that adapter once more, without its LoRA.

    A transformer can carry several reference adapters of any kinds. The one that was loaded last is switched on, those
    before it off; `set_adapters` switches, in any pipeline that shares the transformer.

    Args:
        pipe: a diffusers pipeline of a family's text-to-video class, such as `WanPipeline`, or what `load_adapter`
            returned.
        source: an adapter folder, or a Hub id.
        adapter_name: the LoRA's name in PEFT: letters, digits, _ and -; other LoRAs but reference adapters stay
            switched on as they are.
        revision, token: of the Hub.
        family: of the pipeline's transformer: the object, its key or `package.module:attribute`; None goes by the
            transformer's class. What the adapter says of it is compared and never looked up.

    Returns:
        A `ReferencePipeline` that is of the pipeline's own class too: of a `WanPipeline` a `WanReferencePipeline`.

    Raises:
        UserError: no adapter there but something else (said is what it is and what opens it), one made for another
            base, weights that do not fit or are not finite, anything that no adapter of this package holds, or a
            pipeline that cannot take it. `pipe` is then as it was.
    """
    family = _check_pipeline(pipe, adapter_name, family)
    folder = open_adapter(source, revision=revision, token=token)
    transformer = pipe.transformer
    _, config = fit_config(transformer, folder.config, family)
    check_fits(transformer, family, folder)
    for problem in fixed_size_problems(config.reference_size, _multiples(pipe, family)):
        raise UserError(f"adapter: {problem}")
    _check_beside(transformer, config, adapter_name)
    state = folder.tensors()
    digest = weights_digest(state)
    inside = bool(config.r) and _is_inside(transformer, digest)
    adds = bool(config.r) and not inside
    made = build_pipeline(pipe)
    trainable, active = trainable_state(transformer), active_adapters(transformer)
    older = [branch.adapter_name for branch in switched_on(transformer)]
    try:
        if adds:
            load_weights(transformer, folder, state, adapter_name, pipe)
            switch_on(transformer, [*(name for name in active if name not in older), adapter_name])
        transformer.requires_grad_(False)
        branch = ReferenceBranch(transformer, config, family, adapter_name)
    except BaseException:
        if adds:
            remove_lora(transformer, adapter_name)
        if active:
            transformer.set_adapter(active)
        restore_trainable(transformer, trainable)
        raise
    branch._trainable_before, branch.weights_digest, branch.merged = trainable, digest, inside
    if config.attention == "isolated" and not inside:
        branch.fingerprint()  # while the weights are at hand: sequential offloading takes them away
    made._own, made._switched_off = branch, tuple(older)
    made.changes = _describe_changes(branch, older)
    for change in made.changes:
        logger.info(change)
    return made


def _check_pipeline(pipe: Any, adapter_name: str, family: str | Family | None) -> Family:
    """The family of a pipeline that can take another adapter of this name."""
    import diffusers

    transformer = getattr(pipe, "transformer", None)
    if not isinstance(pipe, diffusers.DiffusionPipeline) or transformer is None:
        raise UserError(f"pipe: expected a diffusers pipeline with a transformer, got {type(pipe).__name__}")
    if hasattr(transformer, "_orig_mod"):
        raise UserError(
            "pipe: its transformer is compiled, which hides its layers; load the adapter first, and compile then, "
            "best with pipe.transformer.compile_repeated_blocks()"
        )
    found = load_family(transformer, family)
    if problem := found.pipeline_problem(pipe):
        raise UserError(problem)
    if found.pipeline_class not in {cls.__name__ for cls in type(pipe).__mro__}:
        raise UserError(f"pipe: expected a {found.pipeline_class}, got {type(pipe).__name__}")
    _check_name(transformer, adapter_name)
    loaded = getattr(transformer, "peft_config", {})
    if merged := [name for name, branch in branches_of(transformer).items() if branch.merged]:
        raise UserError(
            f"pipe: its transformer's weights contain adapter {merged[0]!r} for good; load the base anew for another"
        )
    if adapter_name in branches_of(transformer):
        raise UserError(
            f"adapter_name: a reference adapter {adapter_name!r} is on this transformer already; choose another name, "
            "or call unload() on the pipeline that load_adapter returned, or detach() on the branch"
        )
    if adapter_name in loaded:
        raise UserError(f"adapter_name: {adapter_name!r} is in use on this transformer; choose another")
    if any(layer.merged or layer.disable_adapters for layer in lora_layers(transformer)):
        raise UserError(
            "pipe: its LoRAs are fused or switched off, so that another would do nothing; call unfuse_lora() or "
            "enable_lora() first"
        )
    return found


def _multiples(pipe: Any, family: Family) -> tuple[int, int]:
    """Pixel rows and columns that make one token."""
    _, rows, columns = family.size_multiples(pipe, family.patch_size(pipe.transformer))
    return rows, columns


def _check_beside(transformer: Any, config: RefAlignConfig, adapter_name: str) -> None:
    """Refuse a second reference adapter where one of them cannot be switched off."""
    there = {name: branch.config for name, branch in branches_of(transformer).items()}
    bare = [name for name, other in {**there, adapter_name: config}.items() if other.r == 0]
    if there and bare:
        raise UserError(
            f"pipe: adapter {bare[0]!r} holds no LoRA (r 0) and is on as long as it is loaded, so that no other can "
            f"be beside it; delete_adapters({list(there)}) first"
        )


def _check_name(transformer: Any, name: Any) -> None:
    """Refuse a name by which the LoRA's parameters could not be told from others."""
    if not isinstance(name, str) or not NAME.fullmatch(name):
        raise UserError(f"adapter_name must be letters, digits, _ and - (at most 64), got {shorten(name)}")
    parts = {part for path, _ in transformer.named_modules() for part in path.split(".")}
    known = getattr(transformer, "peft_config", {})
    if name.startswith("lora_") or (name in parts and name not in known):
        raise UserError(f"adapter_name: {name!r} is the name of a part of the transformer; choose another")


def _is_inside(transformer: Any, digest: str) -> bool:
    """Whether this adapter is part of the weights that were loaded, by a merge before they were saved.

    Raises:
        UserError: another one is.
    """
    inside = merged_into(transformer)
    if inside and digest not in inside:
        raise UserError(
            "pipe: another adapter was merged into its transformer's weights before they were saved; load the base "
            "anew for this one"
        )
    return bool(inside)


def _describe_changes(branch: ReferenceBranch, older: list[str]) -> tuple[str, ...]:
    name = branch.adapter_name
    if branch.merged:
        return (MERGED, *HOOKED)
    if branch.config.r == 0:
        return (f"Adapter {name!r} holds no LoRA: the transformer's weights are its base's own.", *HOOKED)
    layers = sum(name in getattr(module, "lora_A", ()) for module in branch.transformer.modules())
    lora = f"The transformer has a LoRA named {name!r} on {layers} layers, switched on"
    if branch.config.lora_scope == "reference":
        effect = f"{lora}, that acts on references alone: without references, videos are what they are without it."
    else:
        effect = (
            f"{lora}: without references too, videos differ from the base's, and so do those of the pipeline given to "
            "load_adapter."
        )
    switched = f"Of the reference adapters, {older} are switched off; set_adapters switches back."
    return (
        effect,
        *([switched] if older else []),
        *HOOKED,
    )
