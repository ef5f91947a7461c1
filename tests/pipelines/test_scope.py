"""Adapters for references alone, and several by name on one transformer: each is among others what it is alone."""

import logging
from itertools import permutations

import numpy as np
import pytest
import torch
from diffusers import WanPipeline
from peft import LoraConfig, get_peft_model_state_dict
from tiny_adapter import SIZE, anatomy, picture, save_tiny_adapter, velocity, weights_of
from tiny_models import tiny_pipeline, tiny_transformer

import refalign_adapter as ra
from refalign_adapter.branch.attach import branch_of, branches_of

KINDS = {
    "joint": {"align_layers": 2},
    "isolated": {"attention": "isolated", "lora_scope": "all", "align_layers": 1, "r": 2, "lora_alpha": 6},
    "scoped": {"attention": "isolated", "lora_scope": "reference", "align_layers": 1},
    "scoped2": {"attention": "isolated", "lora_scope": "reference", "align_layers": 2, "r": 3, "reference_frame": 7},
}


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """An adapter of every kind, by the kind's name, and a style LoRA; not to be changed."""
    root = tmp_path_factory.mktemp("adapters")
    made = {}
    for seed, (kind, changes) in enumerate(KINDS.items()):
        made[kind] = save_tiny_adapter(root / kind, tiny_transformer(), **changes)
        assert len({path.read_bytes() for path in map(weights_of, made.values())}) == seed + 1
    transformer = tiny_transformer()
    with torch.random.fork_rng([]):
        torch.manual_seed(5)
        config = LoraConfig(r=2, target_modules=["to_q", "to_k", "ffn.net.2"], init_lora_weights=False)
        transformer.add_adapter(config, adapter_name="style")
    WanPipeline.save_lora_weights(root / "style", get_peft_model_state_dict(transformer, adapter_name="style"))
    return {**made, "style": root / "style"}


@pytest.fixture(scope="module")
def shared_base():
    """A pipeline whose transformer every test leaves as it was."""
    return tiny_pipeline()


@pytest.fixture
def base(shared_base):
    before, output = anatomy(shared_base.transformer), velocity(shared_base.transformer)
    yield shared_base
    for branch in list(branches_of(shared_base.transformer).values()):
        branch.detach()
    shared_base.transformer.unload_lora()
    assert anatomy(shared_base.transformer) == before
    assert torch.equal(velocity(shared_base.transformer), output)


def seen(pipe, count=2):
    """The transformer's output when references ride along, by the adapter that is switched on."""
    references = torch.randn(1, 16, count, 4, 6, generator=torch.Generator().manual_seed(9))
    with pipe.branch.references(references.to(pipe.transformer.dtype)):
        return velocity(pipe.transformer)


def alone(folders, kind, dtype=torch.float32):
    """(with references, without) of one adapter on a transformer of its own."""
    base = tiny_pipeline()
    base.transformer.to(dtype)
    pipe = ra.load_adapter(base, folders[kind])
    return seen(pipe), velocity(pipe.transformer)


def styled(folders, dtype=torch.float32):
    """A stock pipeline with the style LoRA."""
    pipe = tiny_pipeline()
    pipe.transformer.to(dtype)
    pipe.load_lora_weights(str(folders["style"]), adapter_name="style")
    return pipe


def frames(pipe, references=True):
    images = [picture(0), picture(1)] if references else None
    generator = torch.Generator().manual_seed(0)
    return pipe("a cat", images, num_inference_steps=1, generator=generator, **SIZE).frames


# An adapter for references alone


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_without_references_the_base_is_itself_bit_by_bit(folders, dtype):
    base = tiny_pipeline()
    base.transformer.to(dtype)
    output = velocity(base.transformer)
    pipe = ra.load_adapter(base, folders["scoped"])
    assert torch.equal(velocity(base.transformer), output)
    assert not torch.equal(seen(pipe), output)
    assert torch.equal(velocity(base.transformer), output)


def test_loading_tells_that_it_acts_on_references_alone_and_freezes(base, folders, caplog):
    before, output = anatomy(base.transformer), velocity(base.transformer)
    with caplog.at_level(logging.INFO, "refalign_adapter"):
        pipe = ra.load_adapter(base, folders["scoped"])
    assert "LoRA named 'refalign' on 14 layers" in pipe.changes[0]
    assert "acts on references alone: without references, videos are what they are without it" in pipe.changes[0]
    assert [record.getMessage() for record in caplog.records] == list(pipe.changes)
    assert not any(parameter.requires_grad for parameter in base.transformer.parameters())
    seen(pipe)
    for _ in range(2):
        pipe.unload()
        assert anatomy(base.transformer) == before
        assert torch.equal(velocity(base.transformer), output)
        assert pipe.changes == ()
        assert pipe.branch is None


def test_its_weight_scales_what_it_does_to_references(folders, tmp_path):
    halved = save_tiny_adapter(tmp_path / "halved", **KINDS["scoped"] | {"lora_alpha": 4})  # 8 in the other
    pipe, half = (ra.load_adapter(tiny_pipeline(), folder) for folder in (folders["scoped"], halved))
    full = seen(pipe)
    pipe.set_adapters("refalign", 0.5)
    assert torch.equal(seen(pipe), seen(half))
    assert not torch.equal(seen(pipe), full)
    assert torch.equal(velocity(pipe.transformer), velocity(tiny_transformer()))
    pipe.set_adapters(["refalign"])
    assert torch.equal(seen(pipe), full)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("first", ["style", "adapter"])
def test_a_style_lora_keeps_its_effect_exactly(folders, dtype, first):
    stock, pipe = styled(folders, dtype), tiny_pipeline()
    pipe.transformer.to(dtype)
    if first == "style":
        pipe.load_lora_weights(str(folders["style"]), adapter_name="style")
        pipe = ra.load_adapter(pipe, folders["scoped"])
    else:
        pipe = ra.load_adapter(pipe, folders["scoped"])
        pipe.load_lora_weights(str(folders["style"]), adapter_name="style")
        assert pipe.get_active_adapters() == ["style"]  # as in diffusers, the latest alone
        assert torch.equal(velocity(pipe.transformer), velocity(stock.transformer))
        with pytest.raises(ra.UserError, match=r"call set_adapters\(\['style', 'refalign'\]\)"):
            frames(pipe)
        pipe.set_adapters(["style", "refalign"])
    assert set(pipe.get_active_adapters()) == {"style", "refalign"}
    for style, reference in ((1.0, 1.0), (0.3, 2.0)):
        stock.set_adapters("style", style)
        pipe.set_adapters(["style", "refalign"], [style, reference])
        assert torch.equal(velocity(pipe.transformer), velocity(stock.transformer))
        assert not torch.equal(seen(pipe), velocity(pipe.transformer))
    # What references leave behind is of their adapter alone: video tokens with the style read the same.
    alone = tiny_pipeline()
    alone.transformer.to(dtype)
    alone = ra.load_adapter(alone, folders["scoped"])
    references = torch.randn(1, 16, 2, 4, 6, generator=torch.Generator().manual_seed(9)).to(dtype)
    pipe.set_adapters(["style", "refalign"])
    one, two = (item.branch.encode_references(references, frames=2) for item in (pipe, alone))
    assert all(map(torch.equal, (*one.keys, *one.values), (*two.keys, *two.values)))
    pipe.unload()
    stock.set_adapters("style")
    assert pipe.get_active_adapters() == ["style"]
    assert torch.equal(velocity(pipe.transformer), velocity(stock.transformer))
    names = [[name for name, _ in item.transformer.named_modules()] for item in (pipe, stock)]
    assert names[0] == names[1]


# Several by name


@pytest.mark.parametrize(("one", "two"), [*permutations(["joint", "isolated", "scoped"], 2), ("scoped", "scoped2")])
def test_each_is_alone_what_it_is_among_others(base, folders, one, two):
    first = ra.load_adapter(base, folders[one])
    expected = {one: seen(first), two: alone(folders, two)[0]}
    plain = {one: velocity(base.transformer), two: alone(folders, two)[1]}
    second = ra.load_adapter(first, folders[two], adapter_name="b")
    assert second is not first
    assert second.get_active_adapters() == ["b"]
    assert "['refalign'] are switched off" in second.changes[1]
    assert list(branches_of(base.transformer)) == ["refalign", "b"]
    for names, kind in (("b", two), ("refalign", one), (["b"], two)):
        second.set_adapters(names)
        assert second.get_active_adapters() == ([names] if isinstance(names, str) else names)
        assert second.branch is first.branch
        assert second.branch.config.lora_scope == KINDS[kind].get("lora_scope", "all")
        assert torch.equal(seen(second), expected[kind])
        assert torch.equal(velocity(base.transformer), plain[kind])
        assert not any(parameter.requires_grad for parameter in base.transformer.parameters())


@pytest.mark.parametrize("styled_first", [False, True])
@pytest.mark.parametrize("order", list(permutations(range(3))), ids=str)
def test_taken_off_in_any_order_nothing_is_left(folders, order, styled_first):
    base = tiny_pipeline()
    base.transformer.proj_out.requires_grad_(False)
    base.transformer.blocks[0].train()
    if styled_first:
        base.load_lora_weights(str(folders["style"]), adapter_name="style")
    before, output = anatomy(base.transformer), velocity(base.transformer)
    pipes = [base]
    for kind in ("joint", "scoped", "isolated"):
        pipes.append(ra.load_adapter(pipes[-1], folders[kind], adapter_name=kind))
        assert ("style" in pipes[-1].get_active_adapters()) == styled_first
    for index in order:
        assert anatomy(base.transformer) != before
        assert not any(parameter.requires_grad for parameter in base.transformer.parameters())
        pipes[1 + index].unload()
    assert anatomy(base.transformer) == before
    assert torch.equal(velocity(base.transformer), output)
    assert branches_of(base.transformer) == {}


@pytest.mark.parametrize("order", [(0, 1), (1, 0)], ids=str)
def test_a_style_that_came_in_between_stays(folders, order):
    stock = styled(folders)
    base = tiny_pipeline()
    first = ra.load_adapter(base, folders["scoped"], adapter_name="a")
    base.load_lora_weights(str(folders["style"]), adapter_name="style")
    second = ra.load_adapter(base, folders["joint"], adapter_name="b")
    assert second.get_active_adapters() == ["style", "b"]
    for index in order:
        (first, second)[index].unload()
    assert base.get_active_adapters() == ["style"]
    assert torch.equal(velocity(base.transformer), velocity(stock.transformer))
    assert [name for name, _ in base.transformer.named_modules()] == [
        name for name, _ in stock.transformer.named_modules()
    ]
    assert sum(anatomy(base.transformer)["hooks"]) == 0
    # They trained before the first came, by names that the style's layers have changed since.
    assert all(p.requires_grad for name, p in base.transformer.named_parameters() if "lora_" not in name)


def test_unloading_switches_back(base, folders):
    first = ra.load_adapter(base, folders["scoped"], adapter_name="a")
    expected = seen(first)
    second = ra.load_adapter(first, folders["scoped2"], adapter_name="b")
    second.unload()
    assert first.get_active_adapters() == ["a"]
    assert torch.equal(seen(first), expected)
    assert torch.equal(seen(second), expected)  # the pipelines share the transformer
    # What was chosen since is not overruled.
    second = ra.load_adapter(first, folders["scoped2"], adapter_name="b")
    second.set_adapters("a", 0.5)
    halved = seen(second)
    second.unload()
    assert torch.equal(seen(first), halved)
    third = ra.load_adapter(first, folders["joint"], adapter_name="c")
    first.unload()
    assert third.branch.adapter_name == "c"
    third.unload()
    assert third.branch is None


def test_deleting_by_name_takes_hooks_along_and_switches_nothing_on(base, folders):
    first = ra.load_adapter(base, folders["scoped"], adapter_name="a")
    before = anatomy(base.transformer)
    second = ra.load_adapter(first, folders["joint"], adapter_name="b")
    second.delete_adapters("b")
    assert anatomy(base.transformer) == before
    assert second.get_active_adapters() == []
    assert second.branch is None
    assert second.get_list_adapters() == {"transformer": ["a"]}
    with pytest.raises(ra.UserError, match=r"\['a'\] none is switched on; call set_adapters\(\['a'\]\)"):
        frames(second)
    assert np.isfinite(frames(second, references=False)).all()
    second.unload()  # nothing of its own is left
    second.set_adapters("a")
    assert second.branch is first.branch
    second.delete_adapters(["a", "not there"])
    assert second.get_list_adapters() == {}
    with pytest.raises(ra.UserError, match="no reference adapter is loaded"):
        frames(second)


def test_deleting_another_lora_leaves_reference_adapters_on(folders):
    base = tiny_pipeline()
    base.load_lora_weights(str(folders["style"]), adapter_name="style")
    pipe = ra.load_adapter(base, folders["scoped"])
    expected = alone(folders, "scoped")[0]
    assert not torch.equal(seen(pipe), expected)
    pipe.delete_adapters("style")
    assert pipe.get_active_adapters() == ["refalign"]
    assert torch.equal(seen(pipe), expected)
    assert not any(parameter.requires_grad for parameter in base.transformer.parameters())


def test_deleting_what_is_on_switches_on_nothing_that_was_off(folders):
    base = tiny_pipeline()
    base.load_lora_weights(str(folders["style"]), adapter_name="style")
    pipe = ra.load_adapter(base, folders["scoped"])
    pipe.set_adapters("refalign")
    pipe.delete_adapters("refalign")
    assert pipe.get_active_adapters() == []
    assert torch.equal(velocity(pipe.transformer), velocity(tiny_transformer()))


def test_unloading_all_loras_takes_hooks_along(folders):
    base = tiny_pipeline()
    base.transformer.requires_grad_(False)
    before, output = anatomy(base.transformer), velocity(base.transformer)
    base.load_lora_weights(str(folders["style"]), adapter_name="style")
    pipe = ra.load_adapter(ra.load_adapter(base, folders["joint"], "a"), folders["scoped"], "b")
    pipe.unload_lora_weights()
    assert (pipe.branch, pipe.changes) == (None, ())
    assert anatomy(base.transformer) == before
    assert torch.equal(velocity(base.transformer), output)
    with pytest.raises(ra.UserError, match="no reference adapter is loaded"):
        frames(pipe)


def test_references_need_exactly_one_switched_on(base, folders):
    pipe = ra.load_adapter(ra.load_adapter(base, folders["scoped"], "a"), folders["scoped2"], "b")
    pipe.set_adapters(["a", "b"])
    for act in (frames, lambda pipe: pipe.encode_references([picture()], **SIZE)):
        with pytest.raises(ra.UserError, match=r"\['a', 'b'\] are all switched on; choose one") as caught:
            act(pipe)
        assert "\n" not in str(caught.value)
    with pytest.raises(ra.UserError, match="are all switched on"):
        _ = pipe.branch
    plain = frames(pipe, references=False)
    pipe.set_adapters("b")
    assert np.array_equal(frames(pipe, references=False), plain)
    assert not np.array_equal(frames(pipe), plain)
    pipe.disable_lora()
    with pytest.raises(ra.UserError, match=r"'b' is switched off; call enable_lora\(\)"):
        frames(pipe)
    pipe.enable_lora()
    pipe.delete_adapters(["a", "b"])


def test_videos_are_those_of_each_alone(folders):
    expected = {}
    for kind in ("joint", "scoped"):
        expected[kind] = frames(ra.load_adapter(tiny_pipeline(), folders[kind]))
    pipe = tiny_pipeline()
    for kind in expected:
        pipe = ra.load_adapter(pipe, folders[kind], adapter_name=kind)
    for kind in ("joint", "scoped", "joint"):
        pipe.set_adapters(kind)
        assert np.array_equal(frames(pipe), expected[kind])


def test_a_cache_is_of_the_adapter_that_was_switched_on(base, folders):
    pipe = ra.load_adapter(ra.load_adapter(base, folders["scoped"], "a"), folders["isolated"], "b")
    cache = pipe.encode_references([picture()], **SIZE)
    assert cache.adapter_name == "b"
    pipe.set_adapters("a")
    with pytest.raises(ra.UserError, match="cached with adapter 'b'"):
        pipe("a cat", reference_cache=cache, num_inference_steps=1, **SIZE)


def test_a_second_one_that_fails_leaves_the_first_as_it_was(folders, tmp_path):
    broken = save_tiny_adapter(tmp_path / "broken", **KINDS["scoped2"])
    weights_of(broken).write_bytes(b"no weights")
    base = tiny_pipeline()
    base.load_lora_weights(str(folders["style"]), adapter_name="style")
    pipe = ra.load_adapter(base, folders["scoped"])
    before, expected = anatomy(base.transformer), seen(pipe)
    with pytest.raises(ra.UserError, match="cannot be loaded"):
        ra.load_adapter(pipe, broken, adapter_name="b")
    for name in ("refalign", "style"):
        with pytest.raises(ra.UserError, match=f"adapter_name: .*'{name}'"):
            ra.load_adapter(pipe, folders["scoped2"], adapter_name=name)
    assert anatomy(base.transformer) == before
    assert set(pipe.get_active_adapters()) == {"style", "refalign"}
    assert torch.equal(seen(pipe), expected)


@pytest.mark.parametrize("fails", ["load_weights", "switch_on", "ReferenceBranch"])
def test_a_failure_at_any_point_leaves_the_first_as_it_was(base, folders, monkeypatch, fails):
    pipe = ra.load_adapter(base, folders["joint"])
    before, expected = anatomy(base.transformer), seen(pipe)
    monkeypatch.setattr(f"refalign_adapter.pipelines.load.{fails}", lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        ra.load_adapter(pipe, folders["scoped"], adapter_name="b")
    assert anatomy(base.transformer) == before
    assert pipe.get_active_adapters() == ["refalign"]
    assert torch.equal(seen(pipe), expected)


def test_a_base_that_contains_an_adapter_takes_no_other(folders):
    pipe = ra.merge_and_unload(ra.load_adapter(tiny_pipeline(), folders["isolated"]))
    output = velocity(pipe.transformer)
    with pytest.raises(ra.UserError, match="weights contain adapter 'refalign' for good"):
        ra.load_adapter(pipe, folders["scoped"], adapter_name="b")
    assert torch.equal(velocity(pipe.transformer), output)
    assert pipe.branch is branch_of(pipe.transformer)


def test_one_that_is_being_trained_can_be_beside_a_loaded_one(base, folders):
    branch = ra.attach(
        base.transformer, ra.RefAlignConfig(attention="joint", r=2, align_layers=1), adapter_name="trained", seed=0
    )
    trainable = [name for name, parameter in base.transformer.named_parameters() if parameter.requires_grad]
    pipe = ra.load_adapter(base, folders["scoped"])
    assert pipe.get_active_adapters() == ["refalign"]
    assert not any(parameter.requires_grad for parameter in base.transformer.parameters())
    pipe.unload()
    assert pipe.branch is branch
    assert [name for name, parameter in base.transformer.named_parameters() if parameter.requires_grad] == trainable
