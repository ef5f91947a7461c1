"""SigLIP and fixed-size SigLIP 2: direct calls on a whole checkpoint, and the published configurations."""

import pytest
import torch
from transformers import SiglipConfig, SiglipModel, SiglipVisionConfig, SiglipVisionModel

from refalign_adapter.teachers.lookup import load_teacher
from refalign_adapter.teachers.siglip2 import SigLIP2Teacher

PROCESSOR = {  # as published with google/siglip2-base-patch16-256
    "do_convert_rgb": None,
    "do_normalize": True,
    "do_rescale": True,
    "do_resize": True,
    "image_mean": [0.5, 0.5, 0.5],
    "image_processor_type": "SiglipImageProcessor",
    "image_std": [0.5, 0.5, 0.5],
    "resample": 2,
    "rescale_factor": 0.00392156862745098,
    "size": {"height": 256, "width": 256},
}
TEXT = {
    "hidden_size": 32,
    "intermediate_size": 32,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "vocab_size": 20,
    "bos_token_id": 0,
    "eos_token_id": 1,
}


def test_published_base_configuration():
    config = SiglipVisionConfig(image_size=256)
    with torch.device("meta"):
        teacher = SigLIP2Teacher(
            SiglipVisionModel(config), name="google/siglip2-base-patch16-256", processor=PROCESSOR
        )
    assert (teacher.dim, teacher.patch_size, teacher.extra_tokens) == (768, 16, 0)
    assert teacher.native_grid == (16, 16)
    assert teacher.mean == teacher.std == (0.5, 0.5, 0.5)
    shapes = {key.removeprefix("vision_model."): tuple(v.shape) for key, v in teacher.model.state_dict().items()}
    assert shapes["embeddings.position_embedding.weight"] == (256, 768)
    assert sum(value.numel() for value in teacher.parameters()) / 1e6 == pytest.approx(92.9, abs=0.06)


def test_published_so400m_size_that_its_patch_does_not_divide():
    """384 pixels and patch 14: the model's own convolution makes 27 patches, and so does the native grid."""
    config = SiglipVisionConfig(
        hidden_size=1152,
        intermediate_size=4304,
        num_hidden_layers=27,
        num_attention_heads=16,
        patch_size=14,
        image_size=384,
    )
    with torch.device("meta"):
        teacher = SigLIP2Teacher(SiglipVisionModel(config), name="google/siglip2-so400m-patch14-384")
    assert (teacher.dim, teacher.native_grid) == (1152, (27, 27))
    shapes = {key.removeprefix("vision_model."): tuple(v.shape) for key, v in teacher.model.state_dict().items()}
    assert shapes["embeddings.position_embedding.weight"] == (27 * 27, 1152)


def test_reads_the_vision_part_of_a_whole_checkpoint(tmp_path):
    torch.manual_seed(0)
    model = SiglipModel(SiglipConfig(vision_config=SigLIP2Teacher.tiny_config, text_config=TEXT)).eval()
    model.save_pretrained(tmp_path)
    teacher = load_teacher(str(tmp_path))
    images = torch.rand(2, 3, 12, 28)
    with torch.no_grad():
        output = model.vision_model((images - 0.5) / 0.5, interpolate_pos_encoding=True)
    torch.testing.assert_close(teacher.encode(images, (3, 7)), output.last_hidden_state.reshape(2, 3, 7, 32))
    square = torch.rand(1, 3, 24, 24)
    with torch.no_grad():
        output = model.vision_model((square - 0.5) / 0.5)
    torch.testing.assert_close(teacher.encode(square), output.last_hidden_state.reshape(1, 6, 6, 32))
