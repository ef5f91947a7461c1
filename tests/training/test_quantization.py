"""A base in 4 or 8 bits: PEFT's own layers for it, the gradients of its weights taken apart, nothing else trained."""

import bitsandbytes
import pytest
import torch
from accelerate import Accelerator
from peft.tuners.lora import bnb as peft_bnb
from quantised import QUANTISABLE, quantise_on_the_cpu
from tiny_models import save_tiny_pipeline
from torch import nn

from refalign_adapter.alignment.projector import Projectors
from refalign_adapter.alignment.reference.objective import ReferenceAlignment
from refalign_adapter.batch import EMBEDDING, Batch
from refalign_adapter.branch.attach import attach
from refalign_adapter.errors import ConfigError, UserError
from refalign_adapter.families.lookup import load_family
from refalign_adapter.recipes.schema import Recipe
from refalign_adapter.training.base_model import load_transformer
from refalign_adapter.training.step import StepOptions, TrainingStep

KINDS = {"nf4": (peft_bnb.Linear4bit, torch.uint8), "int8": (peft_bnb.Linear8bitLt, torch.int8)}
BLOCKS = (0, 1)


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    return save_tiny_pipeline(tmp_path_factory.mktemp("base"), **QUANTISABLE)


def recipe_for(base, quantization):
    lora = {"r": 4, "lora_alpha": 4}
    adapter = {"attention": "joint", **lora, "align_layers": len(BLOCKS), "teachers": ["teacher"]}
    places = {"pretrained_model_name_or_path": str(base), "output_dir": "out", "data": {"cache_dir": "cache"}}
    return Recipe.model_validate({**places, "adapter": adapter, "quantization": quantization})


def make_step(base, quantization, dtype=torch.float32):
    """The training step on a quantised base."""
    recipe = recipe_for(base, quantization)
    transformer = load_transformer(recipe, load_family("WanTransformer3DModel"), dtype)
    transformer.enable_gradient_checkpointing()
    branch = attach(transformer, recipe.adapter_config(), seed=0)
    generator = torch.Generator().manual_seed(0)
    for name, parameter in branch.named_parameters():
        if "lora_B" in name:
            parameter.data = 0.1 * torch.randn(parameter.shape, generator=generator)
    projectors = Projectors(BLOCKS, 128, {"teacher": 8}, generator)
    module = TrainingStep(branch, [ReferenceAlignment(projectors)], StepOptions())
    return module.train()


def make_batch():
    draw = lambda *shape: torch.randn(shape, generator=torch.Generator().manual_seed(sum(shape)))  # noqa: E731
    return Batch(
        keys=["a", "b"],
        latents=draw(2, 16, 2, 4, 6),
        text={EMBEDDING: draw(2, 5, 64)},
        references=draw(2, 16, 2, 4, 6),
        mask=torch.tensor([[True, True], [True, False]]),
        subjects=torch.tensor([[0, 1], [0, -1]]),
        targets={"reference": {"teacher": draw(2, 2, 2, 3, 8)}},
    )


def loss_of(module):
    generator = torch.Generator().manual_seed(1)
    return module(make_batch(), {EMBEDDING: torch.zeros(5, 64)}, generator=generator, weights={"reference": 1.0}).loss


def take_apart(transformer):
    """Every quantised layer replaced by a plain one with the weights that it stands for."""
    for parent in list(transformer.modules()):
        for name, layer in list(parent.named_children()):
            if isinstance(layer, bitsandbytes.nn.Linear4bit):
                weight = bitsandbytes.functional.dequantize_4bit(layer.weight.data, layer.weight.quant_state)
                plain = nn.Linear(layer.in_features, layer.out_features, layer.bias is not None)
                plain.weight.data, plain.bias = weight.float(), layer.bias
                setattr(parent, name, plain.requires_grad_(False))


@pytest.mark.parametrize("kind", KINDS)
def test_the_lora_is_what_peft_picks_and_nothing_else_trains(base, monkeypatch, kind):
    quantise_on_the_cpu(monkeypatch)
    module = make_step(base, kind)
    layer_class, dtype = KINDS[kind]
    layers = [layer for layer in module.modules() if hasattr(layer, "lora_A") and hasattr(layer, "base_layer")]
    assert len(layers) == 3 * 10
    assert {type(layer) for layer in layers} == {layer_class}
    assert {layer.base_layer.weight.dtype for layer in layers} == {dtype}
    optimizer = torch.optim.AdamW([item for item in module.parameters() if item.requires_grad], lr=1e-3)
    accelerator = Accelerator(cpu=True)
    model, optimizer = accelerator.prepare(module, optimizer)
    trained = {name for name, item in module.named_parameters() if item.requires_grad}
    before = {name: item.detach().clone() for name, item in module.named_parameters()}
    accelerator.backward(loss_of(model))
    optimizer.step()
    changed = {name for name, item in module.named_parameters() if not torch.equal(before[name], item)}
    assert changed == trained
    assert {".".join(name.split(".")[:1]) for name in trained} == {"transformer", "objectives"}
    assert all("lora_" in name for name in trained if name.startswith("transformer"))


def test_gradients_are_those_of_the_weights_it_stands_for(base, monkeypatch):
    quantise_on_the_cpu(monkeypatch)
    module, plain = make_step(base, "nf4"), make_step(base, "nf4")
    take_apart(plain)
    losses = [loss_of(item) for item in (module, plain)]
    assert losses[0].item() == pytest.approx(losses[1].item(), rel=1e-5)
    for loss in losses:
        loss.backward()
    gradients = [{name: p.grad for name, p in item.named_parameters() if p.requires_grad} for item in (module, plain)]
    assert gradients[0].keys() == gradients[1].keys()
    for name, gradient in gradients[0].items():
        scale = float(gradients[1][name].abs().max())
        assert torch.allclose(gradient, gradients[1][name], atol=1e-4 * scale + 1e-9), name
        assert scale > 0, name


def test_bf16_computes_in_bf16_and_trains_in_float32(base, monkeypatch):
    quantise_on_the_cpu(monkeypatch)
    module = make_step(base, "nf4", torch.bfloat16)
    assert module.transformer.dtype == torch.bfloat16
    assert {item.dtype for item in module.parameters() if item.requires_grad} == {torch.float32}
    with torch.autocast("cpu", torch.bfloat16):
        loss = loss_of(module)
    loss.backward()
    assert loss.isfinite()
    assert all(item.grad.isfinite().all() for item in module.parameters() if item.requires_grad)


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_without_a_gpu_it_is_refused_in_one_line(base):
    with pytest.raises(UserError, match=r"^quantization: 'nf4' needs a GPU and there is none here; set"):
        load_transformer(recipe_for(base, "nf4"), load_family("WanTransformer3DModel"), torch.float32)


def test_without_bitsandbytes_it_is_told_what_to_install(base, monkeypatch):
    monkeypatch.setattr("refalign_adapter.training.quantization.find_spec", lambda name: None)
    with pytest.raises(UserError, match=r"needs bitsandbytes; pip install 'refalign-adapter\[train\]'"):
        load_transformer(recipe_for(base, "int8"), load_family("WanTransformer3DModel"), torch.float32)


def test_a_recipe_takes_the_known_kinds_only(tmp_path):
    from refalign_adapter.recipes.file import load_recipe

    path = tmp_path / "recipe.yaml"
    path.write_text("pretrained_model_name_or_path: base\noutput_dir: out\nquantization: nf5\ndata: {cache_dir: c}\n")
    with pytest.raises(ConfigError, match="quantization"):
        load_recipe(path)
    assert load_recipe(path, ["quantization=nf4"]).quantization == "nf4"
    assert load_recipe(path, ["quantization=null"]).quantization is None
