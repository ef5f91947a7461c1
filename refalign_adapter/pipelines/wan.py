"""Wan 2.1 text-to-video with reference images and two guidance scales.

Shape letters: B prompts times videos per prompt, C latent channels, F latent frames, H and W latent height and width,
S text tokens, D text width.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from diffusers import WanPipeline
from diffusers.callbacks import MultiPipelineCallbacks, PipelineCallback
from diffusers.pipelines.wan.pipeline_output import WanPipelineOutput
from torch import Tensor

from ..branch.reference_cache import ReferenceCache
from ..errors import UserError
from .base import ReferencePipeline
from .conditions import Conditions
from .denoising import Callback, denoise
from .guidance import ALL_STEPS, check_scales, plan_guidance


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
        guidance_interval: tuple[float, float] = ALL_STEPS,
        batch_guidance: bool = False,
        reference_cache: ReferenceCache | None = None,
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
        `guidance_scale` 1. See `guidance` for the formula. With isolated attention the references are run through the
        transformer once beforehand, and passes read the keys and values they left; with joint attention they take
        part in every pass that sees them.

        Args:
            prompt: one or several.
            reference_images: for one prompt a list of images, for several one list each, of any lengths; None or empty
                lists: without. Paths, PIL images, (height, width, 3) arrays or (3, height, width) tensors, uint8 or
                floats in [0, 1]. Of any size: each is scaled to fit the adapter's canvas and centred on white.
            negative_prompt: stands in for the empty text, one for all prompts or one each.
            height, width: in pixels, multiples of what a token covers (Wan 2.1: 16).
            num_frames: a multiple of the VAE's temporal factor plus 1 (Wan 2.1: 4 k + 1).
            num_inference_steps: at least 1.
            guidance_scale: s_txt, how strongly the prompt pulls; 1 turns it off.
            image_guidance_scale: s_img, how strongly the references pull; 1 turns it off.
            guidance_interval: [start, stop), shares of the steps in which the scales act; all others run one pass, as
                if both were 1.
            batch_guidance: whether passes with references share one call of the transformer, and likewise those
                without: faster where small batches leave a GPU idle, with more memory. The video is the same but for
                rounding.
            reference_cache: what `encode_references` returned, in place of `reference_images`; of as many prompts, or
                of one for all.
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
        with self._claimed():
            if isinstance(callback_on_step_end, (PipelineCallback, MultiPipelineCallbacks)):
                callback_on_step_end_tensor_inputs = callback_on_step_end.tensor_inputs
            texts = (prompt, negative_prompt, prompt_embeds, negative_prompt_embeds)
            self._check_texts(*texts, callback_on_step_end_tensor_inputs)
            steps = {"num_inference_steps": num_inference_steps, "num_videos_per_prompt": num_videos_per_prompt}
            self._check_numbers(height, width, num_frames, **steps)
            check_scales(guidance_scale, image_guidance_scale, guidance_interval)
            length = max_sequence_length or self._loaded_branch().config.max_sequence_length
            if batch_guidance:
                _check_lengths(prompt_embeds, negative_prompt_embeds, length)
            prompts = _count(prompt, prompt_embeds)
            given = self._read_given(reference_images, reference_cache, prompts, (num_frames, height, width))
            if given is not None:
                self._check_settings(given, attention_kwargs)
            plan = plan_guidance(
                guidance_scale,
                image_guidance_scale,
                references=given is not None,
                interval=guidance_interval,
                batch=batch_guidance,
            )

            with self._cleaned_up():
                self._guidance_scale, self._attention_kwargs = guidance_scale, attention_kwargs
                self._current_timestep, self._interrupt = None, False
                size = (num_frames, height, width)
                latents = self._initial_latents(prompts * num_videos_per_prompt, size, generator, latents)
                embeds = self._encode_texts(texts, plan.needs_negative, num_videos_per_prompt, length)
                references = None if given is None else self._encode(given, size).for_videos(num_videos_per_prompt)
                conditions = Conditions(*embeds, references, attention_kwargs)
                callback = callback_on_step_end, callback_on_step_end_tensor_inputs
                latents = denoise(self, latents, conditions, plan, num_inference_steps, *callback)
                frames = self._decode(latents, output_type)
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

    def _encode_texts(
        self, texts: tuple[Any, Any, Tensor | None, Tensor | None], negative: bool, videos: int, length: int
    ) -> tuple[Tensor, Tensor | None]:
        """(B, S, D) of prompts and, if asked for, of negative prompts, repeated for their videos."""
        device, dtype = self._execution_device, self.transformer.dtype
        prompt, negative_prompt, embeds, negative_embeds = texts
        embeds, negative_embeds = self.encode_prompt(
            prompt=prompt,
            negative_prompt=negative_prompt,
            do_classifier_free_guidance=negative,
            prompt_embeds=embeds,
            negative_prompt_embeds=negative_embeds,
            max_sequence_length=length,
            device=device,
        )

        def repeat(tensor: Tensor | None) -> Any:
            return None if tensor is None else tensor.to(device, dtype).repeat_interleave(videos, 0)

        return repeat(embeds), repeat(negative_embeds)

    def _velocity(
        self, latents: Tensor, timestep: Tensor, text: Tensor, attention_kwargs: dict[str, Any] | None
    ) -> Tensor:
        return self.transformer(
            hidden_states=latents.to(self.transformer.dtype),
            timestep=timestep.expand(latents.shape[0]),
            encoder_hidden_states=text,
            attention_kwargs=attention_kwargs,
            return_dict=False,
        )[0]

    def _decode(self, latents: Tensor, output_type: str) -> Any:
        if output_type == "latent":
            return latents
        latents = latents.to(self.vae.dtype)
        mean, std = (
            torch.tensor(values, device=latents.device, dtype=latents.dtype).view(1, -1, 1, 1, 1)
            for values in (self.vae.config.latents_mean, self.vae.config.latents_std)
        )
        # As in WanPipeline to the bit: without references, a reference-scoped adapter makes the base's own videos.
        video = self.vae.decode(latents / (1.0 / std) + mean, return_dict=False)[0]
        return self.video_processor.postprocess_video(video, output_type=output_type)


def _count(prompt: Any, embeds: Tensor | None) -> int:
    if embeds is not None:
        return len(embeds)
    return 1 if isinstance(prompt, str) else len(prompt)


def _check_lengths(embeds: Tensor | None, negative_embeds: Tensor | None, length: int) -> None:
    """Refuse texts of different lengths, which cannot share a batch."""
    ours, theirs = (length if given is None else given.shape[1] for given in (embeds, negative_embeds))
    if ours != theirs:
        raise UserError(
            f"batch_guidance: prompt and negative prompt need equally many tokens, got {ours} and {theirs}; "
            "leave it off, or make both alike"
        )


PIPELINE = WanReferencePipeline
