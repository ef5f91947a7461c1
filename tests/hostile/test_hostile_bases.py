"""A base is data: whatever is wrong with its folder is one line with the way out, in every command that reads one."""

import json

import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny_models import save_tiny_pipeline, tiny_dinov2

import refalign_adapter as ra
from refalign_adapter.data.cache.encoders import load_encoders
from refalign_adapter.data.cache.options import CacheOptions
from refalign_adapter.families._pipeline_folder import open_pipeline
from refalign_adapter.recipes.schema import Recipe
from refalign_adapter.teachers.lookup import load_teacher
from refalign_adapter.training.base_model import load_transformer, read_base


@pytest.fixture
def base(tmp_path):
    return save_tiny_pipeline(tmp_path / "base")


def train(base, **options):
    recipe = Recipe.model_construct(
        pretrained_model_name_or_path=str(base), revision=None, variant=None, family=None, quantization=None,
        flow=Recipe.model_fields["flow"].get_default(call_default_factory=True), **options,
    )  # fmt: skip
    family, _ = read_base(recipe)
    load_transformer(recipe, family, torch.float32)


def cache(base):
    load_encoders(CacheOptions(base_model=str(base), train_data="x", cache_dir="y", teachers=()))


def generate(base):
    open_pipeline(str(base), field="base", weights=("transformer", "vae", "text_encoder"))


READERS = [train, cache, generate]


def index_with(**changes):
    def change(base):
        path = base / "model_index.json"
        path.write_text(json.dumps(json.loads(path.read_text()) | changes))

    return change


def index_is(text):
    return lambda base: (base / "model_index.json").write_text(text)


def config_with(component, **changes):
    def change(base):
        path = base / component / "config.json"
        path.write_text(json.dumps(json.loads(path.read_text()) | changes))

    return change


def original(base):
    """As Wan's authors publish it."""
    (base / "model_index.json").unlink()
    (base / "config.json").write_text('{"_class_name": "WanModel", "dim": 1536}')


EVERY_READER = {
    "original Wan": (original, "is the original Wan repository; take the one for diffusers, .*base-Diffusers"),
    "no pipeline": (lambda base: (base / "model_index.json").unlink(), "is no diffusers pipeline, it has no"),
    "a list": (index_is("[]"), "must be an object of components"),
    "deep": (index_is("[" * 200_000), "nested more than 100 deep"),
    "a number": (index_with(transformer=3), "'transformer' must be .library, class."),
    "three parts": (index_with(vae=["a", "b", "c"]), "'vae' must be .library, class."),
    "a stranger's class": (index_with(scheduler=["evil", "Scheduler"]), "scheduler is a evil.Scheduler, which"),
    "another component": (index_with(extra=["os", "system"]), "extra is a os.system, which"),
    "no class": (index_with(vae=["diffusers", "load_image"]), "vae is a diffusers.load_image, which"),
    "of a module": (index_with(vae=["diffusers", "__class__"]), "vae is a diffusers.__class__, which"),
}


@pytest.mark.parametrize("case", EVERY_READER)
@pytest.mark.parametrize("reader", READERS)
def test_a_folder_that_no_reader_takes(base, reader, case, monkeypatch):
    monkeypatch.syspath_prepend(base)
    (base / "evil.py").write_text("raise SystemExit('code from a base ran')")
    change, expected = EVERY_READER[case]
    change(base)
    with pytest.raises(ra.UserError, match=expected) as caught:
        reader(base)
    assert "\n" not in str(caught.value)


def cut(base, component):
    (path,) = (base / component).glob("*.safetensors")
    path.write_bytes(path.read_bytes()[:-100])


def pickled(base, component):
    (path,) = (base / component).glob("*.safetensors")
    path.rename(path.with_suffix(".bin"))


def renamed(base, component):
    (path,) = (base / component).glob("*.safetensors")
    path.rename(path.with_suffix(".fp16.safetensors"))


def sharded(base, component):
    (path,) = (base / component).glob("*.safetensors")
    shards = {key: f"{path.stem}-00002-of-00002.safetensors" for key in load_file(path)}
    path.with_name(f"{path.name}.index.json").write_text(json.dumps({"metadata": {}, "weight_map": shards}))


WEIGHTS = {
    "cut off": (cut, "is damaged or cut off .*; download the base again"),
    "pickles": (pickled, "holds a pickle .* which is refused"),
    "a variant": (renamed, "has no weights of variant 'none'; variants there are: fp16"),
    "a shard": (sharded, "lacks .*-00002-of-00002.safetensors; download the base again"),
}


@pytest.mark.parametrize("case", WEIGHTS)
@pytest.mark.parametrize(("reader", "component"), [(train, "transformer"), (cache, "vae"), (generate, "text_encoder")])
def test_weights_that_are_not_there_whole(base, reader, component, case):
    change, expected = WEIGHTS[case]
    change(base, component)
    with pytest.raises(ra.UserError, match=expected) as caught:
        reader(base)
    assert "\n" not in str(caught.value)
    assert component in str(caught.value)


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({"num_layers": 10**9}, "num_layers must be a whole number from 0 to 1024"),
        ({"ffn_dim": 10**12}, "ffn_dim must be at most"),
        ({"ffn_dim": "x"}, "cannot read .* as a diffusers pipeline"),
        ({"num_layers": [3]}, "num_layers must be a whole number"),
    ],
)
def test_sizes_that_no_model_has(base, changes, expected):
    config_with("transformer", **changes)(base)
    with pytest.raises(ra.UserError, match=expected) as caught:
        cache(base)
    assert "\n" not in str(caught.value)


TEACHERS = {
    "layers": ({"num_hidden_layers": 10**9}, "num_hidden_layers must be a whole number"),
    "width": ({"hidden_size": 10**12}, "hidden_size must be at most"),
    "type": ({"hidden_size": "x"}, "cannot load"),
    "kind": ({"model_type": ["dinov2"]}, "names no model_type"),
    "kernel": ({"attn_implementation": "evil/kernel"}, "attn_implementation must be one that transformers brings"),
    "inner kernel": ({"x": {"_attn_implementation": "evil/kernel"}}, "_attn_implementation must be one"),
}

PROCESSORS = [
    [1], {"image_mean": "x"}, {"image_std": [0, 0, 0]}, {"size": {"height": 10**9, "width": 1}}, {"crop_size": "big"},
    {"size": {}}, {"do_rescale": 3}, {"rescale_factor": 10**400}, {"image_mean": [1, 2]},
]  # fmt: skip


@pytest.mark.parametrize("case", TEACHERS)
def test_a_teacher_is_data(tmp_path, case):
    changes, expected = TEACHERS[case]
    folder = tiny_dinov2(tmp_path / "teacher")
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))
    with pytest.raises(ra.UserError, match=expected) as caught:
        load_teacher(str(folder))
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("processor", PROCESSORS, ids=str)
def test_preprocessing_of_another_kind(tmp_path, processor):
    folder = tiny_dinov2(tmp_path / "teacher")
    (folder / "preprocessor_config.json").write_text(json.dumps(processor))
    with pytest.raises(ra.UserError, match="preprocessor_config.json': .* cannot be .*; download") as caught:
        load_teacher(str(folder))
    assert "\n" not in str(caught.value)


def test_weights_of_a_teacher_that_are_not_finite(tmp_path):
    folder = tiny_dinov2(tmp_path / "teacher")
    weights = load_file(folder / "model.safetensors")
    weights["layernorm.weight"][0] = torch.nan
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ra.UserError, match="weight 'layernorm.weight' is not finite; download the encoder again"):
        load_teacher(str(folder))
