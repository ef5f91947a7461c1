"""Bytes of weights and optimizer state against real ones, and against known sizes of Wan's."""

from collections import Counter

import bitsandbytes
import pytest
import torch
from quantised import QUANTISABLE, quantise_on_the_cpu
from tiny_models import save_tiny_pipeline
from torch import nn

from refalign_adapter.data.cache.encoders import load_encoders
from refalign_adapter.estimate.live_bytes import bytes_of, module_bytes
from refalign_adapter.estimate.memory import (
    caching_memory,
    optimizer_bytes,
    quantised_bytes,
    quantised_layers,
    training_memory,
)
from refalign_adapter.estimate.simulate import build_step
from refalign_adapter.recipes.optimizers import build_optimizer
from refalign_adapter.training.base_model import load_transformer

JOINT = ("adapter.attention=joint", "adapter.lora_scope=all", "dropout={}")


def named(memory):
    return {part.name: part.bytes for part in memory.parts}


def by_type(module):
    sizes = Counter()
    for tensor in [*module.parameters(), *module.buffers()]:
        sizes[tensor.dtype] += tensor.numel() * tensor.element_size()
    return sizes


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_base_has_the_types_that_loading_gives_it(setting_of, dtype):
    setting = setting_of()
    real = load_transformer(setting.recipe, setting.models.family, dtype)
    assert by_type(setting.models.transformer(dtype)) == by_type(real)


@pytest.mark.parametrize("dtype", ["fp32", "bf16", "fp16"])
def test_encoders_have_the_types_that_loading_gives_them(setting_of, dtype):
    setting = setting_of(f"data.text_encoder_dtype={dtype}")
    real, ours = load_encoders(setting.options), setting.models.encoders
    for name in ("vae", "text_encoder"):
        assert by_type(getattr(ours.pipe, name)) == by_type(getattr(real.pipe, name))
    for name, teacher in real.teachers.items():
        assert module_bytes(ours.teachers[name]) == module_bytes(teacher)
        assert (ours.teachers[name].dim, ours.teachers[name].native_grid) == (teacher.dim, teacher.native_grid)


@pytest.mark.parametrize("kind", ["nf4", "int8"])
def test_quantised_weights_take_what_bitsandbytes_stores(setting_of, tmp_path, monkeypatch, kind):
    base = save_tiny_pipeline(tmp_path / "base", **QUANTISABLE)
    quantise_on_the_cpu(monkeypatch)
    setting = setting_of(f"pretrained_model_name_or_path={base}", f"quantization={kind}")
    real = load_transformer(setting.recipe, setting.models.family, torch.float32)
    found = {"nf4": bitsandbytes.nn.Linear4bit, "int8": bitsandbytes.nn.Linear8bitLt}[kind]
    layers = [module for module in real.modules() if isinstance(module, found)]
    ours = list(quantised_layers(setting.models.transformer(torch.float32)))
    assert len(layers) == len(ours)
    for layer, plain in zip(layers, ours, strict=True):
        assert quantised_bytes(plain, kind) == bytes_of(stored(layer.weight, kind))
    # Parts of the whole: what is quantised, and the rest as it was.
    parts = named(training_memory(setting).gpu)
    rest = module_bytes(setting.models.transformer(torch.float32)) - bytes_of(plain.weight for plain in ours)
    assert parts[f"base, {len(ours)} layers in {kind}"] == sum(bytes_of(stored(each.weight, kind)) for each in layers)
    assert sum(size for name, size in parts.items() if name.startswith("base, float")) == rest
    assert parts["largest layer, dequantised"] == max(plain.weight.numel() for plain in ours) * 4


def stored(weight, kind):
    """All tensors of a quantised weight."""
    if kind == "int8":
        return [weight.CB if weight.CB is not None else weight.data, weight.SCB]
    state = weight.quant_state
    return [weight.data, state.absmax, state.code, state.offset, state.state2.absmax, state.state2.code]


@pytest.mark.parametrize("optimizer", ["adamw8bit", "paged_adamw8bit", "lion8bit", "adamw", "sgd", "rmsprop"])
@pytest.mark.parametrize("smallest", [16, 4096])
def test_optimizer_state_is_that_of_a_real_step(setting_of, optimizer, smallest):
    recipe = setting_of(f"optimizer={optimizer}", f"min_8bit_size={smallest}").recipe
    shapes = [(16, 48), (48, 16), (4, 1300), (7,)]
    real = [nn.Parameter(torch.randn(shape)) for shape in shapes]
    stepped = build_optimizer(recipe, real[:2], real[2:])
    for parameter in real:
        parameter.grad = torch.randn_like(parameter)
    stepped.step()
    state = [value for values in stepped.state.values() for value in values.values()]
    # torch counts steps on the host
    expected = bytes_of(value for value in state if isinstance(value, torch.Tensor) and value.numel() > 1)
    meta = [nn.Parameter(torch.empty(shape, device="meta")) for shape in shapes]
    assert optimizer_bytes(recipe, meta[:2], meta[2:]) == expected


@pytest.mark.parametrize(("name", "megabytes"), [("1.3b", 175), ("5b", 322), ("14b", 613)])
def test_a_lora_on_all_layers_has_the_known_size(wan_setting, name, megabytes):
    setting = wan_setting(name, *JOINT)
    step = build_step(setting.recipe, setting.models, torch.bfloat16)
    lora = sum(parameter.numel() for _, parameter in step.branch.named_parameters())
    assert round(lora * 2 / 1e6) == megabytes
    (objective,) = step.objectives
    heads = objective.heads
    assert module_bytes(heads) == 9 * (heads.dim // 2) * (heads.dim + 768) * 4


@pytest.mark.slow
def test_parts_of_wan_14b(wan_setting):
    setting = wan_setting("14b", "ema_decay=0.99", *JOINT, processes=8)
    memory = training_memory(setting)
    parts = named(memory.gpu)
    lora = memory.lora_parameters * 4
    assert parts["LoRA"] == parts["moving average"] == lora
    assert parts["gradients"] == parts["gradient buckets"] == lora + parts["projectors"]
    # Two bytes of state for four of weights, and a float32 for every 256 of each of the two moments
    assert parts["optimizer state (paged_adamw8bit)"] == pytest.approx(
        parts["gradients"] * (1 / 2 + 2 / 256), rel=1e-3
    )
    assert memory.base == pytest.approx(28.6e9, rel=0.01)  # 14.3 billion parameters in bf16
    inputs = 40 * (21 + 4) * 1560 * 5120 * 2  # of every block, video and references
    assert inputs < parts["activations at the peak"] < 4 * inputs
    rest = memory.gpu.total - parts["allowance: CUDA context 1 GB, fragmentation 5 %"]
    assert memory.gpu.total == pytest.approx(1e9 + 1.05 * rest)


def test_no_part_is_told_that_is_not_there(setting_of):
    parts = named(training_memory(setting_of("alignment.weight=0", processes=1)).gpu)
    assert not {"projectors", "gradient buckets", "moving average", "largest layer, dequantised"} & set(parts)


def test_making_the_cache_of_wan(wan_setting):
    memory = caching_memory(wan_setting("1.3b").models, encoded=10**9)
    captions, clips = named(memory.captions), named(memory.clips)
    assert captions["text encoder"] == pytest.approx(11.4e9, rel=0.01)  # 5.7 billion parameters in bf16
    assert clips["teachers, in float32"] == pytest.approx(0.343e9, rel=0.01)
    assert clips["the VAE's activations for one clip"] == 10**9
    assert not set(captions) & set(clips) - {"allowance: CUDA context 1 GB, fragmentation 5 %"}
    assert memory.total == memory.captions.total > memory.clips.total
