"""Checkpointed activations in host memory: gradients are those without, and exactly the blocks' inputs are moved."""

import weakref
from types import SimpleNamespace
from typing import Any, cast

import pytest
import torch
from diffusers import WanTransformer3DModel
from tiny_models import tiny_transformer
from torch.autograd.graph import saved_tensors_hooks
from torch.multiprocessing.reductions import StorageWeakRef

import refalign_adapter as ra
from refalign_adapter.errors import ConfigError
from refalign_adapter.families.lookup import load_family
from refalign_adapter.training import offload
from refalign_adapter.training.offload import offloaded_checkpoint
from refalign_adapter.training.setup import _build_branch

LAYERS, WIDTH = 3, 48
BATCH, VIDEO_TOKENS, REFERENCE_TOKENS = 2, 2 * 2 * 3, 2 * 3
REAL = 3
"""References of the batch: two of the first sample, one of the second."""
MODES = [("joint", "all", 2), ("isolated", "reference", 2), ("isolated", "all", 2), ("isolated", "reference", 3)]


@pytest.fixture(params=MODES, ids=lambda mode: "-".join(map(str, mode)))
def mode(request):
    return request.param


def build(mode, dtype=torch.float64):
    attention, scope, layers = mode
    transformer: Any = tiny_transformer(num_layers=LAYERS)
    transformer.to(dtype)
    config = ra.RefAlignConfig(attention=attention, lora_scope=scope, r=4, align_layers=layers)
    branch = ra.attach(transformer, config, seed=0)
    generator = torch.Generator().manual_seed(1)
    for name, parameter in branch.named_parameters():
        parameter.data = parameter.data.to(dtype)
        if "lora_B" in name:
            parameter.data = 0.1 * torch.randn(parameter.shape, generator=generator, dtype=dtype)
    branch.capture = True
    return transformer, branch


def run(transformer, branch, dtype=torch.float64, device="cpu"):
    """The loss of one forward, with features in it as in training."""
    generator = torch.Generator().manual_seed(2)
    draw = lambda *shape: torch.randn(shape, generator=generator, dtype=dtype).to(device)  # noqa: E731
    video, references, text = draw(BATCH, 16, 2, 4, 6), draw(BATCH, 16, 2, 4, 6), draw(BATCH, 5, 32)
    mask = torch.tensor([[True, True], [True, False]], device=device)
    with branch.references(references, mask):
        out = transformer(video, torch.tensor([700.0, 300.0], device=device, dtype=dtype), text).sample
    features = branch.features
    branch.clear()
    return out.square().mean() + sum(tokens.square().mean() for tokens in features.values())


def gradients(transformer, branch, **where):
    run(transformer, branch, **where).backward()
    return {name: parameter.grad for name, parameter in branch.named_parameters()}


def moved_bytes(mode):
    """Of the blocks' inputs, in order: with isolated attention, those of the references' own pass come first."""
    if mode[0] == "joint":
        return [BATCH * (VIDEO_TOKENS + 2 * REFERENCE_TOKENS) * WIDTH * 8] * LAYERS
    return [REAL * REFERENCE_TOKENS * WIDTH * 8] * LAYERS + [BATCH * VIDEO_TOKENS * WIDTH * 8] * LAYERS


class Host(saved_tensors_hooks):
    """`save_on_cpu` that copies on the CPU too, as it does from a GPU, and keeps books."""

    packed, unpacked = [], []

    def __init__(self, pin_memory):
        assert not pin_memory  # nothing here is on a GPU
        super().__init__(self.pack, self.unpack)

    def pack(self, tensor):
        copy = tensor.clone()
        self.packed.append(weakref.ref(copy))
        return copy

    def unpack(self, copy):
        self.unpacked.append(copy.nbytes)
        return copy.clone()


@pytest.fixture
def host(monkeypatch):
    monkeypatch.setattr(offload, "save_on_cpu", Host)
    Host.packed, Host.unpacked = [], []
    return Host


def test_gradients_are_those_without_and_with_plain_checkpointing(mode, host):
    found = []
    for enable in (None, (), (offloaded_checkpoint,)):
        transformer, branch = build(mode)
        if enable is not None:
            transformer.enable_gradient_checkpointing(*enable)
        found.append(gradients(transformer, branch))
    without, plain, offloaded = found
    assert host.packed
    assert offloaded.keys() == without.keys()
    assert all(gradient.abs().max() > 0 for gradient in without.values())
    for name, gradient in offloaded.items():
        torch.testing.assert_close(gradient, without[name], atol=1e-12, rtol=1e-12, msg=name)
        torch.testing.assert_close(gradient, plain[name], atol=1e-12, rtol=1e-12, msg=name)


def test_exactly_the_blocks_inputs_are_moved_once_and_let_go_of(mode, host):
    transformer, branch = build(mode)
    transformer.enable_gradient_checkpointing(offloaded_checkpoint)
    loss = run(transformer, branch)
    assert [copy().nbytes for copy in host.packed] == moved_bytes(mode)
    assert host.unpacked == []
    loss.backward()
    assert len(host.packed) == len(moved_bytes(mode))  # the second run moves nothing
    assert set(host.unpacked) <= set(moved_bytes(mode))
    assert len(host.unpacked) <= len(host.packed)
    assert [copy for copy in host.packed if copy() is not None] == []


def test_what_was_moved_is_not_kept_where_it_was(mode, host):
    """Of the video's blocks; what references are aligned by stays for the loss."""
    transformer, branch = build(mode)
    transformer.enable_gradient_checkpointing(offloaded_checkpoint)
    inputs = []

    def watch(block, args):
        if args[0].shape[0] == BATCH:  # the references' own pass has one for each of them
            inputs.append(StorageWeakRef(args[0].untyped_storage()))

    handles = [block.register_forward_pre_hook(watch) for block in transformer.blocks]
    loss = run(transformer, branch)
    for handle in handles:
        handle.remove()
    assert [storage.expired() for storage in inputs] == [True] * LAYERS
    assert loss.requires_grad


def test_a_recipe_turns_it_on(make_recipe):
    family, accelerator = load_family("WanTransformer3DModel"), cast(Any, SimpleNamespace(mixed_precision="no"))
    for offloaded in (True, False):
        recipe = make_recipe("gradient_checkpointing=true", f"offload_activations={str(offloaded).lower()}")
        transformer = _build_branch(recipe, family, accelerator).transformer
        assert isinstance(transformer, WanTransformer3DModel)
        assert transformer.gradient_checkpointing
        assert (transformer._gradient_checkpointing_func is offloaded_checkpoint) is offloaded


def test_it_needs_gradient_checkpointing(make_recipe):
    with pytest.raises(ConfigError) as caught:
        make_recipe("offload_activations=true")
    assert caught.value.problems == [
        "offload_activations needs gradient_checkpointing=true, got false; set that too, or leave it out"
    ]


@pytest.mark.gpu
@pytest.mark.parametrize("mode", MODES, ids=lambda mode: "-".join(map(str, mode)))
def test_on_a_gpu_gradients_are_equal_and_memory_is_less(mode):
    found, held = [], []
    for enable in ((), (offloaded_checkpoint,)):
        transformer, branch = build(mode, torch.float32)
        transformer.to("cuda").enable_gradient_checkpointing(*enable)
        gradients(transformer, branch, dtype=torch.float32, device="cuda")  # what libraries allocate once
        transformer.zero_grad()
        before = torch.cuda.memory_allocated()
        loss = run(transformer, branch, dtype=torch.float32, device="cuda")
        held.append(torch.cuda.memory_allocated() - before)
        loss.backward()
        found.append({name: parameter.grad for name, parameter in branch.named_parameters()})
    for name, gradient in found[0].items():
        torch.testing.assert_close(found[1][name], gradient, msg=name)
    assert held[1] < held[0]
