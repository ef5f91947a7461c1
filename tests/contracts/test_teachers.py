"""What every teacher must do, run over all that the package holds: a new file is tested without a new row.

Each is a real transformers model of its `tiny_config`, random, saved to a folder and loaded from it.
"""

import json
import shutil

import pytest
import torch
import transformers

from refalign_adapter.errors import UserError
from refalign_adapter.teachers.base import Teacher
from refalign_adapter.teachers.lookup import PLUGINS, load_teacher

PROCESSOR = {"image_mean": [0.4, 0.5, 0.6], "image_std": [0.2, 0.3, 0.25], "size": {"height": 16, "width": 24}}


def save_tiny_model(teacher_class, folder, seed=0):
    torch.manual_seed(seed)
    model_class = getattr(transformers, teacher_class.model_class)
    model_class(model_class.config_class(**teacher_class.tiny_config)).save_pretrained(folder)


@pytest.fixture(scope="module", params=sorted(PLUGINS.known()))
def folder(request, tmp_path_factory):
    path = tmp_path_factory.mktemp(request.param) / "encoder"
    save_tiny_model(PLUGINS.known()[request.param], path)
    return path


@pytest.fixture(scope="module")
def teacher(folder) -> Teacher:
    return load_teacher(str(folder))


def random_images(height, width, batch=2, seed=0):
    return torch.rand(batch, 3, height, width, generator=torch.Generator().manual_seed(seed))


def test_model_types_are_claimed_by_one_teacher_each():
    claimed = [model_type for teacher in PLUGINS.known().values() for model_type in teacher.model_types]
    assert len(set(claimed)) == len(claimed) >= 6


def test_declares_what_its_config_says(teacher):
    config = teacher.model.config
    assert teacher.dim == config.hidden_size
    assert teacher.patch_size == config.patch_size
    assert teacher.extra_tokens == teacher.class_tokens + getattr(config, "num_register_tokens", 0)
    assert len(teacher.mean) == len(teacher.std) == 3


@pytest.mark.parametrize(("height", "width"), [(48, 80), (17, 9), (96, 96)])
@pytest.mark.parametrize("grid", [(3, 5), (6, 6), (9, 2), (1, 1)])
def test_gives_the_grid_it_is_asked_for(teacher, height, width, grid):
    features = teacher.encode(random_images(height, width), grid)
    expected = grid if teacher.any_size else teacher.native_grid
    assert features.shape == (2, *expected, teacher.dim)
    assert features.dtype == torch.float32
    assert features.is_contiguous()
    assert features.isfinite().all()


def test_native_grid_without_a_grid(teacher):
    assert teacher.encode(random_images(30, 50)).shape == (2, *teacher.native_grid, teacher.dim)


def test_drops_exactly_the_extra_tokens_of_the_last_hidden_state(teacher):
    outputs = []
    handle = teacher.model.register_forward_hook(lambda module, inputs, output: outputs.append(output))
    features = teacher.encode(random_images(24, 40), (3, 5))
    handle.remove()
    states = outputs[0].last_hidden_state
    assert states.shape[1] == teacher.extra_tokens + 15
    assert torch.equal(features.flatten(1, 2), states[:, teacher.extra_tokens :])


@pytest.mark.parametrize(("axis", "name"), [(2, "columns"), (1, "rows")])
def test_features_lie_where_their_pixels_lie(teacher, axis, name):
    grid = (4, 6)
    images = random_images(grid[0] * teacher.patch_size, grid[1] * teacher.patch_size)
    changed = images.clone()
    changed.narrow(axis + 1, 0, teacher.patch_size).copy_(1 - changed.narrow(axis + 1, 0, teacher.patch_size))
    change = (teacher.encode(changed, grid) - teacher.encode(images, grid)).square().sum(-1)
    per_line = change.mean(dim=(0, 3 - axis))
    assert per_line[0] > 3 * per_line[1:].max(), f"changing the first of the {name} changed {per_line.tolist()}"


def test_bfloat16(folder, teacher):
    low = load_teacher(str(folder), dtype=torch.bfloat16)
    images = random_images(24, 40)
    features = low.encode(images, (3, 5))
    assert features.dtype == torch.bfloat16
    reference = teacher.encode(images, (3, 5))
    assert torch.cosine_similarity(features.float(), reference, dim=-1).min() > 0.995


def test_frozen(teacher):
    assert not any(parameter.requires_grad for parameter in teacher.parameters())
    teacher.train()
    assert not any(module.training for module in teacher.modules())
    features = teacher.encode(random_images(24, 24).requires_grad_(), (3, 3))
    assert not features.requires_grad
    assert not features.is_inference()


def test_deterministic(folder, teacher):
    images = random_images(30, 50)
    features = teacher.encode(images, (3, 5))
    torch.manual_seed(123)
    assert torch.equal(teacher.encode(images, (3, 5)), features)
    assert torch.equal(load_teacher(str(folder)).encode(images, (3, 5)), features)
    torch.testing.assert_close(teacher.encode(images[1:], (3, 5)), features[1:], rtol=1e-4, atol=1e-5)


def test_autocast_of_the_caller_does_not_reach_it(teacher):
    images = random_images(24, 40)
    features = teacher.encode(images, (3, 5))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(teacher.encode(images, (3, 5)), features)


def test_hidden_layer_option(folder, teacher):
    images = random_images(24, 40)
    layers = teacher.model.config.num_hidden_layers
    by_layer = [load_teacher(str(folder), layer=layer).encode(images, (3, 5)) for layer in range(layers + 1)]
    output = teacher.run_model(teacher.preprocess(images, (3, 5)), output_hidden_states=True)
    for features, states in zip(by_layer, output["hidden_states"], strict=True):
        assert torch.equal(features.flatten(1, 2), states[:, teacher.extra_tokens :])
    assert torch.equal(load_teacher(str(folder), layer=-2).encode(images, (3, 5)), by_layer[-2])
    with pytest.raises(UserError, match=rf"layer must be in \[{-layers - 1}, {layers}\].*got {layers + 1}"):
        load_teacher(str(folder), layer=layers + 1)


def test_fingerprint_follows_weights_layer_dtype_and_preprocessing(folder, teacher, tmp_path):
    moved = tmp_path / "elsewhere" / folder.name
    shutil.copytree(folder, moved)
    fingerprint = teacher.fingerprint()
    assert json.loads(json.dumps(fingerprint)) == fingerprint
    assert load_teacher(str(moved)).fingerprint() == fingerprint
    others = [load_teacher(str(moved), layer=1), load_teacher(str(moved), dtype=torch.bfloat16)]
    (moved / "preprocessor_config.json").write_text(json.dumps(PROCESSOR))
    others.append(load_teacher(str(moved)))
    save_tiny_model(type(teacher), moved, seed=1)
    others.append(load_teacher(str(moved)))
    seen = [json.dumps(other.fingerprint()) for other in others] + [json.dumps(fingerprint)]
    assert len(set(seen)) == 5


def test_preprocessing_is_what_the_checkpoint_declares(folder, tmp_path):
    copy = tmp_path / "encoder"
    shutil.copytree(folder, copy)
    (copy / "preprocessor_config.json").write_text(json.dumps(PROCESSOR))
    teacher = load_teacher(str(copy))
    assert teacher.mean == (0.4, 0.5, 0.6)
    assert teacher.std == (0.2, 0.3, 0.25)
    size = (4 * teacher.patch_size, 6 * teacher.patch_size)
    images = random_images(*size)
    expected = (images - torch.tensor([0.4, 0.5, 0.6]).view(3, 1, 1)) / torch.tensor([0.2, 0.3, 0.25]).view(3, 1, 1)
    torch.testing.assert_close(teacher.preprocess(images, (4, 6)), expected)


@pytest.mark.parametrize(
    ("images", "message"),
    [
        (torch.zeros(3, 8, 8), "images must be floating point"),
        (torch.zeros(1, 4, 8, 8), "images must be floating point"),
        (torch.zeros(1, 3, 8, 8, dtype=torch.uint8), "images must be floating point"),
        (torch.linspace(-1, 1, 192).view(1, 3, 8, 8), r"images must be RGB in \[0, 1\], got values from -1 to 1"),
        (torch.full((1, 3, 8, 8), torch.nan), "images must be RGB in"),
    ],
)
def test_refuses_what_is_no_image(teacher, images, message):
    with pytest.raises(UserError, match=message):
        teacher.encode(images, (2, 2))


@pytest.mark.parametrize("grid", [(0, 4), (4,), (2.5, 4), (3, -1)])
def test_refuses_what_is_no_grid(teacher, grid):
    if not teacher.any_size:
        pytest.skip("encodes at its native grid whatever is asked")
    with pytest.raises(UserError, match="grid must be"):
        teacher.encode(torch.zeros(1, 3, 8, 8), grid)
