"""Folders with nothing but configs, of Wan's own sizes and of a tiny one, and recipes on top of them."""

import json
from pathlib import Path

import pytest
import torch
import yaml
from diffusers import AutoencoderKLWan, FlowMatchEulerDiscreteScheduler, WanTransformer3DModel
from tiny_models import save_tiny_pipeline, tiny_dinov2
from transformers import Dinov2Config, UMT5Config

from refalign_adapter.estimate.setting import Asked, read_setting
from refalign_adapter.recipes.file import load_recipe

WAN = {
    "1.3b": {"num_layers": 30, "num_attention_heads": 12, "ffn_dim": 8960},
    "14b": {"num_layers": 40, "num_attention_heads": 40, "ffn_dim": 13824},
    "5b": {"num_layers": 30, "num_attention_heads": 24, "ffn_dim": 14336, "in_channels": 48, "out_channels": 48},
    "short": {"num_layers": 6, "num_attention_heads": 12, "ffn_dim": 8960},
}
VAE_OF_22 = {
    "base_dim": 160,
    "decoder_base_dim": 256,
    "z_dim": 48,
    "is_residual": True,
    "patch_size": 2,
    "in_channels": 12,
    "out_channels": 12,
    "scale_factor_spatial": 16,
    "latents_mean": [0.0] * 48,
    "latents_std": [1.0] * 48,
}
PARTS = {
    "scheduler": ["diffusers", "FlowMatchEulerDiscreteScheduler"],
    "text_encoder": ["transformers", "UMT5EncoderModel"],
    "tokenizer": ["transformers", "T5TokenizerFast"],
    "transformer": ["diffusers", "WanTransformer3DModel"],
    "vae": ["diffusers", "AutoencoderKLWan"],
}


def write_configs(folder: Path, transformer: dict[str, int]) -> None:
    """A Wan in diffusers' folder format, without weights."""
    of_22 = transformer.get("in_channels") == 48
    with torch.device("meta"):
        WanTransformer3DModel(**transformer).save_config(folder / "transformer")
        AutoencoderKLWan(**VAE_OF_22 if of_22 else {}).save_config(folder / "vae")
    FlowMatchEulerDiscreteScheduler(shift=5.0 if of_22 else 3.0).save_config(folder / "scheduler")
    UMT5Config(vocab_size=256384, d_model=4096, d_kv=64, d_ff=10240, num_layers=24, num_heads=64).save_pretrained(
        folder / "text_encoder"
    )
    (folder / "model_index.json").write_text(
        json.dumps({"_class_name": "WanPipeline", "expand_timesteps": of_22, **PARTS})
    )


@pytest.fixture(scope="session")
def wan(tmp_path_factory):
    """A folder with `1.3b`, `14b`, `5b`, `short` (1.3b with 6 blocks) and `teacher`, configs alone."""
    folder = tmp_path_factory.mktemp("wan")
    for name, config in WAN.items():
        write_configs(folder / name, config)
    Dinov2Config().save_pretrained(folder / "teacher")
    return folder


@pytest.fixture(scope="session")
def tiny(tmp_path_factory):
    """A folder with a whole tiny `base`, a `teacher` and `recipe.yaml`."""
    folder = tmp_path_factory.mktemp("tiny")
    save_tiny_pipeline(folder / "base")
    tiny_dinov2(folder / "teacher")
    values = {
        "pretrained_model_name_or_path": str(folder / "base"),
        "output_dir": str(folder / "out"),
        "mixed_precision": "no",
        "min_8bit_size": 16,
        "report_to": None,
        "adapter": {
            "attention": "joint",
            "r": 4,
            "lora_alpha": 4,
            "align_layers": 2,
            "teachers": [str(folder / "teacher")],
            "max_sequence_length": 16,
        },
        "data": {"cache_dir": str(folder / "cache"), "height": 32, "width": 48, "num_frames": 5, "dtype": "fp32"},
    }
    (folder / "recipe.yaml").write_text(yaml.safe_dump(values))
    return folder


@pytest.fixture
def setting_of(tiny):
    """`setting_of("key=value", …, rows=1)`: the tiny recipe's setting, changed; keywords are fields of `Asked`."""

    def make(*overrides, **asked):
        return read_setting(load_recipe(tiny / "recipe.yaml", overrides), Asked(**asked))

    return make


@pytest.fixture
def wan_setting(wan):
    """`wan_setting("14b", "key=value", …)`: the setting of a recipe that comes along, on configs alone."""

    def make(name, *overrides, **asked):
        model = "wan2.2-ti2v-5b" if name == "5b" else f"wan2.1-t2v-{name}"
        recipe = Path(__file__).parents[2] / f"recipes/configs/{model}/stage1.yaml"
        here = [f"pretrained_model_name_or_path={wan / name}", f"adapter.teachers=[{wan / 'teacher'}]"]
        return read_setting(load_recipe(recipe, [*here, *overrides]), Asked(**asked))

    return make
