"""LTX-Video 0.9 at its own size, from configs alone: what training on it holds in memory."""

import json

import pytest
import torch
import yaml
from diffusers import AutoencoderKLLTXVideo, FlowMatchEulerDiscreteScheduler, LTXVideoTransformer3DModel
from tiny_ltx import SCHEDULER
from tiny_models import tiny_dinov2
from transformers import T5Config

from refalign_adapter.estimate.memory import caching_memory, training_memory
from refalign_adapter.estimate.setting import Asked, read_setting
from refalign_adapter.recipes.file import load_recipe

PARAMETERS = 1_923_385_472
PARTS = {
    "scheduler": ["diffusers", "FlowMatchEulerDiscreteScheduler"],
    "text_encoder": ["transformers", "T5EncoderModel"],
    "tokenizer": ["transformers", "T5Tokenizer"],
    "transformer": ["diffusers", "LTXVideoTransformer3DModel"],
    "vae": ["diffusers", "AutoencoderKLLTXVideo"],
}


@pytest.fixture(scope="module")
def recipe(tmp_path_factory):
    folder = tmp_path_factory.mktemp("ltx")
    base = folder / "base"
    with torch.device("meta"):
        LTXVideoTransformer3DModel().save_config(base / "transformer")
        AutoencoderKLLTXVideo().save_config(base / "vae")
    FlowMatchEulerDiscreteScheduler(**SCHEDULER).save_config(base / "scheduler")
    config = T5Config(
        vocab_size=32128,
        d_model=4096,
        d_kv=64,
        d_ff=10240,
        num_layers=24,
        num_heads=64,
        feed_forward_proj="gated-gelu",
    )
    config.save_pretrained(base / "text_encoder")
    (base / "model_index.json").write_text(json.dumps({"_class_name": "LTXPipeline", **PARTS}))
    tiny_dinov2(folder / "teacher")
    values = {
        "pretrained_model_name_or_path": str(base),
        "output_dir": str(folder / "out"),
        "mixed_precision": "bf16",
        "optimizer": "AdamW",
        "report_to": None,
        "gradient_checkpointing": True,
        "adapter": {"r": 64, "teachers": [str(folder / "teacher")], "max_sequence_length": 128},
        "data": {"cache_dir": "cache", "height": 512, "width": 704, "num_frames": 121, "fps": 25},
    }
    (folder / "recipe.yaml").write_text(yaml.safe_dump(values))
    return folder / "recipe.yaml"


def test_weights_and_lora_take_what_their_shapes_say(recipe):
    changes = ["adapter.attention=isolated", "adapter.lora_scope=all"]
    setting = read_setting(load_recipe(recipe, changes), Asked(rows=100))
    memory = training_memory(setting)
    assert memory.base == 2 * PARAMETERS
    assert memory.lora_parameters == 28 * 64 * (8 * (2048 + 2048) + 2 * (2048 + 8192))
    captions = {part.name: part.bytes for part in caching_memory(setting.models).captions.parts}
    # T5 v1.1 XXL's encoder: 4.76 thousand million parameters
    assert captions["text encoder"] == 2 * 4_762_310_656
