"""SigLIP 2 NaFlex: our patches against those of transformers' own image processor, and the published configuration."""

import pytest
import torch
from transformers import Siglip2Config, Siglip2ImageProcessor, Siglip2Model, Siglip2VisionConfig, Siglip2VisionModel

from refalign_adapter.teachers.lookup import load_teacher
from refalign_adapter.teachers.siglip2_naflex import SigLIP2NaFlexTeacher

TEXT = {
    "hidden_size": 32,
    "intermediate_size": 32,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "vocab_size": 20,
    "bos_token_id": 0,
    "eos_token_id": 1,
}


def test_published_configuration():
    with torch.device("meta"):
        teacher = SigLIP2NaFlexTeacher(
            Siglip2VisionModel(Siglip2VisionConfig()), name="google/siglip2-base-patch16-naflex"
        )
    assert (teacher.dim, teacher.patch_size, teacher.extra_tokens) == (768, 16, 0)
    assert teacher.native_grid == (16, 16)
    assert sum(value.numel() for value in teacher.parameters()) / 1e6 == pytest.approx(92.9, abs=0.06)


def test_equals_the_model_fed_by_its_own_processor(tmp_path):
    torch.manual_seed(0)
    Siglip2Model(Siglip2Config(vision_config=SigLIP2NaFlexTeacher.tiny_config, text_config=TEXT)).save_pretrained(
        tmp_path
    )
    model = Siglip2VisionModel.from_pretrained(tmp_path)
    image = torch.randint(0, 256, (24, 36, 3), dtype=torch.uint8)
    inputs = Siglip2ImageProcessor(patch_size=4, max_num_patches=54)(image.numpy(), return_tensors="pt")
    assert inputs["spatial_shapes"].tolist() == [[6, 9]]
    with torch.no_grad():
        expected = model(**inputs).last_hidden_state.reshape(1, 6, 9, 32)
    features = load_teacher(str(tmp_path)).encode(image.permute(2, 0, 1)[None] / 255, (6, 9))
    torch.testing.assert_close(features, expected)
