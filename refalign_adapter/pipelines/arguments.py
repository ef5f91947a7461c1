"""A call's arguments, looked at before any model runs: what is wrong is told in lines, all numbers at once.

Shape letters: P prompts, B prompts times videos per prompt, S text tokens, D text width.
"""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from ..errors import ConfigError, UserError, one_line, shorten

OUTPUT_TYPES = ("np", "pt", "pil", "latent")
COUNTS = ("num_inference_steps", "num_videos_per_prompt", "max_sequence_length")
EMBEDS = ("prompt_embeds", "negative_prompt_embeds")


def count_prompts(arguments: Mapping[str, Any]) -> int:
    """P, of a call's arguments.

    Raises:
        UserError: neither texts nor embeddings, or both, or none of the right kind.
    """
    prompt, embeds = arguments.get("prompt"), arguments.get("prompt_embeds")
    if embeds is not None:
        if prompt is not None:
            raise UserError("prompt: give either texts or prompt_embeds, got both")
        _check_embeds("prompt_embeds", embeds)
        return len(embeds)
    if prompt is None:
        raise UserError("prompt: give a text, or prompt_embeds")
    texts = [prompt] if isinstance(prompt, str) else prompt
    if not isinstance(texts, list) or not texts or not all(isinstance(text, str) for text in texts):
        raise UserError(f"prompt: expected a text or a list of at least one, got {shorten(prompt)}")
    return len(texts)


def check_arguments(pipe: Any, arguments: Mapping[str, Any], prompts: int) -> None:
    """Refuse what the pipeline would stumble over in the middle, or after all steps.

    Args:
        pipe: a diffusers pipeline of a stock class.
        arguments: of its call, by name.
        prompts: P.

    Raises:
        UserError, ConfigError: what is wrong with which argument, and the way out.
    """
    _check_counts(arguments)
    _check_negative(arguments, prompts)
    if arguments.get("output_type") not in OUTPUT_TYPES:
        raise UserError(
            f"output_type must be one of {', '.join(OUTPUT_TYPES)}, got {shorten(arguments.get('output_type'))}"
        )
    _check_generator(arguments.get("generator"), prompts * arguments.get("num_videos_per_prompt", 1))
    kwargs = arguments.get("attention_kwargs")
    if kwargs is not None and not isinstance(kwargs, dict):
        raise UserError(f"attention_kwargs must be a mapping, got {type(kwargs).__name__}")
    callback = arguments.get("callback_on_step_end")
    if callback is not None and not callable(callback):
        raise UserError(f"callback_on_step_end: expected a function, got {type(callback).__name__}")
    needs_text = arguments.get("prompt") is not None or isinstance(arguments.get("negative_prompt"), (str, list))
    if needs_text and getattr(pipe, "text_encoder", None) is None:
        raise UserError("prompt: the pipeline has no text encoder; give prompt_embeds and negative_prompt_embeds")
    if not hasattr(pipe.scheduler, "set_begin_index"):
        raise UserError(
            f"scheduler: a {type(pipe.scheduler).__name__} cannot drive this pipeline; take the base's own, or "
            "UniPCMultistepScheduler"
        )
    _check_by_stock(pipe, arguments)


def _check_counts(arguments: Mapping[str, Any]) -> None:
    problems = [
        f"{name} must be a whole number of at least 1, got {shorten(arguments[name])}"
        for name in COUNTS
        if name in arguments and (type(arguments[name]) is not int or arguments[name] < 1)
    ]
    if problems:
        raise ConfigError(problems)


def _check_negative(arguments: Mapping[str, Any], prompts: int) -> None:
    texts, embeds = arguments.get("negative_prompt"), arguments.get("negative_prompt_embeds")
    if embeds is not None:
        if texts is not None:
            raise UserError("negative_prompt: give either texts or negative_prompt_embeds, got both")
        _check_embeds("negative_prompt_embeds", embeds)
        if len(embeds) != prompts:
            raise UserError(f"negative_prompt_embeds: {prompts} prompts need {prompts}, got {len(embeds)}")
    if isinstance(texts, list):
        if not all(isinstance(text, str) for text in texts):
            raise UserError(f"negative_prompt: expected texts, got {shorten(texts)}")
        if len(texts) != prompts:
            raise UserError(f"negative_prompt: {prompts} prompts need one text or {prompts}, got {len(texts)}")
    elif texts is not None and not isinstance(texts, str):
        raise UserError(f"negative_prompt: expected a text or a list of them, got {shorten(texts)}")


def _check_embeds(name: str, embeds: Any) -> None:
    if not isinstance(embeds, Tensor) or embeds.ndim < 2 or not len(embeds):
        shape = tuple(embeds.shape) if isinstance(embeds, Tensor) else type(embeds).__name__
        raise UserError(f"{name} must be a tensor (prompts, tokens, width), got {shape}")


def _check_generator(generator: Any, videos: int) -> None:
    given = generator if isinstance(generator, list) else [generator]
    if not all(item is None or isinstance(item, torch.Generator) for item in given):
        raise UserError(f"generator: expected a torch.Generator or a list of them, got {shorten(generator)}")
    if isinstance(generator, list) and len(generator) != videos:
        raise UserError(f"generator: {videos} videos need one generator or {videos}, got {len(generator)}")


def _check_by_stock(pipe: Any, arguments: Mapping[str, Any]) -> None:
    """The pipeline's own check, where it has one."""
    check = getattr(pipe, "check_inputs", None)
    if check is None:
        return
    names = inspect.signature(check).parameters
    try:
        check(**{name: arguments[name] for name in names if name in arguments})
    except (ValueError, TypeError) as error:
        raise UserError(one_line(error, 400)) from None
