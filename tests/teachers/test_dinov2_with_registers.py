"""DINOv2 with registers: a direct call with the registers dropped, and the published configuration."""

import pytest
import torch
from transformers import Dinov2WithRegistersConfig, Dinov2WithRegistersModel

from refalign_adapter.teachers.base import IMAGENET_MEAN, IMAGENET_STD
from refalign_adapter.teachers.dinov2_with_registers import DINOv2WithRegistersTeacher
from refalign_adapter.teachers.lookup import load_teacher


def test_published_configuration():
    config = Dinov2WithRegistersConfig(image_size=518, patch_size=14, num_register_tokens=4)
    with torch.device("meta"):
        teacher = DINOv2WithRegistersTeacher(
            Dinov2WithRegistersModel(config), name="facebook/dinov2-with-registers-base"
        )
    assert (teacher.dim, teacher.patch_size, teacher.extra_tokens) == (768, 14, 5)
    shapes = {key: tuple(value.shape) for key, value in teacher.model.state_dict().items()}
    assert shapes["embeddings.register_tokens"] == (1, 4, 768)
    assert shapes["embeddings.position_embeddings"] == (1, 1 + 37 * 37, 768)
    assert sum(value.numel() for value in teacher.parameters()) / 1e6 == pytest.approx(86.6, abs=0.06)


@pytest.mark.parametrize("registers", [0, 1, 6])
def test_drops_as_many_registers_as_the_config_counts(tmp_path, registers):
    torch.manual_seed(0)
    tiny = {**DINOv2WithRegistersTeacher.tiny_config, "num_register_tokens": registers}
    model = Dinov2WithRegistersModel(Dinov2WithRegistersConfig(**tiny)).eval()
    model.save_pretrained(tmp_path)
    images = torch.rand(2, 3, 12, 28)
    with torch.no_grad():
        mean, std = (torch.tensor(values).view(3, 1, 1) for values in (IMAGENET_MEAN, IMAGENET_STD))
        states = model((images - mean) / std).last_hidden_state
    assert states.shape[1] == 1 + registers + 21
    features = load_teacher(str(tmp_path)).encode(images, (3, 7))
    torch.testing.assert_close(features, states[:, 1 + registers :].reshape(2, 3, 7, 32))
