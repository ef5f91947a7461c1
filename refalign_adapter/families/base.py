"""What the package needs to know of a DiT family.

Shape letters: B batch, C latent channels, F latent frames, H and W latent height and width, S text tokens, D text
width.

Text is a dict of tensors (B, …) under the names of the transformer's arguments that hold it (`Family.text_arguments`),
from the text encoder through cache and batch to the transformer: embeddings (B, S, D), masks (B, S) bool, pooled
vectors and whatever else a model has; each a floating point or a bool tensor.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from typing import Any

import torch
from diffusers import __version__ as diffusers_version
from packaging.version import Version
from torch import Tensor, nn

from ..batch import EMBEDDING
from ..errors import UserError

Text = dict[str, Tensor]
RENAMED_DTYPE = Version("0.42")
"""diffusers that takes `dtype` and warns of `torch_dtype`; older ones pass over `dtype` without a word."""


class Family(ABC):
    """One DiT family: where its parts are, how its inputs are made. Stateless; models are passed in.

    The rest of the package relies on these ways of diffusers. The transformer is a `ModelMixin` with
    `PeftAdapterMixin`; its blocks' self-attention has `set_processor`, and a processor that attends by
    `dispatch_attention_fn` or `F.scaled_dot_product_attention`. The pipeline's call takes `prompt`, `negative_prompt`,
    `height`, `width`, `num_frames`, `guidance_scale`, `latents` and `output_type`; it asks
    `do_classifier_free_guidance` in every step, calls the transformer with the prompt, then with the negative one, or
    once with both (`batched_guidance`), and takes u + s · (c − u); it has `encode_prompt`, `guidance_scale`,
    `num_timesteps` and a `scheduler`.

    What several of diffusers' models call alike (`attn1`, `attn2`, `to_k`, `to_v` …) is the default here.

    Attributes:
        key: the name it is known by, equal to its file's or its entry point's.
        transformer_classes: names of the transformer classes it covers, diffusers' or its own.
        pipeline_class: name of the text-to-video pipeline class, likewise.
        classes: those of its models and pipelines that are not diffusers' or transformers'; a base's model_index.json
            may name these too, by module and class.
        max_text_tokens: of a prompt at most; what is longer is cut by the family's own pipeline or was never trained.
        text_first: whether text tokens stand before video tokens where they share an attention.
        video_argument, timestep_argument: names of the transformer's forward arguments for latents and timesteps.
        text_arguments: names of those that hold what the text encoder made of a prompt, its embeddings first.
        prompt_arguments: names of the pipeline call's arguments that have a row for each prompt: embeddings, those of
            negative prompts, and what else goes with them, such as masks.
        batched_guidance: whether the pipeline's loop calls the transformer once for both prompts, the negative ones in
            the batch's first half, and multiplies by the `guidance_scale` that the pipeline has at that step.
        timestep_per_token: whether the transformer takes timesteps (B, tokens) too.
        frame_rate: frames a second of which positions are made, where they count seconds; clips are sampled at it.
            None: positions count frames.
    """

    key: str
    transformer_classes: tuple[str, ...]
    pipeline_class: str
    classes: tuple[type, ...] = ()
    max_text_tokens: int = 512
    text_first: bool = False
    video_argument: str = "hidden_states"
    timestep_argument: str = "timestep"
    text_arguments: tuple[str, ...] = (EMBEDDING,)
    prompt_arguments: tuple[str, ...] = ("prompt_embeds", "negative_prompt_embeds")
    batched_guidance: bool = False
    timestep_per_token: bool = False
    frame_rate: float | None = None

    @abstractmethod
    def transformer_problem(self, transformer: Any) -> str | None:
        """Why this variant cannot take references, in one line; None when it can."""

    @abstractmethod
    def pipeline_problem(self, pipe: Any) -> str | None:
        """Why this pipeline cannot take references, in one line; None when it can."""

    @abstractmethod
    def describe(self, transformer: Any) -> dict[str, Any]:
        """JSON facts that decide whether an adapter fits a model; saved with the adapter."""

    @abstractmethod
    def blocks(self, transformer: Any) -> list[nn.Module]:
        """The transformer blocks in order; each returns what `block_tokens` finds video tokens in."""

    def self_attention(self, block: Any) -> nn.Module:
        """The block's self-attention, which calls its `processor`; text tokens may share it."""
        return block.attn1

    def cross_attentions(self, block: Any) -> list[nn.Module]:
        """The block's attentions of video tokens to something else, such as the text; references skip them."""
        return [block.attn2]

    def text_modules(self, block: Any) -> list[nn.Module]:
        """The block's modules that no video token's keys, values or features come from."""
        return self.cross_attentions(block)

    def block_tokens(self, output: Any) -> Tensor:
        """The video tokens (B, tokens, dim) of what a block returns."""
        return output[0] if isinstance(output, tuple) else output

    def key_value_layers(self, block: Any) -> list[nn.Module]:
        """The linear layers of the block's self-attention that make keys and values."""
        attention: Any = self.self_attention(block)
        return [attention.to_k, attention.to_v]

    def rotary_embedding(self, transformer: Any) -> nn.Module | None:
        """The module that makes rotary embeddings of the latents it is called with; None: positions are arguments of
        the transformer, which `reference_arguments` makes."""
        return None

    def rotary_at(self, transformer: Any, latents: Tensor, frames: Tensor, corner: tuple[int, int] = (0, 0)) -> Any:
        """What that module returns, for one-frame latents (R, C, 1, H, W) whose temporal indices are `frames` (R,) and
        whose rows and columns of tokens begin at `corner`; from -1 on and however large.

        The values of `frames` are not read, so that a GPU is not waited for."""
        raise NotImplementedError

    def hidden_size(self, transformer: Any) -> int:
        """Width of a token."""
        return transformer.config.num_attention_heads * transformer.config.attention_head_dim

    @abstractmethod
    def text_width(self, transformer: Any) -> int:
        """Width of the prompt embeddings it takes."""

    @abstractmethod
    def patch_size(self, transformer: Any) -> tuple[int, int, int]:
        """Latent frames, rows and columns that make one token."""

    @abstractmethod
    def target_modules(self, transformer: Any) -> list[str]:
        """Names of the linear layers that get LoRA by default: ends of names, or whole ones."""

    def no_text(self, transformer: Any, like: Tensor, tokens: int = 1) -> Text:
        """Text that says nothing, all zeros, for as many samples as `like` (B, …) has, of its type and on its device;
        masks are bool. `encode_text` makes tensors of these shapes with `max_sequence_length` for `tokens`."""
        return {self.text_arguments[0]: like.new_zeros(len(like), tokens, self.text_width(transformer))}

    @abstractmethod
    def forward_arguments(self, transformer: Any, latents: Tensor, sigmas: Tensor, text: Text) -> dict[str, Any]:
        """Keyword arguments of the transformer, in whatever layout and with whatever else it takes.

        Args:
            transformer: the DiT.
            latents: (B, C, F, H, W) noisy ones.
            sigmas: (B,) in [0, 1].
            text: as `encode_text` makes it, or `no_text`.
        """

    def prediction(self, transformer: Any, arguments: Mapping[str, Any], output: Any) -> Tensor:
        """The velocity (B, C, F, H, W) in what the transformer returned when it was called with `arguments`."""
        return output[0] if isinstance(output, tuple) else output.sample

    def channels(self, transformer: Any) -> int:
        """C, of its latents."""
        return transformer.config.in_channels

    def call_shape(self, transformer: Any, arguments: Mapping[str, Any]) -> tuple[int, int, int, int]:
        """Batch, and frames, rows and columns in tokens, of a call's arguments."""
        video = arguments[self.video_argument]
        frames, rows, columns = (
            size // patch for size, patch in zip(video.shape[2:], self.patch_size(transformer), strict=True)
        )
        return video.shape[0], frames, rows, columns

    def reference_arguments(
        self, transformer: Any, clips: Tensor, frames: Tensor, corner: tuple[int, int] = (0, 0)
    ) -> dict[str, Any]:
        """A call on references alone, without noise or text.

        Args:
            transformer: the DiT.
            clips: (R, C, 1, h, w), each a clip of one latent frame.
            frames, corner: their places, see `rotary_at`; what that module does need not be done here.
        """
        sigmas = torch.zeros(len(clips), device=clips.device)
        return self.forward_arguments(transformer, clips, sigmas, self.no_text(transformer, clips))

    def append_references(
        self, transformer: Any, arguments: dict[str, Any], references: Tensor, *, clean: bool
    ) -> tuple[int, int]:
        """Change a call's arguments so that references (B, C, M, h, w) ride along as further frames.

        Args:
            transformer: the DiT.
            arguments: by name, changed in place.
            references: of the video's height and width.
            clean: whether their tokens are at timestep 0 instead of the video's.

        Returns:
            Tokens of the video, which come first, and of one reference.

        Raises:
            UserError: references of another size, or a model that takes one timestep per sample only.
        """
        video = arguments[self.video_argument]
        check_fit(video, references)
        batch, frames, rows, columns = self.call_shape(transformer, arguments)
        of_video, of_one = frames * rows * columns, rows * columns
        self.append_timesteps(arguments, batch, of_video, references.shape[2] * of_one, clean=clean)
        arguments[self.video_argument] = torch.cat([video, references.to(video)], 2)
        return of_video, of_one

    def append_timesteps(
        self, arguments: dict[str, Any], batch: int, tokens: int, references: int, *, clean: bool
    ) -> None:
        """Change a call's timesteps for references that ride along, where that of each sample will not do.

        Args:
            arguments: by name, changed in place; the timestep is one for all, for each sample or for each token.
            batch: B.
            tokens: of the video, first in the sequence.
            references: tokens of the references, after them.
            clean: whether those are at timestep 0; else at that of the sample's last token.

        Raises:
            UserError: `clean`, of a model that takes one timestep per sample only.
        """
        timestep: Tensor = arguments[self.timestep_argument]
        if clean and not self.timestep_per_token:
            raise UserError(
                f"reference_timestep: {self.key!r} takes one timestep per sample, which references share with the "
                "video; use 'video'"
            )
        if clean or timestep.ndim == 2:
            of_video = timestep if timestep.ndim == 2 else timestep.reshape(-1, 1).expand(batch, tokens)
            of_references = of_video[:, -1:].expand(-1, references)
            timesteps = [of_video, torch.zeros_like(of_references) if clean else of_references]
            arguments[self.timestep_argument] = torch.cat(timesteps, 1)

    def cut_references(self, output: Any, count: int, tokens: int) -> Any:
        """The transformer's output without what `count` references, of `tokens` tokens in all, added to it."""
        if isinstance(output, tuple):
            return (output[0][:, :, :-count], *output[1:])
        output.sample = output.sample[:, :, :-count]
        return output

    @abstractmethod
    def load_transformer(self, name: str, **options: Any) -> nn.Module:
        """Load the transformer alone from a diffusers folder or Hub id; `options` as in `from_pretrained`.

        What older versions of diffusers call `torch_dtype` is `dtype`, see `loading_options`.
        """

    def load_encoders(self, name: str, **options: Any) -> Any:
        """Load the pipeline without its transformer: VAE, text encoder, tokenizer, scheduler; `options` likewise."""
        return self.load_pipeline(name, transformer=None, **options)

    @abstractmethod
    def load_pipeline(self, name: str, **options: Any) -> Any:
        """Load the whole text-to-video pipeline; `options` likewise."""

    @abstractmethod
    def size_multiples(self, pipe: Any, patch_size: tuple[int, int, int]) -> tuple[int, int, int]:
        """(t, h, w): frames must be k · t + 1, height a multiple of h and width of w, in pixels."""

    @abstractmethod
    def encode_video(self, pipe: Any, video: Tensor) -> Tensor:
        """Videos (B, 3, frames, height, width) in [−1, 1] to normalised latents (B, C, F, H, W), float32."""

    def encode_images(self, pipe: Any, images: Tensor) -> Tensor:
        """Images (B, 3, height, width) in [−1, 1] to normalised one-frame latents (B, C, H, W), float32."""
        return self.encode_video(pipe, images.unsqueeze(2)).squeeze(2)

    @abstractmethod
    def encode_text(self, pipe: Any, prompts: list[str], max_sequence_length: int) -> Text:
        """Prompts to what the transformer takes of them, padded to `max_sequence_length` tokens each; the shapes are
        those of `no_text`. Zeros at a tensor's end, such as rows past a prompt's last token, cost a cache nothing."""

    def pipeline_text(self, text: Text, negative: Text) -> dict[str, Tensor]:
        """The pipeline call's arguments for prompts and negative ones, each as `encode_text` makes them."""
        name = self.text_arguments[0]
        return {"prompt_embeds": text[name], "negative_prompt_embeds": negative[name]}

    def stock_scale(self, arguments: Mapping[str, Any]) -> float:
        """The guidance scale that the pipeline's own loop multiplies by, from the arguments of its call."""
        return arguments["guidance_scale"]

    def negative_arguments(self, encoded: Any) -> Text | None:
        """The transformer's text arguments for the negative prompt, from what the pipeline's `encode_prompt` returned;
        None when there is no negative prompt."""
        return None if encoded[1] is None else {self.text_arguments[0]: encoded[1]}

    def latents_shape(self, pipe: Any, transformer: Any, videos: int, size: tuple[int, int, int]) -> tuple[int, ...]:
        """Shape of the noise that the pipeline's call takes as `latents`; size is (frames, height, width)."""
        patch = self.patch_size(transformer)
        time, rows, columns = self.size_multiples(pipe, patch)
        frames, height, width = size
        channels = transformer.config.in_channels
        return videos, channels, (frames - 1) // time + 1, height * patch[1] // rows, width * patch[2] // columns

    @abstractmethod
    def flow_shift(self, scheduler: Any, tokens: int) -> float:
        """The timestep shift that the model's scheduler is configured with, for a video of so many tokens."""


def check_fit(video: Tensor, references: Tensor) -> None:
    """Compare latents (B, C, F, H, W) with references (B, C, M, h, w) that are to ride along.

    Raises:
        UserError: another batch, other channels or another size.
    """
    wanted, got = ((item.shape[0], item.shape[1], *item.shape[3:]) for item in (video, references))
    if wanted != got:
        raise UserError(
            f"references must fit the video's batch, channels, height and width {wanted}, got {got}; "
            "joint attention needs references on the video's own canvas"
        )


def loading_options(options: dict[str, Any]) -> dict[str, Any]:
    """Options for `from_pretrained` with `dtype` under the name that the installed diffusers has for it."""
    if "dtype" not in options or Version(diffusers_version) >= RENAMED_DTYPE:
        return options
    return {"torch_dtype" if name == "dtype" else name: value for name, value in options.items()}
