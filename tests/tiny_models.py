"""Small random models of the real classes, the same in every test: fixed seeds, built once, copied out.

The VAE compresses 4x in time and 8x in space like Wan 2.1's and has its 16 channels; the text encoder is 32 wide.
"""

import copy
import shutil
import tempfile
from functools import cache
from pathlib import Path
from typing import Any

import torch
from diffusers import AutoencoderKLWan, FlowMatchEulerDiscreteScheduler, WanPipeline, WanTransformer3DModel
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors
from transformers import Dinov2Config, Dinov2Model, PreTrainedTokenizerFast, UMT5Config, UMT5EncoderModel

TRANSFORMER = {
    "num_attention_heads": 2,
    "attention_head_dim": 24,
    "in_channels": 16,
    "out_channels": 16,
    "text_dim": 32,
    "freq_dim": 32,
    "ffn_dim": 96,
    "num_layers": 3,
    "cross_attn_norm": True,
}


def tiny_transformer(seed: int = 0, **overrides: Any) -> WanTransformer3DModel:
    """A Wan transformer of width 48 with 3 blocks; `overrides` are fields of its config."""
    with torch.random.fork_rng([]):
        torch.manual_seed(seed)
        return WanTransformer3DModel(**TRANSFORMER | overrides)


@cache
def _vae() -> AutoencoderKLWan:
    with torch.random.fork_rng([]):
        torch.manual_seed(1)
        return AutoencoderKLWan(base_dim=8, z_dim=16, dim_mult=[1, 1, 1, 1], num_res_blocks=1).eval()


def tiny_vae() -> AutoencoderKLWan:
    """A random VAE of Wan 2.1's shape: 16 latent channels, 4x in time, 8x in space; eval mode."""
    return copy.deepcopy(_vae())


@cache
def _text() -> tuple[UMT5EncoderModel, Any]:
    special = ["<pad>", "</s>", "<unk>"]
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {token: index for index, token in enumerate([*special, *alphabet])}
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=[], unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.post_processor = processors.TemplateProcessing(single="$A </s>", special_tokens=[("</s>", 1)])
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="<pad>", eos_token="</s>", unk_token="<unk>", model_max_length=512
    )
    config = UMT5Config(
        vocab_size=len(vocabulary), d_model=32, d_kv=8, d_ff=64, num_layers=2, num_heads=4, pad_token_id=0
    )
    with torch.random.fork_rng([]):
        torch.manual_seed(2)
        return UMT5EncoderModel(config).eval(), fast


def tiny_text() -> tuple[UMT5EncoderModel, Any]:
    """(text encoder of width 32, tokenizer with one token per byte)."""
    return copy.deepcopy(_text())


def tiny_pipeline(seed: int = 0, **overrides: Any) -> WanPipeline:
    """A text-to-video pipeline of the parts above, shift 3.0; `overrides` are fields of the transformer's config."""
    encoder, tokenizer = tiny_text()
    return WanPipeline(
        tokenizer=tokenizer,
        text_encoder=encoder,
        vae=tiny_vae(),
        scheduler=FlowMatchEulerDiscreteScheduler(shift=3.0),
        transformer=tiny_transformer(seed, **overrides),
    )


@cache
def _high_compression_vae() -> AutoencoderKLWan:
    generator = torch.Generator().manual_seed(4)
    mean, std = torch.randn(48, generator=generator), 0.5 + torch.rand(48, generator=generator)
    with torch.random.fork_rng([]):
        torch.manual_seed(1)
        return AutoencoderKLWan(
            base_dim=8,
            z_dim=48,
            dim_mult=[1, 1, 1, 1],
            num_res_blocks=1,
            is_residual=True,
            patch_size=2,
            in_channels=12,
            out_channels=12,
            scale_factor_spatial=16,
            latents_mean=mean.tolist(),
            latents_std=std.tolist(),
        ).eval()


def tiny_pipeline_of_22(seed: int = 0, **overrides: Any) -> WanPipeline:
    """Likewise of Wan 2.2 TI2V-5B's shape: 48 latent channels, 16x in space, a timestep for every token."""
    pipe = tiny_pipeline(seed, **{"in_channels": 48, "out_channels": 48} | overrides)
    components = pipe.components | {"vae": copy.deepcopy(_high_compression_vae())}
    return WanPipeline(**components, expand_timesteps=True)


@cache
def _saved_pipeline() -> tempfile.TemporaryDirectory:
    folder = tempfile.TemporaryDirectory(prefix="tiny-pipeline-")
    tiny_pipeline().save_pretrained(folder.name)
    return folder


def save_tiny_pipeline(folder: str | Path, **overrides: Any) -> Path:
    """Write the pipeline in diffusers' folder format; returns the folder."""
    if overrides:
        tiny_pipeline(**overrides).save_pretrained(folder)
    else:
        shutil.copytree(_saved_pipeline().name, folder, dirs_exist_ok=True)
    return Path(folder)


def tiny_dinov2(folder: str | Path, *, hidden_size: int = 24, seed: int = 3) -> Path:
    """Write a DINOv2 with patches of 14 pixels and width `hidden_size` as transformers does; returns the folder."""
    config = Dinov2Config(
        hidden_size=hidden_size, num_hidden_layers=2, num_attention_heads=2, mlp_ratio=2, image_size=56, patch_size=14
    )
    with torch.random.fork_rng([]):
        torch.manual_seed(seed)
        Dinov2Model(config).save_pretrained(folder)
    return Path(folder)
