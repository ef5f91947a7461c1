"""Cached references: what they refuse, where they lie, what a file keeps."""

import json

import pytest
import torch
from tiny_models import tiny_transformer

import refalign_adapter as ra
from refalign_adapter.branch.lora_scope import lora_layers
from refalign_adapter.branch.reference_cache import ReferenceCache

MASK = torch.tensor([[True, True], [True, False]])


def draw(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def adapt(seed=0, dtype=torch.float32, **fields):
    transformer = tiny_transformer().to(dtype)
    config = ra.RefAlignConfig(attention="isolated", lora_scope="reference", r=4, **{"align_layers": 1} | fields)
    return transformer, ra.attach(transformer, config, seed=seed)


@torch.no_grad()
def run(transformer, batch=2):
    return transformer(
        draw(batch, 16, 2, 8, 8, seed=1), torch.full((batch,), 500.0), draw(batch, 5, 32, seed=2)
    ).sample


@pytest.fixture
def made():
    transformer, branch = adapt()
    return transformer, branch, branch.encode_references(draw(2, 16, 2, 8, 8), MASK, frames=2)


FACTS = {"frames": 2, "adapter": "a", "adapter_name": "b"}


@pytest.mark.parametrize(
    "facts",
    [
        [],
        {},
        *({**FACTS, "frames": value} for value in (0, -1, True, 1.5, "2", [], 10**9)),
        *({**FACTS, "grid": value} for value in (None, 4, [], [4], [4, 6, 8], [4, 0], [4, True], [4, "6"], [[], []])),
        {**FACTS, "adapter": []},
        {name: FACTS[name] for name in ("frames", "adapter")},
    ],
    ids=str,
)
def test_facts_of_a_strangers_file_are_checked_by_type_and_range(tmp_path, facts):
    from safetensors.torch import save_file

    tensors = {f"{part}.0": torch.zeros(1, 2, 2, 24) for part in ("keys", "values")}
    save_file(tensors, tmp_path / "a.safetensors", {"refalign_reference_cache": json.dumps(facts)})
    with pytest.raises(ra.UserError, match="holds no cached references") as caught:
        ReferenceCache.load(tmp_path / "a.safetensors")
    assert "\n" not in str(caught.value)


def test_a_strangers_file_whose_parts_do_not_match_is_refused(tmp_path):
    from safetensors.torch import save_file

    whole = {f"{part}.0": torch.zeros(1, 2, 2, 24) for part in ("keys", "values", "null_keys", "null_values")}
    cases = [{"null_keys.0": torch.zeros(1, 3, 2, 24)}, {"null_values.0": None}, {"values.0": None}]
    for number, changes in enumerate([{}, *cases]):
        tensors = {name: tensor for name, tensor in (whole | changes).items() if tensor is not None}
        path = tmp_path / f"{number}.safetensors"
        save_file(tensors, path, {"refalign_reference_cache": json.dumps(FACTS)})
        if not changes:
            assert ReferenceCache.load(path).null.tokens == 2
            continue
        with pytest.raises(ra.UserError, match="holds no cached references"):
            ReferenceCache.load(path)


def test_a_saved_cache_gives_the_same_output(made, tmp_path):
    transformer, branch, cache = made
    path = cache.save(tmp_path / "woman.safetensors")
    read = ReferenceCache.load(path)
    assert (read.frames, read.adapter, read.adapter_name) == (2, cache.adapter, "refalign")
    assert torch.equal(read.mask, cache.mask)
    assert path.stat().st_size > read.nbytes == cache.nbytes
    with branch.references(cache):
        expected = run(transformer)
    with branch.references(read):
        assert torch.equal(run(transformer), expected)


def test_files_that_hold_none_are_told_in_one_line(made, tmp_path):
    with pytest.raises(ra.UserError, match="must end in .safetensors"):
        made[2].save(tmp_path / "woman.pt")
    with pytest.raises(ra.UserError, match="does not exist"):
        ReferenceCache.load(tmp_path / "none.safetensors")
    (tmp_path / "torn.safetensors").write_bytes(made[2].save(tmp_path / "a.safetensors").read_bytes()[:-9])
    (tmp_path / "text.safetensors").write_text("no tensors")
    for name in ("torn", "text"):
        with pytest.raises(ra.UserError, match="holds no cached references"):
            ReferenceCache.load(tmp_path / f"{name}.safetensors")


@pytest.mark.parametrize("how", ["weights", "strength", "frame"])
def test_a_cache_of_another_adapter_is_refused(made, how):
    transformer, branch, cache = made
    if how == "weights":
        with torch.no_grad():
            next(iter(branch.named_parameters()))[1].add_(1.0)
    elif how == "strength":
        for layer in lora_layers(transformer):
            layer.set_scale("refalign", 0.5)
    else:
        branch = adapt(reference_frame=7)[1]
    with pytest.raises(ra.UserError, match="of other weights or another strength"):
        branch.references(cache)


def test_the_same_adapter_in_another_type_takes_it(made):
    transformer, branch = adapt(dtype=torch.bfloat16)
    for (_, theirs), (_, ours) in zip(made[1].named_parameters(), branch.named_parameters(), strict=True):
        ours.data = theirs.data.to(torch.bfloat16)
    with branch.references(made[2]):
        out = transformer(
            draw(2, 16, 2, 8, 8, seed=1).bfloat16(), torch.full((2,), 500.0), draw(2, 5, 32, seed=2).bfloat16()
        ).sample
    assert out.isfinite().all()


def test_a_cache_of_another_base_is_refused(made):
    transformer = tiny_transformer(num_layers=2)
    branch = ra.attach(
        transformer, ra.RefAlignConfig(attention="isolated", lora_scope="reference", r=4, align_layers=1), seed=0
    )
    with pytest.raises(ra.UserError, match="cached with another base"):
        branch.references(made[2])


def test_repeating_is_what_repeating_the_references_is(made):
    transformer, branch, cache = made
    twice = branch.encode_references(draw(2, 16, 2, 8, 8).repeat(2, 1, 1, 1, 1), MASK.repeat(2, 1), frames=2)
    beside = branch.encode_references(
        draw(2, 16, 2, 8, 8).repeat_interleave(2, 0), MASK.repeat_interleave(2, 0), frames=2
    )
    for wanted, got in ((twice, cache.repeat(2)), (beside, cache.repeat_interleave(2))):
        assert torch.equal(got.mask, wanted.mask)
        for one, other in zip(got.keys + got.values, wanted.keys + wanted.values, strict=True):
            torch.testing.assert_close(one, other, atol=3e-6, rtol=0)  # another batch, other sums
    single = branch.encode_references(draw(1, 16, 1, 8, 8), frames=2)
    assert len(single.repeat(3)) == 3
    assert single.repeat(3).keys[0].data_ptr() == single.keys[0].data_ptr()


def test_moving_and_casting(made):
    cache = made[2]
    assert cache.to("cpu") is not None
    assert cache.to(dtype=torch.bfloat16).nbytes * 2 == cache.nbytes
    assert cache.to("meta").device.type == "meta"
    for half in (cache.to(torch.float16), cache.to("cpu", torch.float16)):
        assert {tensor.dtype for tensor in (*half.keys, *half.values)} == {torch.float16}
        assert torch.equal(half.mask, cache.mask)
    with pytest.raises(
        ra.UserError, match=r"^dtype: given twice, torch\.float16 and torch\.float32; give a device and"
    ):
        cache.to(torch.float16, torch.float32)


def test_nothing_real_gives_none(made):
    assert made[1].encode_references(draw(1, 16, 2, 8, 8), torch.zeros(1, 2, dtype=torch.bool), frames=2) is None
