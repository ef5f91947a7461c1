"""A made-up video DiT, its text-to-video pipeline, and what refalign_adapter needs to know of them; and a teacher.

As unlike Wan as the contract of families allows: latents with channels last, text and video in one attention with text
first and masked, blocks that return both, rotary tables as an argument, diffusers' classes without step caches and
without a LoRA mixin on the pipeline.

Shape letters: B batch, F latent frames, H and W latent height and width, C latent channels, N video tokens, S text
tokens, D text width, R references, d a head's width.
"""

from types import SimpleNamespace
from typing import Any

import torch
import torch.nn.functional as F
from diffusers import AutoencoderKLWan, DiffusionPipeline, FlowMatchEulerDiscreteScheduler
from diffusers.configuration_utils import ConfigMixin, register_to_config
from diffusers.loaders import PeftAdapterMixin
from diffusers.models.attention import AttentionModuleMixin
from diffusers.models.embeddings import get_timestep_embedding
from diffusers.models.modeling_outputs import Transformer2DModelOutput
from diffusers.models.modeling_utils import ModelMixin
from diffusers.utils.torch_utils import randn_tensor
from torch import Tensor, nn
from transformers import PreTrainedTokenizerFast, UMT5EncoderModel

from refalign_adapter.families.base import Family, Text, check_fit, loading_options
from refalign_adapter.teachers.base import Teacher

PATCH = (1, 2, 2)


class ToyAttnProcessor:
    """Joint attention of text and video tokens, text first."""

    _attention_backend = None

    def __call__(
        self,
        attn: Any,
        hidden_states: Tensor,
        encoder_hidden_states: Tensor,
        attention_mask: Tensor | None = None,
        image_rotary_emb: tuple[Tensor, Tensor] | None = None,
    ) -> tuple[Tensor, Tensor]:
        text = encoder_hidden_states.shape[1]
        query, key, value = (
            torch.cat([of_text(encoder_hidden_states), of_video(hidden_states)], 1).unflatten(-1, (attn.heads, -1))
            for of_text, of_video in (
                (attn.add_q_proj, attn.to_q),
                (attn.add_k_proj, attn.to_k),
                (attn.add_v_proj, attn.to_v),
            )
        )
        query, key = attn.norm_q(query), attn.norm_k(key)
        if image_rotary_emb is not None:
            query, key = (
                torch.cat([part[:, :text], _turn(part[:, text:], *image_rotary_emb)], 1) for part in (query, key)
            )
        query, key, value = (part.transpose(1, 2) for part in (query, key, value))
        attended = F.scaled_dot_product_attention(query, key, value, attn_mask=attention_mask)
        attended = attended.transpose(1, 2).flatten(2)
        return attn.to_out[0](attended[:, text:]), attn.to_add_out(attended[:, :text])


def _turn(states: Tensor, cosine: Tensor, sine: Tensor) -> Tensor:
    """(B, N, heads, d) by tables (N, d), or (B, N, d) where samples differ in their places."""
    first, second = states.chunk(2, -1)
    turned = states.float() * cosine.unsqueeze(-2) + torch.cat([-second, first], -1).float() * sine.unsqueeze(-2)
    return turned.type_as(states)


class ToyAttention(nn.Module, AttentionModuleMixin):
    """Projections of its own for each stream."""

    _default_processor_cls = ToyAttnProcessor
    _available_processors = [ToyAttnProcessor]

    def __init__(self, dim: int, heads: int):
        super().__init__()
        self.heads = heads
        self.to_q, self.to_k, self.to_v = (nn.Linear(dim, dim) for _ in range(3))
        self.add_q_proj, self.add_k_proj, self.add_v_proj = (nn.Linear(dim, dim) for _ in range(3))
        self.norm_q, self.norm_k = (nn.RMSNorm(dim // heads, eps=1e-6) for _ in range(2))
        self.to_out = nn.ModuleList([nn.Linear(dim, dim)])
        self.to_add_out = nn.Linear(dim, dim)
        self.set_processor(ToyAttnProcessor())

    def forward(self, hidden_states: Tensor, encoder_hidden_states: Tensor, **kwargs: Any) -> tuple[Tensor, Tensor]:
        return self.processor(self, hidden_states, encoder_hidden_states, **kwargs)


class ToyBlock(nn.Module):
    """Two streams, modulated by the timestep."""

    def __init__(self, dim: int, heads: int):
        super().__init__()
        self.modulation = nn.Linear(dim, 4 * dim)
        self.norm1, self.norm2, self.norm1_context, self.norm2_context = (nn.LayerNorm(dim) for _ in range(4))
        self.attn = ToyAttention(dim, heads)
        self.ff, self.ff_context = (
            nn.Sequential(nn.Linear(dim, 2 * dim), nn.GELU(), nn.Linear(2 * dim, dim)) for _ in range(2)
        )

    def forward(
        self, video: Tensor, text: Tensor, time: Tensor, mask: Tensor | None, rotary: tuple[Tensor, Tensor]
    ) -> tuple[Tensor, Tensor]:
        shift, gate, ff_shift, ff_gate = self.modulation(time).unsqueeze(1).chunk(4, -1)
        of_video, of_text = self.attn(
            self.norm1(video) + shift, self.norm1_context(text), attention_mask=mask, image_rotary_emb=rotary
        )
        video, text = video + of_video * (1 + gate), text + of_text
        video = video + self.ff(self.norm2(video) + ff_shift) * (1 + ff_gate)
        return video, text + self.ff_context(self.norm2_context(text))


class ToyTransformer3DModel(ModelMixin, ConfigMixin, PeftAdapterMixin):
    """The DiT."""

    _supports_gradient_checkpointing = True
    _no_split_modules = ["ToyBlock"]

    @register_to_config
    def __init__(
        self,
        in_channels: int = 16,
        text_dim: int = 32,
        num_layers: int = 3,
        num_attention_heads: int = 2,
        attention_head_dim: int = 24,
    ):
        super().__init__()
        dim = num_attention_heads * attention_head_dim
        self.patch_embed, self.context_embed = nn.Linear(4 * in_channels, dim), nn.Linear(text_dim, dim)
        self.time_embed = nn.Sequential(nn.Linear(32, dim), nn.SiLU(), nn.Linear(dim, dim))
        self.blocks = nn.ModuleList([ToyBlock(dim, num_attention_heads) for _ in range(num_layers)])
        self.norm_out, self.proj_out = nn.LayerNorm(dim), nn.Linear(dim, 4 * in_channels)
        self.gradient_checkpointing = False

    def forward(
        self,
        hidden_states: Tensor,
        timestep: Tensor,
        encoder_hidden_states: Tensor,
        encoder_attention_mask: Tensor,
        image_rotary_emb: tuple[Tensor, Tensor],
        return_dict: bool = True,
    ) -> Any:
        """(B, F, H, W, C) latents, (B,) timesteps, (B, S, D) text with its mask (B, S), tables (N, d) or (B, N, d)."""
        grid = hidden_states.shape[1], hidden_states.shape[2] // 2, hidden_states.shape[3] // 2
        video = hidden_states.unflatten(3, (-1, 2)).unflatten(2, (-1, 2)).transpose(3, 4)
        video = self.patch_embed(video.flatten(4).flatten(1, 3))
        text = self.context_embed(encoder_hidden_states)
        time = self.time_embed(get_timestep_embedding(timestep, 32).to(video.dtype))
        shown = torch.cat([encoder_attention_mask.bool(), encoder_attention_mask.new_ones(video.shape[:2]).bool()], 1)
        for block in self.blocks:
            arguments = video, text, time, shown[:, None, None], image_rotary_emb
            if torch.is_grad_enabled() and self.gradient_checkpointing:
                video, text = self._gradient_checkpointing_func(block, *arguments)
            else:
                video, text = block(*arguments)
        video = self.proj_out(self.norm_out(video)).unflatten(1, grid).unflatten(-1, (2, 2, -1))
        video = video.transpose(3, 4).flatten(4, 5).flatten(2, 3)
        return Transformer2DModelOutput(sample=video) if return_dict else (video,)


def rotary_tables(frames: Tensor, rows: int, columns: int, width: int, corner: tuple[int, int] = (0, 0)) -> Any:
    """(..., F · rows · columns, width) cosines and sines for frames at temporal indices (..., F)."""
    places = [
        torch.arange(count, device=frames.device) + start for count, start in zip((rows, columns), corner, strict=True)
    ]
    shape = (*frames.shape, rows, columns)
    axes = [frames[..., None, None].expand(shape), places[0][:, None].expand(shape), places[1].expand(shape)]
    turns = 1.0 / 100.0 ** (torch.arange(width // 6, device=frames.device) / (width // 6))
    angles = torch.cat([axis.unsqueeze(-1).float() * turns for axis in axes], -1).flatten(-4, -2)
    angles = torch.cat([angles, angles], -1)
    return angles.cos(), angles.sin()


class ToyPipeline(DiffusionPipeline):
    """Text to video by the loop that stock pipelines have."""

    model_cpu_offload_seq = "text_encoder->transformer->vae"

    # Classes, in a file without postponed annotations: diffusers before 0.37 reads them as they stand, for loading.
    def __init__(
        self,
        tokenizer: PreTrainedTokenizerFast,
        text_encoder: UMT5EncoderModel,
        vae: AutoencoderKLWan,
        scheduler: FlowMatchEulerDiscreteScheduler,
        transformer: ToyTransformer3DModel,
    ):
        super().__init__()
        self.register_modules(
            tokenizer=tokenizer, text_encoder=text_encoder, vae=vae, scheduler=scheduler, transformer=transformer
        )

    @property
    def guidance_scale(self) -> float:
        return self._guidance_scale

    @property
    def do_classifier_free_guidance(self) -> bool:
        return self._guidance_scale > 1

    @property
    def num_timesteps(self) -> int:
        return self._num_timesteps

    def encode_prompt(
        self,
        prompt: Any,
        negative_prompt: Any = None,
        do_classifier_free_guidance: bool = True,
        num_videos_per_prompt: int = 1,
        max_sequence_length: int = 64,
        prompt_embeds: Tensor | None = None,
        prompt_attention_mask: Tensor | None = None,
        negative_prompt_embeds: Tensor | None = None,
        negative_prompt_attention_mask: Tensor | None = None,
    ) -> tuple[Tensor, Tensor, Tensor | None, Tensor | None]:
        """Embeddings (B, S, D) and their mask (B, S), for the prompts and for the negative ones."""
        options = {"length": max_sequence_length, "videos": num_videos_per_prompt}
        if prompt_embeds is None:
            prompt_embeds, prompt_attention_mask = self._encode(prompt, **options)
        if do_classifier_free_guidance and negative_prompt_embeds is None:
            texts = len(prompt_embeds) // num_videos_per_prompt
            negatives = negative_prompt if isinstance(negative_prompt, list) else [negative_prompt or ""] * texts
            negative_prompt_embeds, negative_prompt_attention_mask = self._encode(negatives, **options)
        return prompt_embeds, prompt_attention_mask, negative_prompt_embeds, negative_prompt_attention_mask

    def _encode(self, texts: Any, length: int, videos: int) -> tuple[Tensor, Tensor]:
        tokens = self.tokenizer(
            [texts] if isinstance(texts, str) else texts,
            padding="max_length",
            max_length=length,
            truncation=True,
            return_tensors="pt",
        ).to(self.text_encoder.device)
        embeds = self.text_encoder(tokens.input_ids, tokens.attention_mask).last_hidden_state
        return embeds.repeat_interleave(videos, 0), tokens.attention_mask.bool().repeat_interleave(videos, 0)

    @torch.no_grad()
    def __call__(
        self,
        prompt: Any = None,
        negative_prompt: Any = None,
        height: int = 64,
        width: int = 96,
        num_frames: int = 17,
        num_inference_steps: int = 20,
        guidance_scale: float = 5.0,
        num_videos_per_prompt: int = 1,
        generator: Any = None,
        latents: Tensor | None = None,
        prompt_embeds: Tensor | None = None,
        prompt_attention_mask: Tensor | None = None,
        negative_prompt_embeds: Tensor | None = None,
        negative_prompt_attention_mask: Tensor | None = None,
        output_type: str = "np",
        callback_on_step_end: Any = None,
        max_sequence_length: int = 64,
    ) -> Any:
        """Videos of a prompt."""
        self._guidance_scale = guidance_scale
        device, dtype = self._execution_device, self.transformer.dtype
        text, mask, negative, negative_mask = self.encode_prompt(
            prompt,
            negative_prompt,
            self.do_classifier_free_guidance,
            num_videos_per_prompt,
            max_sequence_length,
            prompt_embeds,
            prompt_attention_mask,
            negative_prompt_embeds,
            negative_prompt_attention_mask,
        )
        frames, rows, columns = (num_frames - 1) // 4 + 1, height // 8, width // 8
        if latents is None:
            shape = (len(text), frames, rows, columns, self.transformer.config.in_channels)
            latents = randn_tensor(shape, generator=generator, device=device)
        latents = latents.to(device)
        rotary = rotary_tables(
            torch.arange(frames, device=device), rows // 2, columns // 2, self.transformer.config.attention_head_dim
        )
        self.scheduler.set_timesteps(num_inference_steps, device=device)
        self._num_timesteps = len(self.scheduler.timesteps)
        for index, t in enumerate(self.scheduler.timesteps):
            common = {
                "hidden_states": latents.to(dtype),
                "timestep": t.expand(len(latents)),
                "image_rotary_emb": rotary,
                "return_dict": False,
            }
            predicted = self.transformer(encoder_hidden_states=text.to(dtype), encoder_attention_mask=mask, **common)[
                0
            ]
            if self.do_classifier_free_guidance:
                other = self.transformer(
                    encoder_hidden_states=negative.to(dtype), encoder_attention_mask=negative_mask, **common
                )[0]
                predicted = other + guidance_scale * (predicted - other)
            latents = self.scheduler.step(predicted, t, latents, return_dict=False)[0]
            if callback_on_step_end is not None:
                latents = callback_on_step_end(self, index, t, {"latents": latents}).pop("latents", latents)
        frames = latents
        if output_type != "latent":
            config = self.vae.config
            mean, std = (torch.tensor(values, device=device) for values in (config.latents_mean, config.latents_std))
            video = self.vae.decode((latents * std + mean).movedim(-1, 1).to(self.vae.dtype)).sample
            frames = (video / 2 + 0.5).clamp(0, 1).movedim(1, 2).float()
            if output_type == "np":
                frames = frames.movedim(2, -1).cpu().numpy()
        self.maybe_free_model_hooks()
        return SimpleNamespace(frames=frames)


class ToyFamily(Family):
    """The toy DiT, of any size."""

    key = "toy"
    transformer_classes = ("ToyTransformer3DModel",)
    pipeline_class = "ToyPipeline"
    classes = (ToyTransformer3DModel, ToyPipeline)
    max_text_tokens = 64
    text_first = True
    text_arguments = ("encoder_hidden_states", "encoder_attention_mask")
    prompt_arguments = (
        "prompt_embeds",
        "negative_prompt_embeds",
        "prompt_attention_mask",
        "negative_prompt_attention_mask",
    )

    def transformer_problem(self, transformer: Any) -> str | None:
        return None

    def pipeline_problem(self, pipe: Any) -> str | None:
        return None

    def describe(self, transformer: Any) -> dict[str, Any]:
        names = ("num_layers", "num_attention_heads", "attention_head_dim", "in_channels", "text_dim")
        return {"family": self.key, **{name: transformer.config[name] for name in names}}

    def blocks(self, transformer: Any) -> list[nn.Module]:
        return list(transformer.blocks)

    def self_attention(self, block: Any) -> nn.Module:
        return block.attn

    def cross_attentions(self, block: Any) -> list[nn.Module]:
        return []

    def text_modules(self, block: Any) -> list[nn.Module]:
        attention = block.attn
        of_text = [attention.add_q_proj, attention.add_k_proj, attention.add_v_proj, attention.to_add_out]
        return [*of_text, block.norm1_context, block.norm2_context, block.ff_context]

    def text_width(self, transformer: Any) -> int:
        return transformer.config.text_dim

    def patch_size(self, transformer: Any) -> tuple[int, int, int]:
        return PATCH

    def target_modules(self, transformer: Any) -> list[str]:
        # The last block's text goes nowhere; what makes its output would never get a gradient.
        attention = ("to_q", "to_k", "to_v", "to_out.0", "add_k_proj", "add_v_proj")
        return [*(f"attn.{name}" for name in attention), "ff.0", "ff.2"]

    def no_text(self, transformer: Any, like: Tensor, tokens: int = 1) -> Text:
        mask = torch.zeros(len(like), tokens, dtype=torch.bool, device=like.device)
        return {**super().no_text(transformer, like, tokens), "encoder_attention_mask": mask}

    def forward_arguments(self, transformer: Any, latents: Tensor, sigmas: Tensor, text: Text) -> dict[str, Any]:
        frames = torch.arange(latents.shape[2], device=latents.device)
        return {
            "hidden_states": latents.movedim(1, -1),
            "timestep": sigmas * 1000,
            **text,
            "image_rotary_emb": self._tables(transformer, frames, latents.shape[-2:]),
            "return_dict": False,
        }

    def _tables(self, transformer: Any, frames: Tensor, size: Any, corner: tuple[int, int] = (0, 0)) -> Any:
        return rotary_tables(frames, size[0] // 2, size[1] // 2, transformer.config.attention_head_dim, corner)

    def prediction(self, transformer: Any, arguments: Any, output: Any) -> Tensor:
        return super().prediction(transformer, arguments, output).movedim(-1, 1)

    def call_shape(self, transformer: Any, arguments: Any) -> tuple[int, int, int, int]:
        batch, frames, rows, columns, _ = arguments["hidden_states"].shape
        return batch, frames, rows // 2, columns // 2

    def reference_arguments(
        self, transformer: Any, clips: Tensor, frames: Tensor, corner: tuple[int, int] = (0, 0)
    ) -> dict[str, Any]:
        arguments = super().reference_arguments(transformer, clips, frames, corner)
        return arguments | {"image_rotary_emb": self._tables(transformer, frames[:, None], clips.shape[-2:], corner)}

    def append_references(
        self, transformer: Any, arguments: dict[str, Any], references: Tensor, *, clean: bool
    ) -> tuple[int, int]:
        video = arguments["hidden_states"]
        check_fit(video.movedim(-1, 1), references)
        batch, frames, rows, columns = self.call_shape(transformer, arguments)
        of_video, of_one = frames * rows * columns, rows * columns
        self.append_timesteps(arguments, batch, of_video, references.shape[2] * of_one, clean=clean)
        every = torch.arange(frames + references.shape[2], device=video.device)
        arguments["hidden_states"] = torch.cat([video, references.movedim(1, -1).to(video)], 1)
        arguments["image_rotary_emb"] = self._tables(transformer, every, references.shape[-2:])
        return of_video, of_one

    def cut_references(self, output: Any, count: int, tokens: int) -> Any:
        if isinstance(output, tuple):
            return (output[0][:, :-count], *output[1:])
        output.sample = output.sample[:, :-count]
        return output

    def load_transformer(self, name: str, **options: Any) -> nn.Module:
        return ToyTransformer3DModel.from_pretrained(name, subfolder="transformer", **loading_options(options))

    def load_pipeline(self, name: str, **options: Any) -> Any:
        return ToyPipeline.from_pretrained(name, use_safetensors=True, **loading_options(options))

    def size_multiples(self, pipe: Any, patch_size: tuple[int, int, int]) -> tuple[int, int, int]:
        return 4, 8 * patch_size[1], 8 * patch_size[2]

    @torch.no_grad()
    def encode_video(self, pipe: Any, video: Tensor) -> Tensor:
        vae = pipe.vae
        latents = vae.encode(video.to(vae.device, vae.dtype)).latent_dist.mode().float().movedim(1, -1)
        mean, std = (
            torch.tensor(part, device=latents.device) for part in (vae.config.latents_mean, vae.config.latents_std)
        )
        return ((latents - mean) / std).movedim(-1, 1)

    @torch.no_grad()
    def encode_text(self, pipe: Any, prompts: list[str], max_sequence_length: int) -> Text:
        embeds, mask, _, _ = pipe.encode_prompt(prompts, None, False, max_sequence_length=max_sequence_length)
        return {"encoder_hidden_states": embeds * mask.unsqueeze(-1), "encoder_attention_mask": mask}

    def pipeline_text(self, text: Text, negative: Text) -> dict[str, Tensor]:
        masks = {"prompt_attention_mask": text, "negative_prompt_attention_mask": negative}
        of_masks = {name: part["encoder_attention_mask"] for name, part in masks.items()}
        return super().pipeline_text(text, negative) | of_masks

    def negative_arguments(self, encoded: Any) -> Text | None:
        return None if encoded[2] is None else dict(zip(self.text_arguments, encoded[2:], strict=True))

    def latents_shape(self, pipe: Any, transformer: Any, videos: int, size: tuple[int, int, int]) -> tuple[int, ...]:
        batch, channels, *grid = super().latents_shape(pipe, transformer, videos, size)
        return batch, *grid, channels

    def flow_shift(self, scheduler: Any, tokens: int) -> float:
        return float(scheduler.config.shift)


FAMILY = ToyFamily()


class ViTMSNTeacher(Teacher):
    """Masked siamese networks (arXiv 2204.07141): one class token; positions are interpolated."""

    model_types = ("vit_msn",)
    model_class = "ViTMSNModel"
    class_tokens = 1
    tiny_config = {
        "hidden_size": 32,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "intermediate_size": 64,
        "patch_size": 4,
        "image_size": 24,
    }

    def run_model(self, pixels: Tensor, output_hidden_states: bool) -> Any:
        return self.model(
            pixel_values=pixels, output_hidden_states=output_hidden_states, interpolate_pos_encoding=True
        )
