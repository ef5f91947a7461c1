"""DINOv3 ViT: a direct call, the published configurations, the published names of weights; without torchvision."""

import pytest
import torch
from safetensors import safe_open
from transformers import DINOv3ViTConfig, DINOv3ViTModel

from refalign_adapter.teachers.base import IMAGENET_MEAN, IMAGENET_STD
from refalign_adapter.teachers.dinov3 import DINOv3Teacher
from refalign_adapter.teachers.lookup import load_teacher

PROCESSOR = {  # as published with facebook/dinov3-vitb16-pretrain-lvd1689m
    "crop_size": None,
    "data_format": "channels_first",
    "default_to_square": True,
    "do_center_crop": None,
    "do_convert_rgb": None,
    "do_normalize": True,
    "do_rescale": True,
    "do_resize": True,
    "image_mean": [0.485, 0.456, 0.406],
    "image_processor_type": "DINOv3ViTImageProcessorFast",
    "image_std": [0.229, 0.224, 0.225],
    "resample": 2,
    "rescale_factor": 0.00392156862745098,
    "size": {"height": 224, "width": 224},
}
PLAIN, GATED = {}, {"use_gated_mlp": True, "hidden_act": "silu"}
PUBLISHED = {  # hidden size, feed-forward size, layers, heads, further fields -> millions of parameters
    "vits16": (384, 1536, 12, 6, PLAIN, 21.6),
    "vitb16": (768, 3072, 12, 12, PLAIN, 85.7),
    "vitl16": (1024, 4096, 24, 16, PLAIN, 303.1),
    "vith16plus": (1280, 5120, 32, 20, GATED, 840.6),
    "vit7b16": (4096, 8192, 40, 32, {**GATED, "query_bias": False, "value_bias": False}, 6716.0),
}


@pytest.mark.parametrize("size", PUBLISHED)
def test_published_configurations(size):
    hidden, intermediate, layers, heads, fields, millions = PUBLISHED[size]
    config = DINOv3ViTConfig(
        hidden_size=hidden,
        intermediate_size=intermediate,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        num_register_tokens=4,
        **fields,
    )
    with torch.device("meta"):
        teacher = DINOv3Teacher(DINOv3ViTModel(config), name=size, processor=PROCESSOR)
    assert (teacher.dim, teacher.patch_size, teacher.extra_tokens) == (hidden, 16, 5)
    assert teacher.native_grid == (14, 14)
    shapes = {key: tuple(value.shape) for key, value in teacher.model.state_dict().items()}
    assert shapes["embeddings.register_tokens"] == (1, 4, hidden)
    assert shapes["embeddings.patch_embeddings.weight"] == (hidden, 3, 16, 16)
    assert "position" not in " ".join(shapes)
    assert sum(value.numel() for value in teacher.parameters()) / 1e6 == pytest.approx(millions, rel=2e-3)


def tiny_model(**fields):
    torch.manual_seed(0)
    return DINOv3ViTModel(DINOv3ViTConfig(**{**DINOv3Teacher.tiny_config, **fields})).eval()


@pytest.mark.parametrize("registers", [0, 4])
def test_equals_a_direct_call_on_a_picture_that_is_not_square(tmp_path, registers):
    model = tiny_model(num_register_tokens=registers)
    model.save_pretrained(tmp_path)
    images = torch.rand(2, 3, 12, 28)
    with torch.no_grad():
        mean, std = (torch.tensor(values).view(3, 1, 1) for values in (IMAGENET_MEAN, IMAGENET_STD))
        states = model((images - mean) / std).last_hidden_state
    features = load_teacher(str(tmp_path)).encode(images, (3, 7))
    torch.testing.assert_close(features, states[:, 1 + registers :].reshape(2, 3, 7, 32))


def test_position_jitter_of_training_never_applies():
    """Rescaled positions (pos_embed_rescale 2.0 as published) are for training mode, which a teacher never enters."""
    model = tiny_model()
    assert model.config.pos_embed_rescale == 2.0
    teacher = DINOv3Teacher(model, name="tiny").train()
    images = torch.rand(1, 3, 24, 24)
    assert torch.equal(teacher.encode(images, (6, 6)), teacher.encode(images, (6, 6)))


def test_reads_the_published_names_of_weights(tmp_path):
    tiny_model().save_pretrained(tmp_path)
    with safe_open(tmp_path / "model.safetensors", "pt") as file:
        names = set(file.keys())
    assert {
        "embeddings.cls_token",
        "embeddings.register_tokens",
        "layer.0.attention.q_proj.weight",
        "layer.1.mlp.up_proj.weight",
        "norm.weight",
    } <= names
    assert load_teacher(str(tmp_path)).extra_tokens == 4
