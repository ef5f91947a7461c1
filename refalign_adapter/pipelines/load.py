"""`load_adapter`: a text-to-video pipeline and an adapter folder give the family's reference pipeline."""

from __future__ import annotations

import inspect
import logging
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from ..branch.attach import ADAPTER_NAME, ReferenceBranch, branch_of, fit_config
from ..branch.lora import active_adapters, remove_lora, restore_trainable
from ..config import RefAlignConfig
from ..errors import UserError
from ..export.adapter import find_adapter, load_weights
from ..families.base import Family, load_family
from .weights import check_scale, check_weights

logger = logging.getLogger(__name__)


def load_adapter(
    pipe: Any,
    source: str | Path,
    adapter_name: str = ADAPTER_NAME,
    *,
    revision: str | None = None,
    token: str | None = None,
) -> Any:
    """Load a reference adapter onto a text-to-video pipeline.

    The returned pipeline is another object of the family's reference class; no component is copied, cast or moved. So
    the shared transformer changes, and with it what `pipe` generates: the returned pipeline's `changes` tell how, and
    its `unload()` undoes it. Switch offloading on in the returned pipeline, not in `pipe`.

    Args:
        pipe: a diffusers pipeline of a family's text-to-video class, such as `WanPipeline`.
        source: an adapter folder, or a Hub id.
        adapter_name: the LoRA's name in PEFT; other LoRAs stay loaded and switched on as they are.
        revision, token: of the Hub.

    Returns:
        A `ReferencePipeline`, for Wan a `WanReferencePipeline`.

    Raises:
        UserError: no adapter there, a pickle, one made for another base, weights that do not fit, or a pipeline that
            cannot take it. `pipe` is then as it was.
    """
    family, pipeline_class = _check_pipeline(pipe, adapter_name)
    folder = find_adapter(source, revision=revision, token=token)
    transformer = pipe.transformer
    _, config = fit_config(transformer, RefAlignConfig.load(folder))
    check_weights(transformer, folder, config)
    others = active_adapters(transformer)
    trainable = frozenset(name for name, parameter in transformer.named_parameters() if parameter.requires_grad)
    try:
        load_weights(transformer, folder, adapter_name, pipe)
        check_scale(transformer, folder, adapter_name, config)
        if others:
            transformer.set_adapter([*others, adapter_name])
        restore_trainable(transformer, set())
        made = _share_components(pipeline_class, pipe)
    except BaseException:
        remove_lora(transformer, adapter_name)
        restore_trainable(transformer, set(trainable))
        raise
    made.branch = ReferenceBranch(transformer, config, family, adapter_name)
    made._trainable_before = trainable
    made.changes = _describe_changes(transformer, adapter_name)
    for change in made.changes:
        logger.info(change)
    return made


def _check_pipeline(pipe: Any, adapter_name: str) -> tuple[Family, type]:
    """The family and its reference pipeline class."""
    import diffusers
    from peft.tuners.tuners_utils import BaseTunerLayer

    transformer = getattr(pipe, "transformer", None)
    if not isinstance(pipe, diffusers.DiffusionPipeline) or transformer is None:
        raise UserError(f"pipe: expected a diffusers pipeline with a transformer, got {type(pipe).__name__}")
    family = load_family(transformer)
    if problem := family.pipeline_problem(pipe):
        raise UserError(problem)
    if not isinstance(pipe, getattr(diffusers, family.pipeline_class)):
        raise UserError(f"pipe: expected a {family.pipeline_class}, got {type(pipe).__name__}")
    if branch_of(transformer) is not None:
        raise UserError(
            "pipe: its transformer carries a reference adapter already; call unload() on the pipeline that "
            "load_adapter returned, or detach() on the branch"
        )
    if adapter_name in getattr(transformer, "peft_config", {}):
        raise UserError(f"adapter_name: {adapter_name!r} is in use on this transformer; choose another")
    layers = [module for module in transformer.modules() if isinstance(module, BaseTunerLayer)]
    if any(layer.merged or layer.disable_adapters for layer in layers):
        raise UserError(
            "pipe: its LoRAs are fused or switched off, so that another would do nothing; call unfuse_lora() or "
            "enable_lora() first"
        )
    return family, _reference_class(family)


def _reference_class(family: Family) -> type:
    if find_spec(f"{__package__}.{family.key}") is None:
        raise UserError(
            f"pipe: there is no reference pipeline for {family.key!r}; use attach() and branch.references()"
        )
    return import_module(f"{__package__}.{family.key}").PIPELINE


def _share_components(pipeline_class: type, pipe: Any) -> Any:
    """The same components and settings in another class. diffusers' `from_pipe` would cast them to float32."""
    components = pipe.components
    names = inspect.signature(pipeline_class.__init__).parameters
    settings = {name: pipe.config[name] for name in names if name in pipe.config and name not in components}
    return pipeline_class(**components, **settings)


def _describe_changes(transformer: Any, adapter_name: str) -> tuple[str, ...]:
    layers = sum(adapter_name in getattr(module, "lora_A", ()) for module in transformer.modules())
    return (
        f"The transformer has a LoRA named {adapter_name!r} on {layers} layers, switched on: without references too, "
        "videos differ from the base's, and so do those of the pipeline given to load_adapter.",
        "The transformer has hooks that let references in; they do nothing without references.",
        "The transformer's parameters are frozen.",
    )
