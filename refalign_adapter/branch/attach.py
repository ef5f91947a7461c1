"""`attach`: a frozen DiT gets a LoRA and takes references; the branch's `detach` leaves it as it was."""

from __future__ import annotations

import dataclasses
from typing import Any

from ..config import RefAlignConfig
from ..errors import UserError, shorten
from ..families.base import Family
from ..families.lookup import load_family
from .lora import add_lora, trainable_state
from .lora_scope import dead_layers
from .reference_branch import ReferenceBranch, branches_of

ADAPTER_NAME = "refalign"


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
