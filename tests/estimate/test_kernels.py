"""What stands in for a GPU's kernels, against the CPU's fused ones, closed forms and torch's own lists."""

import re
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch.autograd.graph import saved_tensors_hooks
from torch.nn.attention import SDPBackend, sdpa_kernel

from refalign_adapter.estimate.kernels import LOWER, UPPER, GpuKernels
from refalign_adapter.estimate.live_bytes import LiveBytes, bytes_of

BF16 = torch.bfloat16


def saved_by(function, *inputs):
    """Bytes that a function keeps for backward, its inputs included, and what it returns."""
    saved = []
    with saved_tensors_hooks(lambda tensor: saved.append(tensor) or tensor, lambda tensor: tensor):
        output = function(*inputs)
    return bytes_of(saved), output


def attention_inputs(device):
    query = torch.zeros(2, 3, 50, 16, device=device, dtype=BF16)
    key = torch.zeros(2, 3, 70, 16, device=device, dtype=BF16)
    return [query.requires_grad_(), key.requires_grad_(), torch.zeros_like(key).requires_grad_()]


def test_attention_keeps_what_flash_attention_does():
    with sdpa_kernel(SDPBackend.FLASH_ATTENTION):
        expected, real = saved_by(F.scaled_dot_product_attention, *attention_inputs("cpu"))
    inputs = attention_inputs("meta")
    with GpuKernels().once():
        found, output = saved_by(F.scaled_dot_product_attention, *inputs)
    assert found == expected == (2 * 2 * 3 * 50 + 2 * 2 * 3 * 70) * 16 * 2 + 2 * 3 * 50 * 4
    assert (output.shape, output.dtype) == (real.shape, real.dtype)
    output.sum().backward()
    assert [value.grad.shape for value in inputs] == [value.shape for value in inputs]


def test_attention_needs_no_square_of_the_tokens():
    query, key, value = attention_inputs("meta")
    tokens = 32_760
    long = torch.zeros(1, 1, tokens, 128, device="meta", dtype=BF16, requires_grad=True)
    with LiveBytes() as live:
        with GpuKernels().once():
            output = F.scaled_dot_product_attention(long, long, long)
        output.sum().backward()
    assert live.peak < 8 * tokens * 128 * 4
    assert F.scaled_dot_product_attention(query, key, value).shape == query.shape  # outside, meta's own


def test_rms_norm_keeps_its_input_and_a_number_per_token():
    norm = torch.nn.RMSNorm(32, device="meta", dtype=BF16).requires_grad_(False)
    states = torch.zeros(2, 5, 32, device="meta", dtype=BF16, requires_grad=True)
    with GpuKernels().once():
        saved, output = saved_by(norm, states)
    assert saved == (2 * 5 * 32 + 32) * 2 + 2 * 5 * 4
    output.sum().backward()
    assert states.grad is not None
    assert states.grad.dtype == BF16


def test_the_lists_are_those_of_torch():
    header = Path(torch.__file__).parent / "include/ATen/autocast_mode.h"
    macros = dict(re.findall(r"#define (AT_FORALL_\w+)\(_\)(.*?)\n\n", header.read_text(), re.DOTALL))
    names = {name: set(re.findall(r"_\((\w+)", body)) for name, body in macros.items()}
    plain = lambda listed: {name.strip("_") for name in listed}  # noqa: E731
    assert plain(LOWER) <= names["AT_FORALL_LOWER_PRECISION_FP"]
    assert plain(UPPER) <= names["AT_FORALL_FP32"] | names["AT_FORALL_FP32_SET_OPT_DTYPE"]


@pytest.mark.parametrize("autocast", [None, BF16])
def test_types_follow_autocast(autocast):
    states = torch.zeros(4, 8, device="meta")
    low = states.to(BF16)
    weight = torch.zeros(8, 8, device="meta", requires_grad=True)
    with GpuKernels(autocast).once():
        assert F.linear(states, weight).dtype == (autocast or torch.float32)
        assert (states @ weight).dtype == (autocast or torch.float32)
        assert F.layer_norm(low, (8,)).dtype == (torch.float32 if autocast else BF16)
        assert F.gelu(low).dtype == BF16
        assert F.linear(states.double(), weight.double()).dtype == torch.float64
        assert F.linear(torch.zeros(4, 8), torch.zeros(8, 8)).dtype == torch.float32  # on the host: not the GPU's


def test_a_trained_weight_is_cast_once():
    weight = torch.zeros(64, 64, device="meta", requires_grad=True)
    states = torch.zeros(1, 64, device="meta", dtype=BF16)
    kernels = GpuKernels(BF16)
    with LiveBytes() as live:
        with kernels.once():
            F.linear(states, weight)
            with kernels.once():  # inside, nothing changes
                F.linear(states, weight)
            assert live.live == 64 * 64 * 2
        assert live.live == 0
