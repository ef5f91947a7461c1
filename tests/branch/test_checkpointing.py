"""Gradient checkpointing re-runs blocks in backward: gradients must be those without it."""

import pytest
import torch
import torch.utils.checkpoint
from diffusers import WanTransformer3DModel

import refalign_adapter as ra
from refalign_adapter.branch.checkpointing import ATTRIBUTE

CONFIG = {
    "num_attention_heads": 2,
    "attention_head_dim": 12,
    "in_channels": 4,
    "out_channels": 4,
    "text_dim": 8,
    "freq_dim": 16,
    "ffn_dim": 32,
    "num_layers": 3,
}


def build():
    torch.manual_seed(0)
    transformer = WanTransformer3DModel(**CONFIG).double()
    branch = ra.attach(transformer, ra.RefAlignConfig(r=4, align_layers=2), seed=0)
    for name, parameter in branch.named_parameters():
        parameter.data = parameter.data.double()
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.1, generator=torch.Generator().manual_seed(1))
    branch.capture = True
    return transformer, branch


def gradients(transformer, branch, between=None):
    generator = torch.Generator().manual_seed(2)
    draw = lambda *shape: torch.randn(shape, generator=generator, dtype=torch.float64)  # noqa: E731
    video, references, text = draw(2, 4, 2, 4, 4), draw(2, 4, 2, 4, 4), draw(2, 3, 8)
    mask = torch.tensor([[True, True], [True, False]])
    with branch.references(references, mask):
        out = transformer(video, torch.tensor([700.0, 300.0]).double(), text).sample
    loss = out.square().mean() + sum(features.square().mean() for features in branch.features.values())
    if between is not None:
        between()
    loss.backward()
    return {name: parameter.grad.clone() for name, parameter in branch.named_parameters()}


@pytest.fixture(scope="module")
def expected():
    return gradients(*build())


def assert_same(got, expected):
    assert got.keys() == expected.keys()
    for name in expected:
        torch.testing.assert_close(got[name], expected[name], atol=1e-12, rtol=1e-9, msg=name)


def test_gradients_are_equal_with_checkpointing(expected):
    transformer, branch = build()
    transformer.enable_gradient_checkpointing()
    assert_same(gradients(transformer, branch), expected)


def test_a_plain_call_between_forward_and_backward_changes_nothing(expected):
    transformer, branch = build()
    transformer.enable_gradient_checkpointing()

    def plain():
        with torch.no_grad():
            transformer(torch.zeros(1, 4, 1, 4, 4).double(), torch.ones(1).double(), torch.zeros(1, 3, 8).double())

    assert_same(gradients(transformer, branch, plain), expected)


def test_the_users_own_checkpointing_function_is_used_and_put_back(expected):
    transformer, branch = build()
    seen = []

    def own(block, *inputs):
        seen.append(len(inputs))
        return torch.utils.checkpoint.checkpoint(block, *inputs, use_reentrant=False)

    transformer.enable_gradient_checkpointing(own)
    assert_same(gradients(transformer, branch), expected)
    assert len(seen) == CONFIG["num_layers"]
    assert getattr(transformer, ATTRIBUTE) is own


def test_diffusers_still_keeps_the_function_where_we_wrap_it():
    transformer = WanTransformer3DModel(**CONFIG)
    assert hasattr(transformer, ATTRIBUTE)
    marker = lambda block, *inputs: block(*inputs)  # noqa: E731
    transformer.enable_gradient_checkpointing(marker)
    assert getattr(transformer, ATTRIBUTE) is marker
    assert transformer.gradient_checkpointing is True


def test_features_carry_gradients_to_the_lora_before_their_block():
    transformer, branch = build()
    with branch.references(torch.randn(1, 4, 2, 4, 4, generator=torch.Generator().manual_seed(3)).double()):
        transformer(torch.zeros(1, 4, 1, 4, 4).double(), torch.ones(1).double(), torch.zeros(1, 3, 8).double())
    branch.features[0].square().sum().backward()
    touched = {name.split(".")[1] for name, parameter in branch.named_parameters() if parameter.grad is not None}
    assert touched == {"0"}
