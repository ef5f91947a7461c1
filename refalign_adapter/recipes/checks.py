"""What is wrong between a recipe's fields, and between the recipe and the machine it is to run on."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import asdict
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from ..config import RefAlignConfig
from ..config_checks import expression_problems
from ..data.sources.manifest import missing_paths, source_problems
from ..errors import ConfigError, UserError
from ..media.sizes import size_problems
from .schema import Recipe

Problem = tuple[tuple[str, ...], str]
"""The fields it is about, and the line that says so."""


def cross_field_problems(recipe: Recipe) -> Iterator[Problem]:
    """What is wrong between fields that are each valid by themselves."""
    yield from _part_problems("adapter", lambda: _checked(recipe.adapter_config()))
    yield from _lora_problems(recipe)
    yield from _part_problems("alignment", recipe.alignment_schedule)
    yield from _optimizer_problems(recipe)
    yield from _length_problems(recipe)
    yield from _memory_problems(recipe)
    yield from _output_problems(recipe)
    yield from _dropout_problems(recipe)
    yield from _source_problems(recipe)


def _part_problems(section: str, build: Callable[[], Any]) -> Iterator[Problem]:
    try:
        build()
    except ConfigError as error:
        yield from (((f"{section}.{line.split()[0]}",), f"{section}.{line}") for line in error.problems)
    except UserError as error:
        yield (section,), f"{section}.{error}"


def _checked(config: RefAlignConfig) -> None:
    if problems := list(expression_problems(vars(config))):
        raise ConfigError(problems)


def _lora_problems(recipe: Recipe) -> Iterator[Problem]:
    if recipe.adapter.r == 0:
        yield (
            ("adapter.r",),
            "adapter.r must be at least 1 to train, got 0: an adapter without LoRA has nothing to train; it is for a "
            "base that was trained whole",
        )


def _dropout_problems(recipe: Recipe) -> Iterator[Problem]:
    shares = asdict(recipe.dropout_shares())
    if (total := sum(shares.values())) > 1:
        listed = " + ".join(f"{name} {share}" for name, share in shares.items())
        yield ("dropout",), f"dropout: the shares must sum to at most 1, got {listed} = {total:g}"
    for name in ("references", "both") if recipe.adapter.without_references_is_base else ():
        if shares[name]:
            yield (
                (f"dropout.{name}", "adapter.lora_scope", "adapter.null_reference"),
                f"dropout.{name} must be 0 with adapter.lora_scope='reference', got {shares[name]}; leave it out: "
                "without references that LoRA is the base itself, and the step would train nothing",
            )


def _source_problems(recipe: Recipe) -> Iterator[Problem]:
    if recipe.data.buckets is not None:
        yield from ((("data.buckets",), line) for line in size_problems(recipe.data.buckets, "data.buckets"))
    for name, value in _sources(recipe):
        yield from (((name,), line) for line in source_problems(value, name))


def _sources(recipe: Recipe) -> Iterator[tuple[str, Any]]:
    """(field, value) of the sources that are given."""
    for name in ("train_data", "validation_data"):
        if (value := getattr(recipe.data, name)) is not None:
            yield f"data.{name}", value


def _optimizer_problems(recipe: Recipe) -> Iterator[Problem]:
    if find_spec("bitsandbytes") is not None:  # without it, names cannot be told; `machine_problems` says so
        yield from _unknown_optimizer(recipe)
    if recipe.lr_warmup_steps and recipe.lr_scheduler == "constant":
        yield (
            ("lr_warmup_steps", "lr_scheduler"),
            f"lr_warmup_steps is {recipe.lr_warmup_steps}, but lr_scheduler 'constant' has no warm-up; "
            "use constant_with_warmup",
        )


def _length_problems(recipe: Recipe) -> Iterator[Problem]:
    rises = {"lr_warmup_steps": recipe.lr_warmup_steps, "alignment.warmup_steps": recipe.alignment.warmup_steps}
    for name, steps in rises.items():
        if steps > recipe.max_train_steps:
            yield (
                (name, "max_train_steps"),
                f"{name} is {steps}, beyond max_train_steps ({recipe.max_train_steps}): the run would end while it "
                "rises; lower it",
            )


def _memory_problems(recipe: Recipe) -> Iterator[Problem]:
    if recipe.offload_activations and not recipe.gradient_checkpointing:
        yield (
            ("offload_activations", "gradient_checkpointing"),
            "offload_activations needs gradient_checkpointing=true, got false; set that too, or leave it out",
        )


def _output_problems(recipe: Recipe) -> Iterator[Problem]:
    data = recipe.data
    if recipe.validation_steps and not data.validation_data and not data.validation_rows:
        yield (
            ("validation_steps", "data.validation_data", "data.validation_rows"),
            f"validation_steps is {recipe.validation_steps}, but there are no held-out rows; "
            "set data.validation_data or data.validation_rows",
        )
    if recipe.sample_steps and not recipe.sample_prompts:
        yield (
            ("sample_steps", "sample_prompts"),
            f"sample_steps is {recipe.sample_steps}, but sample_prompts is empty; list what to make",
        )
    if recipe.sample_steps:
        yield from _sample_problems(recipe)
    if recipe.push_to_hub and not recipe.hub_model_id:
        yield ("hub_model_id", "push_to_hub"), "hub_model_id must be set with push_to_hub, got null; give user/name"


def _sample_problems(recipe: Recipe) -> Iterator[Problem]:
    """What the pipeline would refuse at the first sampling, hours into the run."""
    if not any(sample.references for sample in recipe.sample_prompts):
        return
    from ..pipelines.base import MAX_REFERENCES  # takes diffusers to import

    for index, sample in enumerate(recipe.sample_prompts):
        if (count := len(sample.references)) > MAX_REFERENCES:
            field = f"sample_prompts.{index}.references"
            yield (field,), f"{field}: {count} images are too many, at most {MAX_REFERENCES}; leave some out"


def _unknown_optimizer(recipe: Recipe) -> Iterator[Problem]:
    from .optimizers import find_optimizer

    try:
        find_optimizer(recipe.optimizer)
    except UserError as error:
        yield ("optimizer",), str(error)


def machine_problems(recipe: Recipe) -> Iterator[Problem]:
    """Files and packages that training needs and that are not there."""
    if find_spec("bitsandbytes") is None:
        yield from _unknown_optimizer(recipe)
    yield from _tracker_problems(recipe)
    resume = recipe.resume_from_checkpoint
    if resume and resume != "latest" and not Path(resume).is_dir():
        yield (
            ("resume_from_checkpoint",),
            f"resume_from_checkpoint must be 'latest' or a checkpoint's folder, got {resume!r}, which does not exist",
        )
    for name, value in _sources(recipe):
        for path in [] if list(source_problems(value)) else missing_paths(value):
            yield (name,), f"{name}: {path!r} does not exist"
    for index, sample in enumerate(recipe.sample_prompts if recipe.sample_steps else []):
        for path in sample.references:
            if not Path(path).is_file():
                field = f"sample_prompts.{index}.references"
                yield (field,), f"{field}: image {path!r} does not exist"


def _tracker_problems(recipe: Recipe) -> Iterator[Problem]:
    from accelerate.tracking import LOGGER_TYPE_TO_CLASS, get_available_trackers

    for name in recipe.trackers:
        if name not in LOGGER_TYPE_TO_CLASS:
            yield ("report_to",), f"report_to must be among {', '.join(sorted(LOGGER_TYPE_TO_CLASS))}, got {name!r}"
        elif name not in map(str, get_available_trackers()):
            package = "'refalign-adapter[train]'" if name == "tensorboard" else name
            yield ("report_to",), f"report_to: {name} is not installed; pip install {package}, or set report_to=null"
