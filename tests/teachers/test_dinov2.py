"""DINOv2: against a direct call of the model, against its image processor, and in its published sizes."""

import pytest
import torch
from transformers import BitImageProcessor, Dinov2Config, Dinov2Model

from refalign_adapter.teachers.dinov2 import DINOv2Teacher
from refalign_adapter.teachers.lookup import load_teacher

PROCESSOR = {  # as published with facebook/dinov2-base
    "crop_size": {"height": 224, "width": 224},
    "do_center_crop": True,
    "do_convert_rgb": True,
    "do_normalize": True,
    "do_rescale": True,
    "do_resize": True,
    "image_mean": [0.485, 0.456, 0.406],
    "image_processor_type": "BitImageProcessor",
    "image_std": [0.229, 0.224, 0.225],
    "resample": 3,
    "rescale_factor": 0.00392156862745098,
    "size": {"shortest_edge": 256},
}
PUBLISHED = {  # hidden size, layers, heads, swiglu -> millions of parameters on the model cards
    "facebook/dinov2-small": (384, 12, 6, False, 22.1),
    "facebook/dinov2-base": (768, 12, 12, False, 86.6),
    "facebook/dinov2-large": (1024, 24, 16, False, 304.4),
    "facebook/dinov2-giant": (1536, 40, 24, True, 1136.5),
}


@pytest.mark.parametrize("name", PUBLISHED)
def test_published_configurations(name):
    hidden, layers, heads, swiglu, millions = PUBLISHED[name]
    config = Dinov2Config(
        hidden_size=hidden,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        use_swiglu_ffn=swiglu,
        image_size=518,
        patch_size=14,
    )
    with torch.device("meta"):
        teacher = DINOv2Teacher(Dinov2Model(config), name=name, processor=PROCESSOR)
    assert (teacher.dim, teacher.patch_size, teacher.extra_tokens) == (hidden, 14, 1)
    assert teacher.native_grid == (16, 16)
    shapes = {key: tuple(value.shape) for key, value in teacher.model.state_dict().items()}
    assert shapes["embeddings.position_embeddings"] == (1, 1 + 37 * 37, hidden)
    assert shapes["embeddings.patch_embeddings.projection.weight"] == (hidden, 3, 14, 14)
    assert shapes[f"encoder.layer.{layers - 1}.norm2.weight"] == (hidden,)
    assert sum(value.numel() for value in teacher.parameters()) / 1e6 == pytest.approx(millions, abs=0.06)


def tiny_model(seed=0):
    torch.manual_seed(seed)
    return Dinov2Model(Dinov2Config(**DINOv2Teacher.tiny_config)).eval()


def test_equals_a_direct_call_on_a_picture_that_is_not_square(tmp_path):
    model = tiny_model()
    model.save_pretrained(tmp_path)
    images = torch.rand(2, 3, 12, 28)
    mean, std = torch.tensor(PROCESSOR["image_mean"]), torch.tensor(PROCESSOR["image_std"])
    with torch.no_grad():
        states = model((images - mean.view(3, 1, 1)) / std.view(3, 1, 1)).last_hidden_state
    expected = states[:, 1:].reshape(2, 3, 7, 32)
    torch.testing.assert_close(load_teacher(str(tmp_path)).encode(images, (3, 7)), expected)


def test_preprocessing_agrees_with_transformers_processor():
    """Up to rounding to 8 bits; mid-range values, as PIL clips between its two passes."""
    teacher = DINOv2Teacher(tiny_model(), name="tiny", processor=PROCESSOR)
    pixels = torch.randint(80, 176, (1, 3, 60, 100), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    processor = BitImageProcessor(
        size={"height": 24, "width": 40},
        do_center_crop=False,
        image_mean=PROCESSOR["image_mean"],
        image_std=PROCESSOR["image_std"],
    )
    expected = processor(pixels[0].permute(1, 2, 0).numpy(), return_tensors="pt")["pixel_values"]
    ours = teacher.preprocess(pixels / 255, (6, 10))
    assert ours.shape == expected.shape
    assert (ours - expected).abs().max() < 1.5 / 255 / 0.224
