"""GPU memory of training and of making the cache, part by part; an estimate, made without a GPU."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from ..recipes.optimizers import build_optimizer
from ..recipes.schema import Recipe
from ..training.step import TrainingStep
from .live_bytes import bytes_of, module_bytes
from .models import Models
from .setting import Setting
from .simulate import build_step, simulate_step

CONTEXT, FRAGMENTATION = 10**9, 0.05
"""What CUDA and its libraries take for themselves, in bytes, and the share of all else that allocations may waste."""
PRECISIONS = {"no": torch.float32, "bf16": torch.bfloat16}


@dataclass(frozen=True)
class Part:
    """A part of some memory.

    Attributes:
        name: what it is, for people.
        bytes: its size.
    """

    name: str
    bytes: int


@dataclass(frozen=True)
class Memory:
    """Parts that are there at the same time.

    Attributes:
        parts: in the order in which they come to be.
    """

    parts: tuple[Part, ...]

    @property
    def total(self) -> int:
        """Bytes of all parts."""
        return sum(part.bytes for part in self.parts)


@dataclass(frozen=True)
class TrainingMemory:
    """What a training process needs.

    Attributes:
        gpu: parts on the GPU, the allowance included.
        offloaded: bytes of activations that wait in host memory.
        base: bytes of the base's weights as they lie on the GPU.
        lora_parameters: number of the LoRA's parameters.
    """

    gpu: Memory
    offloaded: int
    base: int
    lora_parameters: int


def training_memory(setting: Setting) -> TrainingMemory:
    """Simulate one step and add up what lies beside it.

    Quantised layers are counted as they are stored and run as plain ones.

    Raises:
        UserError: an adapter that does not fit the base.
    """
    recipe, models, processes = setting.recipe, setting.models, setting.processes
    dtype = PRECISIONS[recipe.mixed_precision or "no"]
    step = build_step(recipe, models, dtype)
    autocast = dtype if dtype != torch.float32 else None
    memory = simulate_step(step, recipe, setting.shapes, setting.references, autocast)
    lora = [parameter for _, parameter in step.branch.named_parameters()]
    heads = list(step.objectives.parameters())
    gradients = bytes_of([*lora, *heads])  # in the parameters' types
    kept = gradients if recipe.gradient_accumulation_steps > 1 else 0
    activations = max(0, memory.peak + kept - gradients)  # without accumulation, they come to be in the simulation
    base = list(_base_parts(recipe, step, lora, dtype))
    parts = [
        *base,
        Part("LoRA", bytes_of(lora)),
        Part("projectors", bytes_of(heads)),
        Part("gradients", gradients),
        # Several processes gather gradients in buckets that hold them once more.
        Part("gradient buckets", gradients if processes > 1 else 0),
        Part(f"optimizer state ({recipe.optimizer})", optimizer_bytes(recipe, lora, heads)),
        Part("moving average", bytes_of(lora) if recipe.ema_decay is not None else 0),
        Part("activations at the peak", activations),
        Part("largest layer, dequantised", _largest_linear(step, dtype) if recipe.quantization else 0),
    ]
    return TrainingMemory(
        with_allowance(parts),
        memory.host,
        sum(part.bytes for part in base),
        sum(parameter.numel() for parameter in lora),
    )


@dataclass(frozen=True)
class CachingMemory:
    """What making the cache needs of the GPU: encoders of captions work first, then those of clips and references.

    Attributes:
        captions, clips: parts while these are encoded.
    """

    captions: Memory
    clips: Memory

    @property
    def total(self) -> int:
        """Bytes of the larger of the two."""
        return max(self.captions.total, self.clips.total)


def caching_memory(models: Models, encoded: int = 0) -> CachingMemory:
    """The weights that lie on the GPU at a time.

    Args:
        models: a recipe's configs.
        encoded: bytes that the VAE takes on top while it encodes a clip.
    """
    pipe = models.encoders.pipe
    teachers = [teacher for loaded in models.encoders.models.values() for teacher in loaded.values()]
    return CachingMemory(
        with_allowance([Part("text encoder", module_bytes(pipe.text_encoder))]),
        with_allowance(
            [
                Part("VAE, in float32", module_bytes(pipe.vae)),
                Part("teachers, in float32", sum(map(module_bytes, teachers))),
                Part("the VAE's activations for one clip", encoded),
            ]
        ),
    )


def with_allowance(parts: Iterable[Part]) -> Memory:
    """The parts that are not empty, and an allowance for what is not counted."""
    found = [part for part in parts if part.bytes]
    allowance = CONTEXT + math.ceil(FRAGMENTATION * sum(part.bytes for part in found))
    return Memory((*found, Part("allowance: CUDA context 1 GB, fragmentation 5 %", allowance)))


def _base_parts(recipe: Recipe, step: TrainingStep, lora: list[nn.Parameter], dtype: torch.dtype) -> Iterator[Part]:
    """The frozen weights by the type they are stored in."""
    trained, quantised = set(lora), set()
    if recipe.quantization:
        layers = list(quantised_layers(step.transformer))
        quantised = {layer.weight for layer in layers}
        size = sum(quantised_bytes(layer, recipe.quantization) for layer in layers)
        yield Part(f"base, {len(layers)} layers in {recipe.quantization}", size)
    sizes: Counter[str] = Counter()
    for tensor in [*step.transformer.parameters(), *step.transformer.buffers()]:
        if tensor not in trained and tensor not in quantised:
            sizes[str(tensor.dtype).removeprefix("torch.")] += tensor.numel() * tensor.element_size()
    yield from (Part(f"base, {name}", size) for name, size in sizes.most_common())


def quantised_layers(transformer: Any) -> Iterator[nn.Linear]:
    """The linear layers that diffusers has bitsandbytes quantise: all but those that its class keeps in float32."""
    kept = transformer._keep_in_fp32_modules or ()
    for name, module in transformer.named_modules():
        if isinstance(module, nn.Linear) and ".lora_" not in name and not set(kept) & set(name.split(".")):
            yield module


def quantised_bytes(layer: nn.Linear, kind: str) -> int:
    """Bytes of a layer's weight in 4 or 8 bits.

    nf4 (QLoRA, arXiv 2305.14314): half a byte each; of every 64 a scale in 8 bits, of every 256 scales one in float32;
    and the layer's two tables of 16 and 256 numbers and its mean. int8: a byte each, and a float32 for every output.
    """
    if kind == "int8":
        return layer.weight.numel() + 4 * layer.out_features
    scales = math.ceil(layer.weight.numel() / 64)
    return math.ceil(layer.weight.numel() / 2) + scales + 4 * (math.ceil(scales / 256) + 16 + 256 + 1)


def _largest_linear(step: TrainingStep, dtype: torch.dtype) -> int:
    return max(layer.weight.numel() for layer in quantised_layers(step.transformer)) * dtype.itemsize


def optimizer_bytes(recipe: Recipe, lora: list[nn.Parameter], heads: list[nn.Parameter]) -> int:
    """Bytes of the recipe's optimizer's state for parameters on meta.

    A paged optimizer's counts, too: it leaves the GPU only when that is full.
    """
    optimizer: Any = build_optimizer(recipe, lora, heads)
    if hasattr(optimizer, "init_state"):  # bitsandbytes': its step would run kernels
        optimizer.is_paged = False
        for group_index, group in enumerate(optimizer.param_groups):
            for index, parameter in enumerate(group["params"]):
                optimizer.init_state(group, parameter, group_index, index)
    else:
        for parameter in [*lora, *heads]:
            parameter.grad = torch.empty_like(parameter)
        optimizer.step()
    states = [value for state in optimizer.state.values() for value in state.values()]
    return bytes_of(value for value in states if isinstance(value, torch.Tensor) and value.is_meta)
