"""A stock pipeline's call with references: its own `__call__`, and around it what references need.

Shape letters: P prompts, B prompts times videos per prompt, C latent channels, F latent frames, H and W latent height
and width, S text tokens, D text width.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from diffusers.callbacks import MultiPipelineCallbacks, PipelineCallback
from torch import Tensor

from ..branch.reference_cache import ReferenceCache
from ..errors import UserError, shorten
from .arguments import EMBEDS, check_arguments, count_prompts
from .base import ReferencePipeline
from .guidance import ALL_STEPS, check_scales
from .guided_calls import GuidedCalls
from .step_caches import check_refresh

DEFAULTS = {"guidance_scale": 7.5, "max_sequence_length": None}
"""Of a call with an adapter, in place of the stock pipeline's: the scale is the paper's; None stands for the length
that the adapter was trained with."""
LOOP = (
    "_guidance_scale",
    "_guidance_rescale",
    "_attention_kwargs",
    "_current_timestep",
    "_interrupt",
    "_num_timesteps",
    "_guide",
)
"""What a call leaves on its pipeline for properties and callbacks to read."""


class ReferenceCall(ReferencePipeline):
    """Generates with references; `reference_class` mixes it into a diffusers pipeline class."""

    scheduler: Any
    stock: type
    _guide: GuidedCalls | None = None

    def __call__(
        self,
        prompt: str | list[str] | None = None,
        reference_images: Any = None,
        *args: Any,
        image_guidance_scale: float = 5.0,
        guidance_interval: Sequence[float] = ALL_STEPS,
        batch_guidance: bool = False,
        guidance_refresh: int = 1,
        reference_cache: ReferenceCache | None = None,
        **kwargs: Any,
    ) -> Any:
        """Generate videos in which the references appear.

        A step runs the transformer three times with references: twice when one of the scales is 1 or both are equal,
        once when both are 1. Without references it is the stock pipeline with the adapter on. See `guidance` for the
        formula. With isolated attention the references are run through the transformer once beforehand, and passes
        read the keys and values they left; with joint attention they take part in every pass that sees them. Once the
        adapter is unloaded, it is the stock pipeline.

        Args:
            prompt: one or several.
            reference_images: for one prompt a list of images, for several one list each, of any lengths; None or empty
                lists: without. Paths, PIL images, (height, width, 3) arrays or (3, height, width) tensors, uint8 or
                floats in [0, 1]. Of any size: each is scaled to fit the adapter's canvas and centred on white.
            image_guidance_scale: s_img, how strongly the references pull; 1 turns it off.
            guidance_interval: [start, stop), shares of the steps in which the scales act; all others run one pass, as
                if both were 1.
            batch_guidance: whether passes with references share one call of the transformer, and likewise those
                without: faster where small batches leave a GPU idle, with more memory. The video is the same but for
                rounding.
            guidance_refresh: k: guidance is computed in the first two steps (of the interval) and then in every k-th;
                the others run one pass and add what the conditions changed in the step before that computed it. 1
                computes it in every step. Others make another video in less time; one or, with references and both
                scales above 1, two tensors of the latents' size are kept in float32. A changed scale acts at once,
                changed embeddings have the next step compute anew.
            reference_cache: what `encode_references` returned, in place of `reference_images`; of as many prompts, or
                of one for all.
            args, kwargs: the stock pipeline's other arguments, in its order. `guidance_scale` (s_txt) is 7.5 and
                `max_sequence_length` the adapter's if they are not given; callbacks may change `guidance_scale` by
                setting `pipe._guidance_scale`.

        Raises:
            UserError: bad input, in one line per problem, before any model runs.
        """
        stock = super().__call__  # type: ignore[misc]  # of the diffusers pipeline
        bound = inspect.signature(stock).bind(prompt, *args, **kwargs)
        if not self._has_branch():
            if reference_images is not None or reference_cache is not None:
                self._loaded_branch()  # says how to load one
            return stock(*bound.args, **bound.kwargs)
        arguments = self._with_defaults(bound)
        with self._claimed(), self._remembered(), _restored(self.scheduler):
            prompts = count_prompts(arguments)
            size = tuple(arguments[name] for name in ("num_frames", "height", "width"))
            self._check_size(*size)
            check_arguments(self, arguments, prompts)
            check_scales(arguments["guidance_scale"], image_guidance_scale, guidance_interval, guidance_refresh)
            check_refresh(self.transformer, guidance_refresh)
            self._check_tensors(arguments, prompts, size)
            if not isinstance(batch_guidance, bool):
                raise UserError(f"batch_guidance must be True or False, got {shorten(batch_guidance)}")
            if batch_guidance:
                _check_lengths(arguments)
            given = self._read_given(reference_images, reference_cache, prompts, size)
            if given is not None:
                self._check_settings(given, arguments.get("attention_kwargs"))
                self._check_rate(arguments)
            videos = arguments.get("num_videos_per_prompt", 1)
            guide = GuidedCalls(
                self,
                stock_scale=self._family.stock_scale(arguments),
                image_guidance_scale=image_guidance_scale,
                interval=guidance_interval,
                batch=batch_guidance,
                refresh=guidance_refresh,
                encode=None if given is None else lambda: self._encode_references(given, size).for_videos(videos),
                family=self._family,
            )
            _repeat_embeds(arguments, self._family.prompt_arguments)
            _let_callbacks_be(arguments, guide)
            with self._cleaned_up(), guide.on(self.transformer):
                self._guide = guide
                return stock(**arguments)

    @property
    def do_classifier_free_guidance(self) -> bool:
        """Whether the loop calls the transformer with the negative prompt too."""
        return self.stock_guidance if self._guide is None else self._guide.wants_negative(self.stock_guidance)

    @property
    def stock_guidance(self) -> bool:
        """What `do_classifier_free_guidance` is in the stock pipeline."""
        return super().do_classifier_free_guidance  # type: ignore[misc]

    def encode_prompt(self, *args: Any, **kwargs: Any) -> Any:
        """As in the stock pipeline."""
        encoded = super().encode_prompt(*args, **kwargs)  # type: ignore[misc]
        if self._guide is not None:
            self._guide.negative = self._family.negative_arguments(encoded)
        return encoded

    def _with_defaults(self, bound: inspect.BoundArguments) -> dict[str, Any]:
        given = dict(bound.arguments)
        bound.apply_defaults()
        arguments = dict(bound.arguments)
        for name, value in DEFAULTS.items():
            if name in arguments and name not in given:
                arguments[name] = value
        if "max_sequence_length" in arguments and arguments["max_sequence_length"] is None:
            arguments["max_sequence_length"] = self._loaded_branch().config.max_sequence_length
        if arguments.get("num_videos_per_prompt", 1) is None:
            arguments["num_videos_per_prompt"] = 1
        callback = arguments.get("callback_on_step_end")
        if isinstance(callback, (PipelineCallback, MultiPipelineCallbacks)):
            arguments["callback_on_step_end_tensor_inputs"] = callback.tensor_inputs
        return arguments

    def _check_tensors(self, arguments: dict[str, Any], prompts: int, size: tuple[int, int, int]) -> None:
        """Refuse latents and embeddings of shapes that the transformer does not take."""
        width = self._family.text_width(self.transformer)
        for name in EMBEDS:
            embeds = arguments.get(name)
            if embeds is not None and (embeds.ndim != 3 or embeds.shape[-1] != width):
                raise UserError(f"{name} must be (prompts, tokens, {width}) for this base, got {tuple(embeds.shape)}")
        latents = arguments.get("latents")
        if latents is not None:
            shape = self._family.latents_shape(
                self, self.transformer, prompts * arguments.get("num_videos_per_prompt", 1), size
            )
            if not isinstance(latents, Tensor) or tuple(latents.shape) != shape:
                got = tuple(latents.shape) if isinstance(latents, Tensor) else type(latents).__name__
                raise UserError(f"latents must have shape {shape} for this video, got {got}")

    def _check_rate(self, arguments: dict[str, Any]) -> None:
        """Refuse a rate of frames at which isolated references, which are placed beforehand, would be elsewhere."""
        placed = self._family.frame_rate
        given = arguments.get("frame_rate", placed)
        if given != placed and self._reference_branch().config.attention == "isolated":
            raise UserError(
                f"frame_rate: references with attention 'isolated' are placed for {placed:g} frames a second, got "
                f"{shorten(given)}; leave it out, or train an adapter with attention='joint'"
            )

    @contextmanager
    def _remembered(self) -> Iterator[None]:
        """One generation may run inside the callback of another of the same pipeline."""
        inside, before = self._guide is not None, {name: getattr(self, name, None) for name in LOOP}
        try:
            yield
        finally:
            self._guide = None
            if inside:
                vars(self).update(before)


def _check_lengths(arguments: dict[str, Any]) -> None:
    """Refuse texts of different lengths, which cannot share a batch."""
    length = arguments.get("max_sequence_length")
    ours, theirs = (length if (given := arguments.get(name)) is None else given.shape[1] for name in EMBEDS)
    if ours != theirs:
        raise UserError(
            f"batch_guidance: prompt and negative prompt need equally many tokens, got {ours} and {theirs}; "
            "leave it off, or make both alike"
        )


def _repeat_embeds(arguments: dict[str, Any], names: Sequence[str]) -> None:
    """Several videos of embeddings, which stock pipelines repeat for texts only; `names` are what has their rows."""
    videos = arguments.get("num_videos_per_prompt", 1)
    if videos == 1 or arguments.get("prompt_embeds") is None:
        return
    for name in names:
        if arguments.get(name) is not None:
            arguments[name] = arguments[name].repeat_interleave(videos, 0)
    if isinstance(arguments.get("negative_prompt"), list):
        arguments["negative_prompt"] = [text for text in arguments["negative_prompt"] for _ in range(videos)]
    arguments["num_videos_per_prompt"] = 1


def _let_callbacks_be(arguments: dict[str, Any], guide: GuidedCalls) -> None:
    """Have the user's callback run with the hooks asleep: it may generate something itself."""
    callback: Callable[..., Any] | None = arguments.get("callback_on_step_end")
    if callback is None:
        return

    def call_back(*args: Any, **kwargs: Any) -> Any:
        with guide.sleeping():
            changed = callback(*args, **kwargs)
        if changed and "negative_prompt_embeds" in changed:
            guide.negative = None  # the next step's call with it tells anew
        if changed and any(name in changed for name in guide.family.prompt_arguments):
            guide.kept = None
        return changed

    arguments["callback_on_step_end"] = call_back


@contextmanager
def _restored(scheduler: Any) -> Iterator[None]:
    """Leave the scheduler as it was: pipelines share it, and one may run inside another's callback."""
    before = dict(vars(scheduler))
    try:
        yield
    finally:
        vars(scheduler).clear()
        vars(scheduler).update(before)
