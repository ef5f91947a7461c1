"""Wan 2.1 text-to-video with reference images and two guidance scales.

Shape letters: B prompts times videos per prompt, C latent channels, F latent frames, H and W latent height and width,
M references, S text tokens, D text width.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from diffusers import WanPipeline
from diffusers.callbacks import MultiPipelineCallbacks, PipelineCallback
from diffusers.pipelines.wan.pipeline_output import WanPipelineOutput
from torch import Tensor

from ..errors import UserError
from .base import ReferencePipeline
from .guidance import GuidancePass, check_scales, combine, guidance_passes

Callback = Callable[[Any, int, Any, dict[str, Any]], dict[str, Any]] | PipelineCallback | MultiPipelineCallbacks


@dataclass
class _Conditions:
    """What the passes of a step see.

    Attributes:
        passes: which there are.
        prompt_embeds, negative_prompt_embeds: (B, S, D); the latter None when no pass needs it.
        references: (B, C, M, H, W) latents, or None.
        mask: (B, M) bool, True where a reference is real; None: all are.
    """

    passes: Sequence[GuidancePass]
    prompt_embeds: Tensor
    negative_prompt_embeds: Tensor | None
    references: Tensor | None
    mask: Tensor | None


class WanReferencePipeline(ReferencePipeline, WanPipeline):
    """`WanPipeline` that takes reference images; `load_adapter` makes it from one, sharing its components."""

    @torch.no_grad()
    def __call__(
        self,
        prompt: str | list[str] | None = None,
        reference_images: Any = None,
        negative_prompt: str | list[str] | None = None,
        height: int = 480,
        width: int = 832,
        num_frames: int = 81,
        num_inference_steps: int = 50,
        guidance_scale: float = 7.5,
        image_guidance_scale: float = 5.0,
        num_videos_per_prompt: int = 1,
        generator: torch.Generator | list[torch.Generator] | None = None,
        latents: Tensor | None = None,
        prompt_embeds: Tensor | None = None,
        negative_prompt_embeds: Tensor | None = None,
        output_type: str = "np",
        return_dict: bool = True,
        attention_kwargs: dict[str, Any] | None = None,
        callback_on_step_end: Callback | None = None,
        callback_on_step_end_tensor_inputs: Sequence[str] = ("latents",),
        max_sequence_length: int | None = None,
    ) -> WanPipelineOutput | tuple[Any]:
        """Generate videos in which the references appear.

        A step runs the transformer three times with references: twice when one of the scales is 1 or both are equal,
        once when both are 1. Without references it is plain text-to-video with the adapter on: twice, once at
        `guidance_scale` 1. See `guidance` for the formula.

        Args:
            prompt: one or several.
            reference_images: for one prompt a list of images, for several one list each, of any lengths; None or empty
                lists: without. Paths, PIL images, (height, width, 3) arrays or (3, height, width) tensors, uint8 or
                floats in [0, 1]. Of any size: each is scaled to fit the video's canvas and centred on white.
            negative_prompt: stands in for the empty text, one for all prompts or one each.
            height, width: in pixels, multiples of what a token covers (Wan 2.1: 16).
            num_frames: a multiple of the VAE's temporal factor plus 1 (Wan 2.1: 4 k + 1).
            num_inference_steps: at least 1.
            guidance_scale: s_txt, how strongly the prompt pulls; 1 turns it off.
            image_guidance_scale: s_img, how strongly the references pull; 1 turns it off.
            num_videos_per_prompt: at least 1; a prompt's videos come one after the other.
            generator: one, or one per video.
            latents: (B, C, F, H, W) initial noise; None draws it.
            prompt_embeds, negative_prompt_embeds: (prompts, S, D) in place of the texts.
            output_type: "np", "pt", "pil" or "latent".
            return_dict: whether to return an object with `frames`, else a tuple of one.
            attention_kwargs: handed to the transformer.
            callback_on_step_end, callback_on_step_end_tensor_inputs: as in diffusers.
            max_sequence_length: text tokens; None takes the number that the adapter was trained with.

        Raises:
            UserError: bad input, in one line per problem, before any model runs.
        """
        branch = self._loaded_branch()
        if isinstance(callback_on_step_end, (PipelineCallback, MultiPipelineCallbacks)):
            callback_on_step_end_tensor_inputs = callback_on_step_end.tensor_inputs
        self._check_texts(
            prompt, negative_prompt, prompt_embeds, negative_prompt_embeds, callback_on_step_end_tensor_inputs
        )
        steps = {"num_inference_steps": num_inference_steps, "num_videos_per_prompt": num_videos_per_prompt}
        self._check_numbers(height, width, num_frames, **steps)
        check_scales(guidance_scale, image_guidance_scale)
        prompts = _count(prompt, prompt_embeds)
        images = self._read_references(reference_images, prompts, height, width)
        passes = guidance_passes(guidance_scale, image_guidance_scale, references=images is not None)

        self._guidance_scale, self._attention_kwargs = guidance_scale, attention_kwargs
        self._current_timestep, self._interrupt = None, False
        try:
            latents = self._initial_latents(
                prompts * num_videos_per_prompt, (num_frames, height, width), generator, latents
            )
            length = max_sequence_length or branch.config.max_sequence_length
            texts = (prompt, negative_prompt, prompt_embeds, negative_prompt_embeds)
            conditions = self._encode(texts, images, passes, num_videos_per_prompt, length)
            callback = partial(self._after_step, callback_on_step_end, callback_on_step_end_tensor_inputs, conditions)
            latents = self._denoise(latents, conditions, num_inference_steps, callback)
            frames = self._decode(latents, output_type)
        finally:
            branch.clear()
            self._current_timestep = None
            self.maybe_free_model_hooks()
        return WanPipelineOutput(frames=frames) if return_dict else (frames,)

    def _check_texts(
        self, prompt: Any, negative_prompt: Any, embeds: Tensor | None, negative_embeds: Tensor | None, names: Any
    ) -> None:
        try:  # 16 x 16 passes its check of sizes, which holds for Wan 2.1 only; `_check_numbers` does ours
            self.check_inputs(prompt, negative_prompt, 16, 16, embeds, negative_embeds, names)
        except ValueError as error:
            raise UserError(" ".join(str(error).split())) from None
        count = _count(prompt, embeds)
        if count == 0 or (isinstance(prompt, list) and not all(isinstance(item, str) for item in prompt)):
            raise UserError(f"prompt: expected a text or a list of at least one, got {prompt!r}")
        if isinstance(negative_prompt, list) and len(negative_prompt) != count:
            raise UserError(f"negative_prompt: {count} prompts need one text or {count}, got {len(negative_prompt)}")
        if negative_embeds is not None and len(negative_embeds) != count:
            raise UserError(f"negative_prompt_embeds: {count} prompts need {count}, got {len(negative_embeds)}")

    def _initial_latents(
        self, batch: int, size: tuple[int, int, int], generator: Any, latents: Tensor | None
    ) -> Tensor:
        frames, height, width = size
        channels = self.transformer.config.in_channels
        space, time = self.vae_scale_factor_spatial, self.vae_scale_factor_temporal
        shape = (batch, channels, (frames - 1) // time + 1, height // space, width // space)
        if latents is not None and tuple(latents.shape) != shape:
            raise UserError(f"latents must have shape {shape} for this video, got {tuple(latents.shape)}")
        if isinstance(generator, list) and len(generator) != batch:
            raise UserError(f"generator: {batch} videos need one generator or {batch}, got {len(generator)}")
        return self.prepare_latents(
            batch, channels, height, width, frames, torch.float32, self._execution_device, generator, latents
        )

    def _encode(
        self,
        texts: tuple[Any, Any, Tensor | None, Tensor | None],
        images: tuple[Tensor, Tensor] | None,
        passes: Sequence[GuidancePass],
        videos: int,
        max_sequence_length: int,
    ) -> _Conditions:
        """Run the text encoder and the VAE; every prompt's conditions are repeated for its videos."""
        device, dtype = self._execution_device, self.transformer.dtype
        prompt, negative_prompt, embeds, negative_embeds = texts
        embeds, negative_embeds = self.encode_prompt(
            prompt=prompt,
            negative_prompt=negative_prompt,
            do_classifier_free_guidance=any(not item.text for item in passes),
            prompt_embeds=embeds,
            negative_prompt_embeds=negative_embeds,
            max_sequence_length=max_sequence_length,
            device=device,
        )
        references, mask = (None, None) if images is None else (self._encode_references(*images), images[1])
        if mask is not None and mask.all():  # some attention kernels take no mask
            mask = None

        def repeat(tensor: Tensor | None, dtype: torch.dtype | None = None) -> Any:
            return None if tensor is None else tensor.to(device, dtype).repeat_interleave(videos, 0)

        return _Conditions(
            passes, repeat(embeds, dtype), repeat(negative_embeds, dtype), repeat(references, dtype), repeat(mask)
        )

    def _denoise(
        self, latents: Tensor, conditions: _Conditions, steps: int, after_step: Callable[[int, Tensor, Tensor], Tensor]
    ) -> Tensor:
        self.scheduler.set_timesteps(steps, device=latents.device)
        timesteps, order = self.scheduler.timesteps, self.scheduler.order
        self._num_timesteps = len(timesteps)
        warmup = len(timesteps) - steps * order
        bar: Any = self.progress_bar  # torch's decorator hides its signature from type checkers
        with bar(total=steps) as progress:
            for index, timestep in enumerate(timesteps):
                if self.interrupt:
                    continue
                self._current_timestep = timestep
                predictions = [self._predict(latents, timestep, conditions, item, index) for item in conditions.passes]
                guided = combine(predictions, conditions.passes)
                latents = self.scheduler.step(guided, timestep, latents, return_dict=False)[0]
                latents = after_step(index, timestep, latents)
                if index == len(timesteps) - 1 or (index + 1 > warmup and (index + 1) % order == 0):
                    progress.update()
        return latents

    def _predict(
        self, latents: Tensor, timestep: Tensor, conditions: _Conditions, item: GuidancePass, index: int
    ) -> Tensor:
        """One pass: (B, C, F, H, W) velocity for the video's frames."""
        references, mask = (conditions.references, conditions.mask) if item.references else (None, None)
        with self._cache_context(item.name, index), self._loaded_branch().references(references, mask):
            return self.transformer(
                hidden_states=latents.to(self.transformer.dtype),
                timestep=timestep.expand(latents.shape[0]),
                encoder_hidden_states=conditions.prompt_embeds if item.text else conditions.negative_prompt_embeds,
                attention_kwargs=self._attention_kwargs,
                return_dict=False,
            )[0]

    def _cache_context(self, name: str, index: int) -> AbstractContextManager[None]:
        """Tell diffusers' caches which pass this is; later versions are also told where in the loop."""
        context = self.transformer.cache_context
        if len(inspect.signature(context).parameters) == 1:
            return context(name)
        sigma = float(self.scheduler.sigmas[index])
        return context(name, step_index=index, sigma=sigma, num_inference_steps=self._num_timesteps)

    def _after_step(
        self,
        callback: Callback | None,
        names: Sequence[str],
        conditions: _Conditions,
        index: int,
        timestep: Tensor,
        latents: Tensor,
    ) -> Tensor:
        """The user's callback; what it returns replaces latents and embeddings."""
        if callback is None:
            return latents
        values = {
            "latents": latents,
            "prompt_embeds": conditions.prompt_embeds,
            "negative_prompt_embeds": conditions.negative_prompt_embeds,
        }
        values |= callback(self, index, timestep, {name: values[name] for name in names})
        conditions.prompt_embeds = values["prompt_embeds"]
        conditions.negative_prompt_embeds = values["negative_prompt_embeds"]
        return values["latents"]

    def _decode(self, latents: Tensor, output_type: str) -> Any:
        if output_type == "latent":
            return latents
        latents = latents.to(self.vae.dtype)
        mean, std = (
            torch.tensor(values, device=latents.device, dtype=latents.dtype).view(1, -1, 1, 1, 1)
            for values in (self.vae.config.latents_mean, self.vae.config.latents_std)
        )
        video = self.vae.decode(latents * std + mean, return_dict=False)[0]
        return self.video_processor.postprocess_video(video, output_type=output_type)


def _count(prompt: Any, embeds: Tensor | None) -> int:
    if embeds is not None:
        return len(embeds)
    return 1 if isinstance(prompt, str) else len(prompt)


PIPELINE = WanReferencePipeline
