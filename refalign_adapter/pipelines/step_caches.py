"""diffusers' step caches, `transformer.enable_cache(config)`: which of them go together with references.

Those that keep their state by the name of a cache context do: every pass of a step, and the references' own, has a
name of its own. Of those, some count the calls of a context and take each for the next step, which is wrong where a
step leaves passes out. The lists are of diffusers 0.42; `tests/pipelines/test_step_caches.py` runs every kind.
"""

from __future__ import annotations

import inspect
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from itertools import count
from typing import Any

from ..errors import UserError

BY_CONTEXT = frozenset(
    {"FirstBlockCacheConfig", "MagCacheConfig", "SeaCacheConfig", "TaylorSeerCacheConfig", "TextKVCacheConfig"}
)
"""Names of the configurations whose caches keep a state per context."""

REFUSED = {
    "FasterCacheConfig": "takes every call for a pair of passes, without and with a prompt",
    "PyramidAttentionBroadcastConfig": "keeps one state for all passes, so that one would be given what another saw",
}
"""Names of the others, and what is in the way."""

COUNTING = frozenset({"MagCacheConfig", "TaylorSeerCacheConfig"})
"""Names of the configurations of `BY_CONTEXT` whose caches count a context's calls; the others look at what they are
given, or are told the step."""

_prefills = count()


def check_step_cache(transformer: Any) -> None:
    """Refuse a step cache that would mix up passes with different references.

    Raises:
        UserError: which, why, and the way out.
    """
    config = getattr(transformer, "_cache_config", None)
    name = type(config).__name__
    if config is not None and name not in BY_CONTEXT:
        reason = REFUSED.get(name, "is not known to tell passes with and without references apart")
        raise UserError(
            f"step cache: {name} {reason}; call pipe.transformer.disable_cache(), or enable FirstBlockCacheConfig"
        )


def check_refresh(transformer: Any, refresh: int) -> None:
    """Refuse a step cache that a pass must not be left out of.

    Raises:
        UserError: which, why, and the ways out.
    """
    config = getattr(transformer, "_cache_config", None)
    name = type(config).__name__
    if config is None or refresh == 1 or name in BY_CONTEXT - COUNTING:
        return
    reason = "counts the calls of a pass as steps" if name in COUNTING else "does not tell passes apart"
    raise UserError(
        f"guidance_refresh must be 1 with this step cache, got {refresh}: {name} {reason}; call "
        "pipe.transformer.disable_cache(), or enable FirstBlockCacheConfig"
    )


def reset_step_cache(transformer: Any) -> None:
    """Forget what an earlier generation left behind, or one that this one runs inside of."""
    if getattr(transformer, "_cache_config", None) is not None:
        transformer._reset_stateful_cache()


def pass_context(transformer: Any, name: str, index: int, sigma: float, steps: int) -> AbstractContextManager[None]:
    """Tell step caches which pass this is; later versions of diffusers are also told where in the loop.

    Args:
        transformer: the DiT.
        name: of the pass.
        index: of the step, from 0.
        sigma: its noise level.
        steps: how many there are.
    """
    context = getattr(transformer, "cache_context", None)
    if context is None:  # a model that takes no step cache
        return nullcontext()
    if len(inspect.signature(context).parameters) == 1:
        return context(name)
    return context(name, step_index=index, sigma=sigma, num_inference_steps=steps)


@contextmanager
def prefill_context(transformer: Any) -> Iterator[None]:
    """A context for a pass of references, never one that was used before: such a pass must run all blocks."""
    with pass_context(transformer, f"references_{next(_prefills)}", 0, 0.0, 1):
        yield
