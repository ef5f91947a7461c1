"""Keys and values of references: what of them, and of their gradients, is kept until the references' own backward."""

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from diffusers.models.attention_dispatch import dispatch_attention_fn
from tiny_models import tiny_transformer

import refalign_adapter as ra
from refalign_adapter.branch import processors
from refalign_adapter.branch.processors import KeyValueProcessor, _append
from refalign_adapter.branch.rewired import Rewired
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


class Plain:
    """A processor as diffusers writes them, whose keys come in float32, as under autocast on a GPU."""

    _attention_backend = None

    def __call__(self, attention: Any, hidden_states: Any) -> Any:
        value = hidden_states.bfloat16()
        return dispatch_attention_fn(hidden_states, hidden_states, value, backend=self._attention_backend)


def test_keys_are_kept_in_the_type_that_attention_takes():
    processor = KeyValueProcessor(Plain(), WanFamily(), True, Rewired(Plain))
    processor.set(processors.WRITE)
    states = torch.randn(1, 3, 2, 4, generator=torch.Generator().manual_seed(0))
    processor(None, states)
    assert processor.keys is not None
    assert processor.values is not None
    assert torch.equal(processor.keys, states.bfloat16())
    assert processor.keys.dtype == processor.values.dtype


class Functional:
    """One that calls torch's own function, heads first, with text before the video in the same sequence."""

    _attention_backend = None

    def __call__(self, attention: Any, hidden_states: Any, text: Any, mask: Any = None) -> Any:
        states = torch.cat([text, hidden_states], 1).transpose(1, 2)
        out = F.scaled_dot_product_attention(states, states, states, attn_mask=mask).transpose(1, 2)
        assert F.silu is torch.nn.functional.silu
        return out[:, text.shape[1] :], out[:, : text.shape[1]]


class TextFirst(WanFamily):
    text_first = True


def attend(query, key):
    """(B, tokens, heads, head_dim), written out."""
    parts = (part.transpose(1, 2) for part in (query, key, key))
    return torch.nn.functional.scaled_dot_product_attention(*parts).transpose(1, 2)


def test_text_that_shares_an_attention_sees_references_and_is_never_kept_of_them():
    draw = lambda seed, tokens: torch.randn(2, tokens, 2, 4, generator=torch.Generator().manual_seed(seed))  # noqa: E731
    video, text, reference = draw(0, 5), draw(1, 3), draw(2, 4)
    processor = KeyValueProcessor(Functional(), TextFirst(), False, Rewired(Functional))
    processor.set(processors.WRITE)
    own, of_text = processor(None, reference, text)
    torch.testing.assert_close(own, attend(reference, reference))
    assert not of_text.any()
    assert torch.equal(processor.keys, reference)

    processor.set(processors.READ, reference, reference)
    got, _ = processor(None, video, text)
    torch.testing.assert_close(got, attend(video, torch.cat([text, video, reference], 1)))
    mask = torch.tensor([[True, True, False, False], [True] * 4])
    for of_the_model in (torch.ones(2, 1, 1, 8, dtype=torch.bool), torch.zeros(2, 1, 1, 8), None):
        processor.set(processors.READ, reference, reference, mask[:, None, None])
        got, _ = processor(None, video, text, of_the_model)
        for sample, count in enumerate((2, 4)):
            one = slice(sample, sample + 1)
            seen = torch.cat([text[one], video[one], reference[one, :count]], 1)
            torch.testing.assert_close(got[one], attend(video[one], seen))
    processor.set(processors.MASK, mask=torch.tensor([[True] * 4 + [False]] * 2)[:, None, None])
    got, _ = processor(None, video, text)
    torch.testing.assert_close(got, attend(video, torch.cat([text, video[:, :4]], 1)))


def test_a_processor_that_attends_in_a_way_of_its_own_is_refused():
    class Own:
        def __call__(self, attention: Any, hidden_states: Any) -> Any:
            return hidden_states.softmax(-1)

    with pytest.raises(ra.UserError, match="Own calls no attention function that is known; set the stock one"):
        Rewired(Own)
