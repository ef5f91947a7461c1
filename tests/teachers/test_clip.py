"""CLIP vision: direct calls, the vision part of a whole checkpoint, its processor, the published configuration."""

import json

import pytest
import torch
from transformers import CLIPConfig, CLIPImageProcessor, CLIPModel, CLIPVisionConfig, CLIPVisionModel

from refalign_adapter.teachers.clip import CLIPTeacher
from refalign_adapter.teachers.lookup import load_teacher

MEAN, STD = [0.48145466, 0.4578275, 0.40821073], [0.26862954, 0.26130258, 0.27577711]
PROCESSOR = {  # as published with openai/clip-vit-large-patch14
    "crop_size": 224,
    "do_center_crop": True,
    "do_normalize": True,
    "do_resize": True,
    "feature_extractor_type": "CLIPFeatureExtractor",
    "image_mean": MEAN,
    "image_std": STD,
    "resample": 3,
    "size": 224,
}
TEXT = {
    "hidden_size": 16,
    "intermediate_size": 32,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "vocab_size": 20,
    "bos_token_id": 0,
    "eos_token_id": 1,
}


def normalised(images):
    return (images - torch.tensor(MEAN).view(3, 1, 1)) / torch.tensor(STD).view(3, 1, 1)


def test_published_configuration():
    config = CLIPVisionConfig(
        hidden_size=1024,
        intermediate_size=4096,
        num_hidden_layers=24,
        num_attention_heads=16,
        patch_size=14,
        image_size=224,
        projection_dim=768,
    )
    with torch.device("meta"):
        teacher = CLIPTeacher(CLIPVisionModel(config), name="openai/clip-vit-large-patch14", processor=PROCESSOR)
    assert (teacher.dim, teacher.patch_size, teacher.extra_tokens) == (1024, 14, 1)
    assert teacher.native_grid == (16, 16)
    assert sum(value.numel() for value in teacher.parameters()) == 303_179_776
    shapes = {key.removeprefix("vision_model."): tuple(v.shape) for key, v in teacher.model.state_dict().items()}
    assert shapes["embeddings.position_embedding.weight"] == (257, 1024)


def whole_model():
    torch.manual_seed(0)
    return CLIPModel(CLIPConfig(vision_config=CLIPTeacher.tiny_config, text_config=TEXT, projection_dim=8)).eval()


def test_reads_the_vision_part_of_a_whole_checkpoint(tmp_path, capsys):
    model = whole_model()
    model.save_pretrained(tmp_path)
    capsys.readouterr()
    teacher = load_teacher(str(tmp_path))
    assert "UNEXPECTED" not in capsys.readouterr().err, "the unused text weights are no news to the user"
    images = torch.rand(2, 3, 12, 28)
    with torch.no_grad():
        output = model.vision_model(normalised(images), interpolate_pos_encoding=True)
    expected = output.last_hidden_state[:, 1:].reshape(2, 3, 7, 32)
    torch.testing.assert_close(teacher.encode(images, (3, 7)), expected)


def test_positions_are_untouched_at_the_native_size(tmp_path):
    model = whole_model()
    model.save_pretrained(tmp_path)
    images = torch.rand(1, 3, 24, 24)
    with torch.no_grad():
        expected = model.vision_model(normalised(images)).last_hidden_state[:, 1:].reshape(1, 6, 6, 32)
    torch.testing.assert_close(load_teacher(str(tmp_path)).encode(images), expected)


@pytest.mark.parametrize(("height", "width"), [(60, 100), (10, 7)])
def test_preprocessing_agrees_with_transformers_processor(tmp_path, height, width):
    """Shrinking and enlarging, up to rounding to 8 bits; mid-range values, as PIL clips between its two passes."""
    whole_model().save_pretrained(tmp_path)
    (tmp_path / "preprocessor_config.json").write_text(json.dumps(PROCESSOR))
    generator = torch.Generator().manual_seed(0)
    pixels = torch.randint(80, 176, (1, 3, height, width), dtype=torch.uint8, generator=generator)
    processor = CLIPImageProcessor(
        size={"height": 24, "width": 40}, do_center_crop=False, image_mean=MEAN, image_std=STD
    )
    expected = processor(pixels[0].permute(1, 2, 0).numpy(), return_tensors="pt")["pixel_values"]
    ours = load_teacher(str(tmp_path)).preprocess(pixels / 255, (6, 10))
    assert ours.shape == expected.shape
    assert (ours - expected).abs().max() < 1.5 / 255 / 0.26
