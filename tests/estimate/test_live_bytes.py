"""Counted bytes against those of tensors whose lives are known."""

import torch
from torch.autograd.graph import save_on_cpu

from refalign_adapter.estimate.live_bytes import LiveBytes, bytes_of, module_bytes


def test_a_storage_counts_from_its_making_to_its_end():
    with LiveBytes("cpu") as live:
        first = torch.zeros(1000)  # 4,000 bytes
        second = first + 1
        assert live.live == 8000
        view = second[10:20]
        del second
        assert live.live == 8000  # the view keeps all of it
        del view
        assert live.live == 4000
        first.mul_(2)
    assert (live.live, live.peak) == (4000, 8000)
    del first
    assert live.live == 0


def test_what_was_there_before_and_other_devices_do_not_count():
    weight = torch.ones(100, 100)
    with LiveBytes("cpu") as live:
        product = torch.ones(1, 100) @ weight.t()  # a view of the weight, an input of 400 bytes, an output of 400
        elsewhere = torch.zeros(1000, device="meta")
    assert live.peak == 800
    assert product.shape == (1, 100)
    assert elsewhere.is_meta


def test_gradients_count_and_what_backward_frees_does_not():
    layer = torch.nn.Linear(64, 64, bias=False)
    with LiveBytes("cpu") as live:
        layer(torch.zeros(8, 64)).sum().backward()
    assert live.live == 64 * 64 * 4
    assert live.peak > live.live


def test_shared_storages_count_once():
    tensor = torch.zeros(10)
    assert bytes_of([tensor, tensor[2:], torch.zeros(3, device="meta")]) == 40 + 12
    module = torch.nn.Linear(4, 4)
    module.register_buffer("table", torch.zeros(5, dtype=torch.float64))
    assert module_bytes(module) == (16 + 4) * 4 + 40


def test_copies_of_meta_tensors_to_the_host_are_counted_in_powers_of_two_and_take_nothing():
    states = torch.zeros(1000, device="meta", requires_grad=True)
    with LiveBytes() as live:
        with save_on_cpu():
            output = states.sin().exp()
        assert live.live == 4000  # the output alone: its input and itself are kept on the host
        assert live.host == 2 * 4096
        output.sum().backward()
    assert live.peak >= 3 * 4000
    assert states.grad is not None
