"""A stock pipeline's own loop, guided by references: hooks on the transformer make its calls the passes of the plan.

The stock loop calls the transformer with the prompt, then with the negative prompt, and takes u + s · (c − u). What
the hooks return as c and u makes that the prediction of `guidance.combine`; where one call is enough for a step, as
where `kept_differences` are added, the loop is told that there is no classifier-free guidance in it. No line of a
pipeline's loop is written anew, so that whatever else it does (callbacks, interruption, schedulers, timesteps of a
model's own) stays as it is.

A loop that calls the transformer once for both prompts (`Family.batched_guidance`) gets both predictions of each step,
whatever was run for them.
"""

from __future__ import annotations

import inspect
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor

from ..families.base import Family
from .conditions import EncodedReferences
from .guidance import Call, GuidancePass, combine, plan_guidance
from .kept_differences import KeptDifferences
from .step_caches import pass_context

Arguments = dict[str, Any]


class GuidedCalls:
    """The transformer's calls during one generation.

    Args:
        pipe: a `ReferencePipeline` in the middle of a call of its own.
        stock_scale: the guidance scale that its loop multiplies by.
        image_guidance_scale, interval, batch, refresh: see `plan_guidance`.
        encode: makes what passes are given of references, at the first step, when the text encoder has done its work;
            None without references.
        family: of the transformer.

    Attributes:
        negative: those arguments for the negative prompt, which batches of passes need; None: not known (any more).
        kept: what steps that are not computed in full add; None: not there (any more).
    """

    def __init__(
        self,
        pipe: Any,
        *,
        stock_scale: float,
        image_guidance_scale: float,
        interval: Sequence[float],
        batch: bool,
        refresh: int,
        encode: Callable[[], EncodedReferences] | None,
        family: Family,
    ):
        self.pipe = pipe
        self.stock_scale = stock_scale
        self.image_guidance_scale = image_guidance_scale
        self.interval = interval
        self.batch = batch
        self.refresh = refresh
        self.encode = encode
        self.family = family
        self.references: EncodedReferences | None = None
        self.negative: Arguments | None = None
        self.kept: KeptDifferences | None = None
        self.asleep = False
        self._both = family.batched_guidance and stock_scale > 1
        self._index = -1
        self._calls: tuple[Call, ...] = ()
        self._added: tuple[GuidancePass, ...] = ()  # what kept differences stand for in this step
        self._awaits_negative = False
        self._predictions: dict[GuidancePass, Tensor] = {}
        self._running: list[Call] = []
        self._given: Arguments = {}
        self._thread = threading.get_ident()
        self._around = ExitStack()
        self._names = list(inspect.signature(type(pipe.transformer).forward).parameters)[1:]

    @contextmanager
    def on(self, transformer: Any) -> Iterator[None]:
        """Hook the transformer; its calls inside the context are those of the pipeline's loop."""
        handles = (
            transformer.register_forward_pre_hook(self._before, with_kwargs=True, prepend=True),
            transformer.register_forward_hook(self._after, with_kwargs=True),
        )
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()
            self._around.close()

    @contextmanager
    def sleeping(self) -> Iterator[None]:
        """Inside the context, calls of the transformer are not the loop's: a callback's, or passes made here."""
        before, self.asleep = self.asleep, True
        try:
            yield
        finally:
            self.asleep = before

    def wants_negative(self, stock: bool) -> bool:
        """Whether the loop is to call the transformer with the negative prompt; `stock`: whether it would."""
        if self.family.batched_guidance:  # it has put the prompts together once for all steps
            return self._both
        return stock and (self._index < 0 or self._awaits_negative)

    def _before(self, transformer: Any, args: tuple, kwargs: Arguments) -> tuple[tuple, Arguments] | None:
        if self.asleep or threading.get_ident() != self._thread:
            return None
        arguments = {**dict(zip(self._names, args, strict=False)), **kwargs}
        if self._awaits_negative:
            self.negative = {name: arguments[name] for name in self.family.text_arguments}
            self._running = [call for call in self._calls if not call[-1].text]
        else:
            if self._both:
                self.negative, arguments = self._halves(arguments)
            self._begin_step()
            if self._both and self._is_the_loops_own():
                self._running = []
                return None
        self._given = arguments
        call = self._running[-1]  # the most conditioned; the others follow when it is done
        self._around.enter_context(self._passing(call))
        return (), self._arguments_of(call)

    def _begin_step(self) -> None:
        if self.encode is not None and self.references is None:
            with self.sleeping():
                self.references = self.encode()
        self._index += 1
        self._predictions = {}
        self._calls, self._added = self._choose()
        together = any(len({item.text for item in call}) == 2 for call in self._calls)
        needs_negative = any(not item.text for call in self._calls for item in call)
        self._awaits_negative = needs_negative and not together and not self._both
        self._running = [call for call in self._calls if call[-1].text or not self._awaits_negative]

    def _choose(self) -> tuple[tuple[Call, ...], tuple[GuidancePass, ...]]:
        """This step's calls, and the passes that kept differences stand for in it."""
        guided = self.stock_scale > 1 and self.pipe.stock_guidance  # else there is no negative prompt
        plan = plan_guidance(
            self.pipe.guidance_scale if guided else 1.0,
            self.image_guidance_scale,
            references=self.references is not None,
            interval=self.interval,
            batch=self.batch and self.negative is not None,
            refresh=self.refresh,
        )
        where = self._index, self.pipe.num_timesteps
        calls = plan.calls(*where)
        passes = tuple(item for call in calls for item in call)
        if len(passes) > 1 and plan.adds_kept(*where) and self.kept is not None and self.kept.serve(passes):
            return plan.unguided, passes
        return calls, ()

    def _after(self, transformer: Any, args: tuple, kwargs: Arguments, output: Any) -> Any:
        if self.asleep or threading.get_ident() != self._thread or not self._running:
            return None
        self._around.close()
        self._keep(self._running[-1], output)
        for call in self._running[:-1]:
            with self.sleeping(), self._passing(call):
                self._keep(call, transformer(**self._arguments_of(call)))
        return _with_prediction(output, self._both_predictions() if self._both else self._prediction())

    def _prediction(self) -> Tensor:
        """What the loop gets of the call that has just been made."""
        passes = [item for call in self._calls for item in call]
        if self._awaits_negative and len(self._predictions) < len(passes):
            return self._wide(self._predictions[passes[-1]])
        was_awaited, self._awaits_negative = self._awaits_negative, False
        guided = self._guided(passes)
        if not was_awaited:
            return guided
        if len(passes) == 2 and passes[1].weight == self.stock_scale:
            return self._wide(self._predictions[passes[0]])  # the loop's own formula is the one
        return _unconditional(guided, self._predictions[passes[-1]].float(), self.stock_scale)

    def _both_predictions(self) -> Tensor:
        """What a loop gets that calls once for both prompts: (2B, …), u first."""
        passes = [item for call in self._calls for item in call]
        guided, conditional, scale = self._guided(passes), self._predictions[passes[-1]], self.pipe.guidance_scale
        if guided is conditional or scale <= 1:
            return torch.cat([guided, guided])
        return torch.cat([_unconditional(guided, conditional.float(), scale), conditional.float()])

    def _guided(self, passes: Sequence[GuidancePass]) -> Tensor:
        """This step's prediction, all of its passes being done; differences are kept for later steps."""
        predictions = [self._predictions[item] for item in passes]
        if self._added and self.kept is not None:
            return self.kept.add_to(predictions[0], self._added)
        if self.refresh > 1 and len(passes) > 1:
            self.kept = KeptDifferences.between(predictions, passes)
        return combine(predictions, passes)

    def _wide(self, prediction: Tensor) -> Tensor:
        """In float32, as differences of predictions are multiplied; without references as stock does it."""
        return prediction if self.references is None else prediction.float()

    def _keep(self, call: Call, output: Any) -> None:
        prediction = output[0] if isinstance(output, tuple) else output.sample
        self._predictions |= zip(call, prediction.chunk(len(call)), strict=True)

    def _is_the_loops_own(self) -> bool:
        """Whether this step is the call for both prompts as the loop makes it."""
        return self.references is None and self.refresh == 1 and sum(map(len, self._calls)) == 2

    def _halves(self, arguments: Arguments) -> tuple[Arguments, Arguments]:
        """Of a call for both prompts, the text arguments of its first half and all of its second."""
        count = len(arguments[self.family.video_argument])
        negative, positive = (
            {
                name: value[rows] if isinstance(value, Tensor) and value.ndim and len(value) == count else value
                for name, value in arguments.items()
            }
            for rows in (slice(count // 2), slice(count // 2, None))
        )
        return {name: negative[name] for name in self.family.text_arguments}, positive

    def _arguments_of(self, call: Call) -> Arguments:
        """The loop's arguments for one or several passes."""
        negative = {name: value.to(self._given[name]) for name, value in (self.negative or {}).items()}
        rows = [self._given if item.text else self._given | negative for item in call]
        if len(call) == 1:
            return rows[0]
        count = len(self._given[self.family.video_argument])
        return {
            name: torch.cat([row[name] for row in rows])
            if isinstance(value, Tensor) and value.ndim and len(value) == count
            else value
            for name, value in self._given.items()
        }

    @contextmanager
    def _passing(self, call: Call) -> Iterator[None]:
        """A call of its own name for step caches, with the references that its passes see."""
        name, scheduler = "+".join(item.name for item in call), self.pipe.scheduler
        sigma = float(scheduler.sigmas[self._index]) if hasattr(scheduler, "sigmas") else 0.0
        where = self._index, sigma, self.pipe.num_timesteps
        with pass_context(self.pipe.transformer, name, *where), self._riding(call):
            yield

    def _riding(self, call: Call) -> AbstractContextManager[None]:
        given = None if self.references is None else self.references.for_call(call)
        if given is None:
            return self.pipe._loaded_branch().references(None)
        return self.pipe._reference_branch().references(given.given, given.mask)


def _unconditional(guided: Tensor, conditional: Tensor, scale: float) -> Tensor:
    """The u of which u + s · (c − u) is the guided prediction."""
    return (guided - scale * conditional) / (1 - scale)


def _with_prediction(output: Any, prediction: Tensor) -> Any:
    if isinstance(output, tuple):
        return (prediction, *output[1:])
    output.sample = prediction
    return output
