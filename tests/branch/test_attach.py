"""Attach and detach are symmetric; only what is declared trains; the real configurations fit."""

import copy

import pytest
import torch
from diffusers import WanTransformer3DModel
from peft import LoraConfig

import refalign_adapter as ra
from refalign_adapter.branch.switched_on import branch_of

CONFIG = {
    "num_attention_heads": 2,
    "attention_head_dim": 12,
    "in_channels": 4,
    "out_channels": 4,
    "text_dim": 8,
    "freq_dim": 16,
    "ffn_dim": 32,
    "num_layers": 2,
}
WAN_1_3B = {"num_layers": 30, "num_attention_heads": 12, "ffn_dim": 8960}
WAN_5B = {"num_layers": 30, "num_attention_heads": 24, "ffn_dim": 14336, "in_channels": 48, "out_channels": 48}
WAN_14B = {"num_layers": 40, "num_attention_heads": 40, "ffn_dim": 13824}
WAN_2_1 = {
    "patch_size": (1, 2, 2),
    "attention_head_dim": 128,
    "in_channels": 16,
    "out_channels": 16,
    "text_dim": 4096,
    "freq_dim": 256,
    "cross_attn_norm": True,
}
SMALL = ra.RefAlignConfig(attention="joint", r=4, align_layers=2)


def build(dtype=torch.float32):
    torch.manual_seed(0)
    return WanTransformer3DModel(**CONFIG).to(dtype)


def run(transformer):
    generator = torch.Generator().manual_seed(0)
    draw = lambda *shape: torch.randn(shape, generator=generator).to(transformer.dtype)  # noqa: E731
    with torch.no_grad():
        return transformer(draw(1, 4, 2, 4, 4), torch.tensor([500.0]), draw(1, 3, 8)).sample


def anatomy(transformer):
    """All that attach could have left behind."""
    hooks = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_forward_hooks_with_kwargs")
    return {
        "modules": [(name, type(module)) for name, module in transformer.named_modules()],
        "identities": [id(module) for module in transformer.modules()],
        "hooks": [len(getattr(module, kind)) for module in transformer.modules() for kind in hooks],
        "processors": list(map(id, transformer.attn_processors.values())),
        "parameters": [(name, p.requires_grad, p.dtype) for name, p in transformer.named_parameters()],
        "attributes": sorted(name for name in vars(transformer) if name != "_hf_peft_config_loaded"),
        "peft": bool(getattr(transformer, "_hf_peft_config_loaded", False)),
        "training": [module.training for module in transformer.modules()],
    }


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_detach_leaves_the_transformer_as_it_was(dtype):
    transformer = build(dtype)
    transformer.proj_out.requires_grad_(False)
    transformer.blocks[0].eval()
    before, output = anatomy(transformer), run(transformer)
    branch = ra.attach(transformer, SMALL)
    with branch.references(torch.zeros(1, 4, 1, 4, 4)):
        run(transformer)
    branch.detach()
    branch.detach()
    assert anatomy(transformer) == before
    assert torch.equal(run(transformer), output)
    assert branch_of(transformer) is None


def test_another_adapter_stays_on_before_and_after():
    transformer = build()
    transformer.add_adapter(LoraConfig(r=2, target_modules=["to_q"], init_lora_weights=False), adapter_name="style")
    output = run(transformer)
    branch = ra.attach(transformer, SMALL)
    assert set(transformer.active_adapters()) == {"style", "refalign"}
    assert torch.equal(run(transformer), output)
    branch.detach()
    assert transformer.active_adapters() == ["style"]
    assert torch.equal(run(transformer), output)


def test_attach_twice_is_refused_and_attach_after_detach_works():
    transformer = build()
    branch = ra.attach(transformer, SMALL)
    with pytest.raises(ra.UserError, match="has a reference branch already"):
        ra.attach(transformer, SMALL)
    branch.detach()
    assert ra.attach(transformer, SMALL).config.target_modules


def test_the_seed_decides_the_initial_weights_and_leaves_the_global_generator_alone():
    weights = []
    for seed in (1, 1, 2):
        transformer = build()
        state = torch.get_rng_state()
        branch = ra.attach(transformer, SMALL, seed=seed)
        assert torch.equal(torch.get_rng_state(), state)
        weights.append(torch.cat([parameter.flatten() for _, parameter in branch.named_parameters()]))
    assert torch.equal(weights[0], weights[1])
    assert not torch.equal(weights[0], weights[2])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_only_the_lora_trains_and_it_is_float32(dtype):
    transformer = build(dtype)
    branch = ra.attach(transformer, SMALL)
    trainable = {name for name, parameter in transformer.named_parameters() if parameter.requires_grad}
    assert trainable == {name for name, _ in branch.named_parameters()}
    assert trainable
    assert all("lora_" in name for name in trainable)
    assert {parameter.dtype for _, parameter in branch.named_parameters()} == {torch.float32}
    before = copy.deepcopy(transformer.state_dict())
    optimizer = torch.optim.SGD([parameter for _, parameter in branch.named_parameters()], lr=1.0)
    draw = lambda *shape: torch.randn(shape, generator=torch.Generator().manual_seed(1)).to(dtype)  # noqa: E731
    with branch.references(draw(1, 4, 1, 4, 4)):
        arguments = [draw(1, 4, 2, 4, 4), torch.tensor([500.0]), draw(1, 3, 8)]
        transformer(*arguments).sample.float().square().sum().backward()
    optimizer.step()
    changed = {name for name, tensor in transformer.state_dict().items() if not torch.equal(tensor, before[name])}
    assert changed == {name for name in trainable if "lora_B" in name}  # A has no gradient while B is zero


@pytest.mark.parametrize(
    ("sizes", "megabytes"), [(WAN_1_3B, 175), (WAN_5B, 322), (WAN_14B, 613)], ids=["1.3B", "5B", "14B"]
)
def test_the_real_configurations_get_lora_of_the_expected_shapes_and_size(sizes, megabytes):
    with torch.device("meta"):
        transformer = WanTransformer3DModel(**WAN_2_1 | sizes)
        branch = ra.attach(transformer, ra.RefAlignConfig(attention="joint", r=64))
    dim, ffn = sizes["num_attention_heads"] * 128, sizes["ffn_dim"]
    expected = {}
    for block in range(sizes["num_layers"]):
        layers = {
            f"{a}.{layer}": (dim, dim) for a in ("attn1", "attn2") for layer in ("to_q", "to_k", "to_v", "to_out.0")
        }
        for layer, (inside, outside) in {**layers, "ffn.net.0.proj": (dim, ffn), "ffn.net.2": (ffn, dim)}.items():
            expected[f"blocks.{block}.{layer}.lora_A.refalign.weight"] = (64, inside)
            expected[f"blocks.{block}.{layer}.lora_B.refalign.weight"] = (outside, 64)
    shapes = {name: tuple(parameter.shape) for name, parameter in branch.named_parameters()}
    assert shapes == expected
    assert {name for name, p in transformer.named_parameters() if p.requires_grad} == set(expected)
    in_bfloat16 = 2 * sum(parameter.numel() for _, parameter in branch.named_parameters())
    assert round(in_bfloat16 / 1e6) == megabytes
    assert branch.align_blocks == tuple(range(9))


@pytest.mark.parametrize(
    ("config", "message"),
    [
        (
            ra.RefAlignConfig(attention="joint", align_layers=3),
            "align_layers reaches block 2, but the model has 2 blocks",
        ),
        (ra.RefAlignConfig(attention="joint", align_layers=1, target_modules=["nothing"]), "target_modules"),
        (
            ra.RefAlignConfig(attention="joint", align_layers=1, base={"family": "wan", "num_layers": 40}),
            "made for another base",
        ),
    ],
)
def test_a_config_that_does_not_fit_is_refused_and_leaves_nothing(config, message):
    transformer = build()
    before = anatomy(transformer)
    with pytest.raises(ra.UserError, match=message):
        ra.attach(transformer, config)
    assert anatomy(transformer) == before


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"in_channels": 36, "out_channels": 16}, "predicts 16"),
        ({"image_dim": 8, "added_kv_proj_dim": 24}, "image-to-video"),
    ],
)
def test_variants_that_cannot_take_references_are_refused(changes, message):
    with pytest.raises(ra.UserError, match=message):
        ra.attach(WanTransformer3DModel(**CONFIG | changes), SMALL)


def test_an_unknown_model_is_refused_with_what_is_supported():
    with pytest.raises(ra.UserError, match="Linear is no known DiT; supported are .*WanTransformer3DModel"):
        ra.attach(torch.nn.Linear(2, 2), SMALL)
