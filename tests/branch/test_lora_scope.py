"""Which LoRAs act in which pass, and that PEFT still keeps the switch where we turn it."""

import pytest
import torch
from peft import LoraConfig
from tiny_models import tiny_transformer

import refalign_adapter as ra
from refalign_adapter.branch.lora_scope import ATTRIBUTE, lora_layers

STYLE = LoraConfig(r=2, target_modules=["attn1.to_q", "attn2.to_q", "ffn.net.2"], init_lora_weights=False)


def draw(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def inputs(seed=1):
    return draw(1, 16, 2, 8, 8, seed=seed), torch.tensor([500.0]), draw(1, 5, 32, seed=seed + 1)


def adapt(transformer, scope="reference"):
    config = ra.RefAlignConfig(attention="isolated", lora_scope=scope, r=4, align_layers=1)
    branch = ra.attach(transformer, config, seed=0)
    for index, (_, parameter) in enumerate(sorted(branch.named_parameters())):
        parameter.data = 0.1 * draw(*parameter.shape, seed=index)
    return branch


@torch.no_grad()
def run(transformer, *, seed=1):
    return transformer(*inputs(seed)).sample


@pytest.fixture
def styled():
    transformer = tiny_transformer()
    with torch.random.fork_rng([]):
        torch.manual_seed(5)
        transformer.add_adapter(STYLE, adapter_name="style")
    return transformer


def test_peft_still_keeps_the_active_adapters_where_we_set_them(styled):
    layer = lora_layers(styled)[0]
    assert layer.active_adapters == ["style"]
    setattr(layer, ATTRIBUTE, [])
    assert layer.active_adapters == []


def test_another_lora_keeps_its_effect_bit_for_bit_and_stays_out_of_the_references_pass(styled):
    references = draw(1, 16, 2, 8, 8, seed=3)
    only = adapt(tiny_transformer())
    alone = only.encode_references(references, frames=2)
    expected = run(styled)
    branch = adapt(styled)
    assert {name for name, _ in branch.named_parameters()} == {name for name, _ in only.named_parameters()}
    assert torch.equal(run(styled), expected)
    cache = branch.encode_references(references, frames=2)
    for key, other in zip(cache.keys + cache.values, alone.keys + alone.values, strict=True):
        assert torch.equal(key, other)
    with branch.references(cache):
        with_style = run(styled)
    styled.set_adapter(["refalign"])
    with branch.references(cache):
        assert not torch.equal(run(styled), with_style)


def test_after_a_pass_all_switches_are_where_they_were(styled):
    branch = adapt(styled)
    before = [list(layer.active_adapters) for layer in lora_layers(styled)]
    trainable = [parameter.requires_grad for parameter in styled.parameters()]
    with branch.references(draw(1, 16, 1, 8, 8)):
        run(styled)
    assert [list(layer.active_adapters) for layer in lora_layers(styled)] == before
    assert [parameter.requires_grad for parameter in styled.parameters()] == trainable


@pytest.mark.parametrize("scope", ["reference", "all"])
def test_references_with_an_adapter_that_is_switched_off_are_refused(styled, scope):
    branch = adapt(styled, scope)
    references = draw(1, 16, 1, 8, 8)
    styled.set_adapter(["style"])
    with pytest.raises(ra.UserError, match="switched off; call set_adapters"):
        branch.references(references)
    with pytest.raises(ra.UserError, match="switched off"):
        branch.encode_references(references, frames=2)
    styled.set_adapter(["style", "refalign"])
    styled.disable_adapters()
    with pytest.raises(ra.UserError, match="switched off; call enable_lora"):
        branch.references(references)


def test_a_reference_scoped_adapter_in_the_bases_weights_is_refused():
    transformer = tiny_transformer()
    adapt(transformer)
    transformer.fuse_lora()
    with pytest.raises(ra.UserError, match="acts on references alone and cannot be fused"):
        run(transformer)
    transformer.unfuse_lora()
    torch.testing.assert_close(run(transformer), run(tiny_transformer()), atol=1e-5, rtol=0)


def test_the_adapters_strength_scales_the_references_alone():
    transformer = tiny_transformer()
    branch, references = adapt(transformer), draw(1, 16, 1, 8, 8, seed=3)
    plain = run(transformer)
    outputs = []
    for strength in (0.0, 0.5, 1.0):
        for layer in lora_layers(transformer):
            layer.set_scale("refalign", strength)
        assert torch.equal(run(transformer), plain)
        with branch.references(references):
            outputs.append(run(transformer))
    base = tiny_transformer()
    untrained = ra.attach(base, branch.config, seed=0)  # its update is zero
    with untrained.references(references):
        torch.testing.assert_close(run(base), outputs[0], atol=1e-6, rtol=0)
    assert not torch.equal(outputs[1], outputs[2])


def test_diffusers_own_saving_refuses_it_and_writes_the_others(styled, tmp_path):
    saving = styled.save_lora_adapter
    branch = adapt(styled)
    with pytest.raises(ra.UserError, match="save_lora_adapter: this adapter acts on reference tokens alone"):
        styled.save_lora_adapter(tmp_path, adapter_name="refalign")
    styled.save_lora_adapter(tmp_path, adapter_name="style")
    assert [path.name for path in tmp_path.iterdir()] == ["pytorch_lora_weights.safetensors"]
    branch.detach()
    assert styled.save_lora_adapter == saving


def test_references_without_the_lora_that_was_taken_off_are_refused(styled):
    branch = adapt(styled)
    styled.delete_adapters("refalign")
    with pytest.raises(ra.UserError, match="was taken off its transformer"):
        branch.references(draw(1, 16, 1, 8, 8))
    styled.unload_lora()
    with pytest.raises(ra.UserError, match="was taken off its transformer"):
        branch.encode_references(draw(1, 16, 1, 8, 8), frames=2)
