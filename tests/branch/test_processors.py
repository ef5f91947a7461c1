"""Keys and values of references: what of them, and of their gradients, is kept until the references' own backward."""

from typing import Any

import pytest
import torch
from tiny_models import tiny_transformer

import refalign_adapter as ra
from refalign_adapter.branch import processors
from refalign_adapter.branch.processors import KeyValueProcessor, _append
from refalign_adapter.families.wan import WanFamily

TOKENS, REFERENCE_TOKENS = 40, 3


def test_the_gradient_of_references_keeps_no_more_than_itself():
    generator = torch.Generator().manual_seed(0)
    draw = lambda tokens: torch.randn(2, tokens, 2, 4, generator=generator, requires_grad=True)  # noqa: E731
    tokens, references = draw(TOKENS), draw(REFERENCE_TOKENS)
    written, found = references * 1, []
    written.register_hook(found.append)
    weights = torch.randn(2, TOKENS + REFERENCE_TOKENS, 2, 4, generator=generator)
    joined = _append(tokens, written)
    assert torch.equal(joined, torch.cat([tokens, references], 1))
    (joined * weights).sum().backward()
    assert torch.equal(found[0], weights[:, TOKENS:])
    assert found[0].untyped_storage().nbytes() == references.nbytes
    assert tokens.grad is not None
    assert torch.equal(tokens.grad, weights[:, :TOKENS])


@pytest.mark.parametrize("checkpointing", [False, True])
def test_gradients_that_wait_are_of_the_references_size(monkeypatch, checkpointing):
    """In the whole model: every key and value that is read gets a gradient of its own."""
    sizes, append = [], processors._append

    def watch(tokens, references):
        if references.requires_grad:
            references.register_hook(lambda gradient: sizes.append(gradient.untyped_storage().nbytes()))
        return append(tokens, references)

    monkeypatch.setattr(processors, "_append", watch)
    transformer = tiny_transformer()
    config = ra.RefAlignConfig(attention="isolated", lora_scope="reference", r=4, align_layers=2)
    branch = ra.attach(transformer, config, seed=0)
    if checkpointing:
        transformer.enable_gradient_checkpointing()
    draw = lambda *shape: torch.randn(shape, generator=torch.Generator().manual_seed(len(shape)))  # noqa: E731
    with branch.references(draw(2, 16, 2, 4, 6)):
        out = transformer(draw(2, 16, 2, 4, 6), torch.tensor([700.0, 300.0]), draw(2, 5, 32)).sample
    out.square().mean().backward()
    one = 2 * (2 * 2 * 3) * 48 * 4  # B samples, M · N tokens, width, float32
    assert sizes
    assert set(sizes) == {one}


def test_keys_are_kept_in_the_type_that_attention_takes():
    class Family(WanFamily):
        def attention_inputs(self, attention: Any, states: Any) -> Any:
            return states, states, states.bfloat16()  # as under autocast on a GPU

        def attention_output(self, attention: Any, attended: Any) -> Any:
            return attended

    processor = KeyValueProcessor(type("Original", (), {"_attention_backend": None})(), Family(), ends=True)
    processor.set(processors.WRITE)
    states = torch.randn(1, 3, 2, 4, generator=torch.Generator().manual_seed(0))
    processor(None, states)
    assert processor.keys is not None
    assert processor.values is not None
    assert torch.equal(processor.keys, states.bfloat16())
    assert processor.keys.dtype == processor.values.dtype
