"""Grid resampling against naive references; how a teacher is found; what its processor's file may say."""

import json
import math
import sys
import types

import pytest
import torch
import transformers
from transformers import Dinov2Config, Dinov2Model

from refalign_adapter.errors import UserError
from refalign_adapter.grids import resample_grid
from refalign_adapter.teachers.base import Teacher
from refalign_adapter.teachers.dinov2 import DINOv2Teacher
from refalign_adapter.teachers.lookup import PLUGINS, load_teacher


def triangle_weights(size, target):
    """(target, size) bilinear weights with the filter widened by the shrink factor; rows sum to 1."""
    step = size / target
    reach = max(step, 1.0)
    weights = torch.zeros(target, size, dtype=torch.float64)
    for row in range(target):
        centre = (row + 0.5) * step
        for column in range(size):
            weights[row, column] = max(0.0, 1 - abs(column + 0.5 - centre) / reach)
    return weights / weights.sum(1, keepdim=True)


@pytest.mark.parametrize("grid", [(3, 4), (16, 14), (5, 20), (9, 2), (1, 1), (7, 9)])
def test_resample_grid_is_a_triangle_filter_per_axis(grid):
    features = torch.randn(2, 3, 7, 9, 5, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    rows, columns = triangle_weights(7, grid[0]), triangle_weights(9, grid[1])
    expected = torch.einsum("ah,bmhwt,cw->bmact", rows, features, columns)
    resampled = resample_grid(features, grid)
    torch.testing.assert_close(resampled, expected)
    assert resampled.is_contiguous()


def test_resample_grid_returns_the_same_object_when_nothing_changes():
    features = torch.randn(2, 4, 6, 3)
    assert resample_grid(features, (4, 6)) is features


@pytest.mark.parametrize("leading", [(), (2,), (2, 3, 4), (0, 2)])
def test_resample_grid_keeps_leading_dimensions_and_dtype(leading):
    features = torch.ones(*leading, 4, 6, 3, dtype=torch.bfloat16)
    resampled = resample_grid(features, (5, 3))
    assert resampled.shape == (*leading, 5, 3, 3)
    assert resampled.dtype == torch.bfloat16
    assert (resampled == 1).all()


def test_columns_survive_resampling_in_two_dimensions_but_not_over_flattened_tokens():
    """16×16 teacher tokens to the 30×52 of a DiT at 480×832, the map being a function of the column only."""
    pattern = torch.sin(torch.linspace(0, 1, 16) * 4 * math.pi)
    features = pattern.expand(16, 16)[None, :, :, None].contiguous()
    wanted = torch.sin(torch.linspace(0, 1, 52) * 4 * math.pi).expand(30, 52)

    def correlation(resampled):
        return torch.corrcoef(torch.stack([resampled.flatten(), wanted.flatten()]))[0, 1].item()

    flattened = torch.nn.functional.interpolate(features.reshape(1, 1, 256), 30 * 52, mode="linear")
    assert correlation(resample_grid(features, (30, 52))) > 0.95
    assert abs(correlation(flattened)) < 0.2


@pytest.mark.parametrize("grid", [(0, 3), (2,), (2, 3, 4), (1.5, 2)])
def test_resample_grid_refuses_what_is_no_grid(grid):
    with pytest.raises(UserError, match="grid must be"):
        resample_grid(torch.zeros(1, 4, 4, 2), grid)


def tiny_model(**fields):
    torch.manual_seed(0)
    return Dinov2Model(Dinov2Config(**{**DINOv2Teacher.tiny_config, **fields}))


def tiny_teacher(**processor):
    return DINOv2Teacher(tiny_model(), name="tiny", processor=processor)


@pytest.mark.parametrize(
    ("processor", "grid"),
    [
        ({}, (6, 6)),  # image_size 24 of the config
        ({"size": 16}, (4, 4)),
        ({"size": {"height": 8, "width": 20}}, (2, 5)),
        ({"size": {"shortest_edge": 32}, "crop_size": {"height": 28, "width": 28}}, (7, 7)),
        ({"size": {"shortest_edge": 32}, "crop_size": 28, "do_center_crop": False}, (8, 8)),
        ({"size": [12, 30], "crop_size": None}, (3, 7)),
    ],
)
def test_native_grid(processor, grid):
    teacher = tiny_teacher(**processor)
    assert teacher.native_grid == grid
    assert teacher.encode(torch.rand(1, 3, 50, 40)).shape == (1, *grid, 32)


def test_rescaling_and_normalisation_as_declared():
    images = torch.rand(1, 3, 8, 12)
    plain = {"do_normalize": False}
    torch.testing.assert_close(tiny_teacher(**plain).preprocess(images, (2, 3)), images)
    signed = tiny_teacher(rescale_factor=1 / 127.5, image_mean=[1.0] * 3, image_std=[1.0] * 3)
    torch.testing.assert_close(signed.preprocess(images, (2, 3)), images * 2 - 1)
    torch.testing.assert_close(tiny_teacher(do_rescale=False, **plain).preprocess(images, (2, 3)), images * 255)
    fingerprints = [tiny_teacher(), tiny_teacher(**plain), signed, tiny_teacher(size=16)]
    assert len({json.dumps(teacher.fingerprint()) for teacher in fingerprints}) == 4


def test_resizing_never_leaves_the_range_of_an_image():
    """Bicubic overshoots at edges; an 8-bit image cannot."""
    checkerboard = (torch.arange(8)[:, None] + torch.arange(8)).remainder(2).float().expand(1, 3, 8, 8)
    pixels = tiny_teacher(do_normalize=False).preprocess(checkerboard, (8, 8))
    assert pixels.shape == (1, 3, 32, 32)
    assert pixels.min() == 0
    assert pixels.max() == 1


def test_patches_that_are_not_square_are_refused():
    teacher = DINOv2Teacher(tiny_model(patch_size=(4, 8), image_size=24), name="tiny")
    with pytest.raises(UserError, match="patches of 4×8 pixels"):
        teacher.encode(torch.rand(1, 3, 24, 24), (3, 3))


def test_every_file_is_one_teacher():
    teachers = PLUGINS.known()
    assert {"clip", "dinov2", "dinov2_with_registers", "dinov3", "siglip2", "siglip2_naflex"} <= set(teachers)
    assert all(issubclass(teacher, Teacher) for teacher in teachers.values())
    assert all(hasattr(transformers, teacher.model_class) for teacher in teachers.values())


def test_a_teacher_from_elsewhere_by_dotted_path(tmp_path, monkeypatch):
    class LeftHalf(DINOv2Teacher):
        @property
        def dim(self):
            return super().dim // 2

        def encode(self, images, grid=None):
            return super().encode(images, grid)[..., : self.dim]

    module = types.ModuleType("someones_package")
    module.LeftHalf, module.NoTeacher = LeftHalf, dict  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "someones_package", module)
    tiny_model().save_pretrained(tmp_path)
    teacher = load_teacher(str(tmp_path), teacher_class="someones_package:LeftHalf")
    assert teacher.encode(torch.rand(1, 3, 16, 16), (2, 2)).shape == (1, 2, 2, 16)
    for path in ("someones_package:NoTeacher", "someones_package:Missing", "no_such_package:Any", "words"):
        with pytest.raises(UserError, match="teacher_class") as caught:
            load_teacher(str(tmp_path), teacher_class=path)
        assert path in str(caught.value)


def test_float32_unless_told_otherwise(tmp_path):
    tiny_model().half().save_pretrained(tmp_path)
    assert load_teacher(str(tmp_path)).encode(torch.rand(1, 3, 16, 16), (2, 2)).dtype == torch.float32
    assert load_teacher(str(tmp_path), dtype=torch.float16).model.dtype == torch.float16
