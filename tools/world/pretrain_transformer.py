"""The world's tiny text encoder and diffusion transformer: real `UMT5EncoderModel` and `WanTransformer3DModel`.

Both are trained together on text to video, without references, by rectified flow with Wan's timestep shift. Most
batches are clips; some are the subjects' stills, as Wan's own training mixes images with videos.

Shape letters: B batch, C latent channels, F latent frames, H and W latent height and width, S text tokens.
"""

from collections.abc import Callable
from typing import Any

import torch
from diffusers import WanTransformer3DModel
from pretrain_vae import STILL_PLACE
from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, processors
from torch import Tensor, nn
from torch.nn import functional
from transformers import PreTrainedTokenizerFast, UMT5Config, UMT5EncoderModel

from refalign_adapter.flow import TIMESTEPS, flow_loss, interpolate, sample_sigmas, velocity_target
from refalign_adapter.world.backgrounds import BACKGROUNDS
from refalign_adapter.world.motions import MOTIONS
from refalign_adapter.world.subjects import KINDS

SHIFT = 3.0
TEXT_CONFIG: dict[str, Any] = {
    "d_model": 96,
    "d_kv": 24,
    "num_heads": 4,
    "d_ff": 192,
    "num_layers": 2,
    "dropout_rate": 0.0,
}
TRANSFORMER_CONFIG: dict[str, Any] = {
    "patch_size": (1, 2, 2),
    "num_attention_heads": 4,
    "attention_head_dim": 32,
    "text_dim": 96,
    "freq_dim": 64,
    "ffn_dim": 512,
    "num_layers": 6,
    "cross_attn_norm": True,
}
TEXT_TOKENS = 32
# Pipelines pad prompts with zeros to various lengths, 512 by default: the transformer must have seen it.
PADDED_LENGTHS = (32, 32, 32, 32, 32, 64, 128, 226, 512)
STILL_BATCHES = 0.15
EMPTY_PROMPTS = 0.1


def build_tokenizer() -> PreTrainedTokenizerFast:
    """A word-level tokenizer of the captions' vocabulary that ends every text with `</s>`."""
    texts = [*KINDS, *MOTIONS, *BACKGROUNDS, STILL_PLACE, "a while and ,"]
    words = sorted({word for text in texts for word in text.split()})
    vocabulary = {word: index for index, word in enumerate(["<pad>", "</s>", "<unk>", *words])}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    tokenizer.normalizer = normalizers.Lowercase()
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.post_processor = processors.TemplateProcessing(
        single="$A </s>", special_tokens=[("</s>", vocabulary["</s>"])]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token="<pad>",
        eos_token="</s>",
        unk_token="<unk>",
        model_max_length=512,
        model_input_names=["input_ids", "attention_mask"],
    )


def build_text_encoder(tokenizer: PreTrainedTokenizerFast) -> UMT5EncoderModel:
    """A text encoder of random weights for this tokenizer's vocabulary."""
    return UMT5EncoderModel(
        UMT5Config(vocab_size=len(tokenizer), pad_token_id=0, eos_token_id=1, decoder_start_token_id=0, **TEXT_CONFIG)
    )


class TextToVideo(nn.Module):
    """The parts that train together. `forward` gives the flow loss of one batch."""

    def __init__(self, channels: int):
        super().__init__()
        self.tokenizer = build_tokenizer()
        self.text_encoder = build_text_encoder(self.tokenizer)
        self.transformer = WanTransformer3DModel(in_channels=channels, out_channels=channels, **TRANSFORMER_CONFIG)

    def tokens(self, captions: list[str]) -> tuple[Tensor, Tensor]:
        """Token ids and attention mask, int64 (B, S) each."""
        tokens = self.tokenizer(
            captions, padding="max_length", max_length=TEXT_TOKENS, truncation=True, return_tensors="pt"
        )
        return tokens.input_ids, tokens.attention_mask

    def forward(
        self, latents: Tensor, tokens: tuple[Tensor, Tensor], padded: int, generator: torch.Generator
    ) -> Tensor:
        """Flow loss of normalised latents (B, C, F, H, W), their captions' tokens padded with zeros to `padded`."""
        ids, mask = tokens
        text = self.text_encoder(ids, attention_mask=mask).last_hidden_state * mask.unsqueeze(-1)
        text = functional.pad(text, (0, 0, 0, padded - text.shape[1]))
        sigmas = sample_sigmas(len(latents), shift=SHIFT, generator=generator)
        noise = torch.randn(latents.shape, generator=generator)
        mixed = interpolate(latents, noise, sigmas)
        velocity = self.transformer(mixed, sigmas * TIMESTEPS, text, return_dict=False)[0]
        return flow_loss(velocity, velocity_target(latents, noise)).mean()


def train_text_to_video(
    model: TextToVideo,
    clips: tuple[Tensor, list[str]],
    stills: tuple[Tensor, list[str]],
    steps: int,
    seed: int,
    log: Callable[[str], None],
    batch_size: int = 8,
    save: Callable[[TextToVideo], None] | None = None,
) -> TextToVideo:
    """Train on normalised latents with captions, and return the moving average of the weights.

    Args:
        clips: latents (B, C, F, H, W) and their captions.
        stills: latents of one frame (B, C, 1, H, W) and their captions.
        steps: optimizer steps.
        save: called with the average every 250 steps.
    """
    generator = torch.Generator().manual_seed(seed)
    average: Any = torch.optim.swa_utils.AveragedModel(model, multi_avg_fn=_warm_average())
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, betas=(0.9, 0.98), weight_decay=0.01)
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda step: min(1.0, (step + 1) / 100, (steps - step) / (0.3 * steps))
    )
    empty = model.tokens([""])
    data = [(latents, model.tokens(captions)) for latents, captions in (clips, stills)]
    recent = 0.0
    for step in range(steps):
        still = bool(torch.rand((), generator=generator) < STILL_BATCHES)
        latents, tokens = data[int(still)]
        rows = torch.randint(len(latents), (batch_size,), generator=generator)
        drop = torch.rand(batch_size, 1, generator=generator) < EMPTY_PROMPTS
        chosen = tuple(torch.where(drop, none, full[rows]) for none, full in zip(empty, tokens, strict=True))
        padded = PADDED_LENGTHS[int(torch.randint(len(PADDED_LENGTHS), (), generator=generator))]
        with torch.autocast("cpu", torch.bfloat16):
            loss = model(latents[rows], chosen, padded, generator)
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        average.update_parameters(model)
        if not still:
            recent = loss.item() if not recent else 0.98 * recent + 0.02 * loss.item()
        if step % 50 == 0:
            log(f"transformer step {step}: loss of clips {recent:.4f}")
        if save and step % 250 == 249:
            save(average.module)
    return average.module.eval().requires_grad_(False)


def _warm_average() -> Callable:
    """Exponential average of decay 0.998, less at the start."""

    def update(averages: list[Tensor], values: list[Tensor], count: Tensor) -> None:
        decay = min(0.998, (1 + int(count)) / (10 + int(count)))
        torch._foreach_lerp_(averages, values, 1 - decay)

    return torch.no_grad()(update)
