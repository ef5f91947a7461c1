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


MODES = [
    ("joint", "all", 2),
    ("isolated", "reference", 2),
    ("isolated", "all", 2),
    ("isolated", "reference", 3),
    ("joint", "all", 2, ("reference_timestep", "clean")),
    ("isolated", "reference", 2, ("reference_place", "beyond"), ("reference_frame", -1)),
]


def build(mode=MODES[0]):
    attention, scope, layers, *fields = mode
    torch.manual_seed(0)
    transformer = WanTransformer3DModel(**CONFIG).double()
    config = ra.RefAlignConfig(attention=attention, lora_scope=scope, r=4, align_layers=layers, **dict(fields))
    branch = ra.attach(transformer, config, seed=0)
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


@pytest.fixture(scope="module", params=MODES, ids=lambda mode: "-".join(map(str, mode)))
def mode(request):
    return request.param


@pytest.fixture(scope="module")
def expected(mode):
    return gradients(*build(mode))


def assert_same(got, expected):
    assert got.keys() == expected.keys()
    assert all(gradient.abs().max() > 0 for gradient in expected.values())
    for name in expected:
        torch.testing.assert_close(got[name], expected[name], atol=1e-12, rtol=1e-9, msg=name)


def test_gradients_are_equal_with_checkpointing(mode, expected):
    transformer, branch = build(mode)
    transformer.enable_gradient_checkpointing()
    assert_same(gradients(transformer, branch), expected)


def test_a_plain_call_between_forward_and_backward_changes_nothing(mode, expected):
    transformer, branch = build(mode)
    transformer.enable_gradient_checkpointing()

    def plain():
        with torch.no_grad():
            transformer(torch.zeros(1, 4, 1, 4, 4).double(), torch.ones(1).double(), torch.zeros(1, 3, 8).double())

    assert_same(gradients(transformer, branch, plain), expected)


def test_the_users_own_checkpointing_function_is_used_and_put_back(mode, expected):
    transformer, branch = build(mode)
    seen = []

    def own(block, *inputs):
        seen.append(len(inputs))
        return torch.utils.checkpoint.checkpoint(block, *inputs, use_reentrant=False)

    transformer.enable_gradient_checkpointing(own)
    assert_same(gradients(transformer, branch), expected)
    passes = 2 if mode[0] == "isolated" else 1
    assert len(seen) == CONFIG["num_layers"] * passes
    assert getattr(transformer, ATTRIBUTE) is own


def test_diffusers_still_keeps_the_function_where_we_wrap_it():
    transformer = WanTransformer3DModel(**CONFIG)
    assert hasattr(transformer, ATTRIBUTE)
    marker = lambda block, *inputs: block(*inputs)  # noqa: E731
    transformer.enable_gradient_checkpointing(marker)
    assert getattr(transformer, ATTRIBUTE) is marker
    assert transformer.gradient_checkpointing is True


def test_two_calls_before_one_backward_keep_their_own_passes(mode):
    def total(transformer, branch):
        loss = 0
        for seed in (3, 4):
            references = torch.randn(1, 4, 1, 4, 4, generator=torch.Generator().manual_seed(seed)).double()
            with branch.references(references):
                video = torch.full((1, 4, 1, 4, 4), 0.1 * seed).double()
                loss = loss + transformer(video, torch.ones(1).double(), torch.ones(1, 3, 8).double()).sample.sum()
        loss.backward()
        return {name: parameter.grad for name, parameter in branch.named_parameters() if parameter.grad is not None}

    plain, checkpointed = build(mode), build(mode)
    checkpointed[0].enable_gradient_checkpointing()
    wanted, got = total(*plain), total(*checkpointed)
    assert len(wanted) > 4
    for name, gradient in wanted.items():
        torch.testing.assert_close(got[name], gradient, atol=1e-12, rtol=1e-9, msg=name)


def test_features_carry_gradients_to_the_lora_before_their_block(mode):
    transformer, branch = build(mode)
    with branch.references(torch.randn(1, 4, 2, 4, 4, generator=torch.Generator().manual_seed(3)).double()):
        transformer(torch.zeros(1, 4, 1, 4, 4).double(), torch.ones(1).double(), torch.zeros(1, 3, 8).double())
    branch.features[0].square().sum().backward()
    touched = {name.split(".")[1] for name, parameter in branch.named_parameters() if parameter.grad is not None}
    assert touched == {"0"}
