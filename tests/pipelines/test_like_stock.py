"""What a stock pipeline and its LoRAs do, a reference pipeline does to the bit as long as no references are given.

A course of action takes a pipeline and yields what is to be compared. It is followed on the stock pipeline and on
reference pipelines whose adapter changes no video: isolated, it acts on references alone; joint, its LoRA is still at
zero. The courses check what diffusers' own tests of its Wan pipeline and of LoRAs on it check.

Two differences are meant: lists of adapters name the reference adapter too, and a callback that sets the guidance
scale sets it, where the stock loop only looks whether it is above 1.
"""

import inspect
from functools import cache
from pathlib import Path
from tempfile import TemporaryDirectory
from unittest.mock import patch

import pytest
import torch
from diffusers.utils import logging
from peft import LoraConfig, get_peft_model_state_dict
from tiny_adapter import CONFIG, SIZE
from tiny_generation import generate, noise
from tiny_models import tiny_pipeline, tiny_text, tiny_transformer

import refalign_adapter as ra

GIVEN = {"guidance_scale": 6.0, "max_sequence_length": 16, "num_inference_steps": 1}
"""The first two have other defaults in a reference pipeline."""


@pytest.fixture(scope="session")
def zero_adapter(tmp_path_factory):
    """A joint adapter as training begins with it; its folder."""
    branch = ra.attach(tiny_transformer(), ra.RefAlignConfig(**CONFIG), seed=0)
    return branch.save_pretrained(tmp_path_factory.mktemp("zero") / "folder")


@pytest.fixture(params=["isolated", "joint"])
def ours(request, isolated_adapters, zero_adapter):
    """A reference pipeline of the test's own."""
    folder = zero_adapter if request.param == "joint" else isolated_adapters["reference"]
    return quiet(ra.load_adapter(tiny_pipeline(), folder))


def quiet(pipe):
    pipe.set_progress_bar_config(disable=True)
    return pipe


def video(pipe, prompt="a cat", **changes):
    return generate(pipe, prompt, **GIVEN | changes)


def add_style(pipe, name="style", seed=5):
    """A LoRA that makes a visible difference, as diffusers puts one on: it alone is switched on then."""
    config = LoraConfig(r=2, lora_alpha=4, target_modules=["to_q", "to_v"], init_lora_weights=False)
    with torch.random.fork_rng([]):
        torch.manual_seed(seed)
        pipe.transformer.add_adapter(config, adapter_name=name)


def save_style(pipe, folder, name="style"):
    layers = get_peft_model_state_dict(pipe.transformer, adapter_name=name)
    given = {"transformer_lora_adapter_metadata": pipe.transformer.peft_config[name].to_dict()}
    type(pipe).save_lora_weights(folder, transformer_lora_layers=layers, **given)
    return folder


# Courses of action. Each takes a pipeline and an empty folder, and returns tensors and plain values.


def calls(pipe, folder):
    """Outputs of every kind, several prompts, several videos, generators, and with guidance off."""
    generators = lambda: [torch.Generator().manual_seed(seed) for seed in (3, 4)]  # noqa: E731
    two = {"latents": None, "generator": generators()}
    yield video(pipe, output_type="pt", num_inference_steps=3)
    yield pipe("a cat", **GIVEN | SIZE, latents=noise(), output_type="latent", return_dict=False)
    yield video(pipe, ["a cat", 30 * "very long "], **two)
    yield video(pipe, num_videos_per_prompt=2, **two | {"generator": generators()})
    yield video(pipe, ["a cat", "a dog"], negative_prompt=["ugly", "blurred"], latents=noise(batch=2))
    yield video(pipe, guidance_scale=1.0)
    yield pipe.guidance_scale, pipe.num_timesteps, pipe.current_timestep, pipe.interrupt, pipe.attention_kwargs


def callbacks(pipe, folder):
    """What they are given, and what they change: tensors, whether there is guidance, whether it goes on."""
    names, seen = pipe._callback_tensor_inputs, []

    def change(pipe, step, timestep, tensors):
        seen.append((step, float(timestep), sorted(tensors), pipe.guidance_scale))
        pipe._guidance_scale = [6.0, 6.0, 1.0, 1.0, 1.0][step]
        pipe._interrupt = step == 3
        return tensors | ({"latents": 0.5 * tensors["latents"]} if step == 1 else {})

    given = {"num_inference_steps": 5, "callback_on_step_end": change}
    yield video(pipe, callback_on_step_end_tensor_inputs=names, **given)
    yield video(pipe, callback_on_step_end_tensor_inputs=["latents"], **given)
    yield seen, pipe.guidance_scale


def prompts_apart(pipe, folder):
    """A pipeline of the text's components alone encodes; one without them generates."""
    yield inspect.signature(pipe.encode_prompt), inspect.getsource(pipe.encode_prompt)
    encoder, tokenizer = tiny_text()
    parts = dict.fromkeys(pipe.components)
    texts = type(pipe)(**parts | {"text_encoder": encoder, "tokenizer": tokenizer})
    embeds = texts.encode_prompt("a cat", "ugly", max_sequence_length=16)
    yield embeds
    pipe.text_encoder = pipe.tokenizer = None
    yield video(pipe, None, **dict(zip(("prompt_embeds", "negative_prompt_embeds"), embeds, strict=True)))


def folders(pipe, folder):
    """Saved and loaded by its own class: with a variant's names, as pickles, in another type; without an option."""
    expected = video(pipe)
    pipe.save_pretrained(folder / "variant", variant="fp16")
    again = quiet(type(pipe).from_pretrained(folder / "variant", variant="fp16"))
    yield torch.allclose(video(again), expected, atol=1e-5)
    yield again.transformer_2, sorted(again.components), sorted(again.config)
    pipe.save_pretrained(folder / "plain", safe_serialization=False)
    half = type(pipe).from_pretrained(folder / "plain", torch_dtype={"transformer": torch.bfloat16})
    yield half.transformer.dtype, half.vae.dtype, half.text_encoder.dtype
    with pytest.raises(ValueError, match="You are trying to load the model files of the `variant=fp16`"):
        type(pipe).from_pretrained(folder / "plain", variant="fp16")


def types(pipe, folder):
    """Moved to another type as a whole, and with a transformer that is stored in eight bits."""
    pipe.to(dtype=torch.bfloat16)
    yield {name: part.dtype for name, part in pipe.components.items() if hasattr(part, "dtype")}
    pipe.transformer.enable_layerwise_casting(storage_dtype=torch.float8_e4m3fn, compute_dtype=torch.bfloat16)
    yield video(pipe, latents=noise().bfloat16())


def styles(pipe, folder):
    """One by one, together, weighed, switched off, and deleted."""
    base = video(pipe)
    add_style(pipe, "one")
    yield video(pipe), pipe.get_active_adapters()
    add_style(pipe, "two", seed=6)
    yield video(pipe), pipe.get_active_adapters()
    pipe.set_adapters(["one", "two"], [0.5, 0.6])
    yield video(pipe), pipe.get_active_adapters()
    yield [name for name in pipe.get_list_adapters()["transformer"] if name != "refalign"]
    with pytest.raises(ValueError, match="not in the list of present adapters"):
        pipe.set_adapters("three")
    pipe.disable_lora()
    yield torch.equal(video(pipe), base)
    pipe.enable_lora()
    yield video(pipe)
    pipe.delete_adapters("one")
    yield video(pipe), pipe.get_active_adapters()
    pipe.delete_adapters(["two"])
    yield torch.equal(video(pipe), base)


def strengths(pipe, folder):
    """By the call, by `set_adapters`, by block, and for components that are not there."""
    add_style(pipe)
    halved = video(pipe, attention_kwargs={"scale": 0.5})
    yield halved
    pipe.set_adapters("style", 0.5)
    yield torch.allclose(video(pipe), halved, atol=1e-5)
    pipe.set_adapters("style", {"transformer": 0.25})
    yield video(pipe)
    with patch.object(logging.get_logger("diffusers.loaders.lora_base"), "warning") as warning:
        pipe.set_adapters("style", {"nowhere": 0.0})
    yield warning.call_args.args, video(pipe)


def fused(pipe, folder):
    """Fused alone, at a scale and together, and taken out again."""
    add_style(pipe, "one")
    add_style(pipe, "two", seed=6)
    pipe.set_adapters("one")
    one = video(pipe, attention_kwargs={"scale": 0.8})
    pipe.fuse_lora(components=type(pipe)._lora_loadable_modules, adapter_names=["one"], lora_scale=0.8)
    yield pipe.num_fused_loras, torch.allclose(video(pipe), one, atol=1e-4)
    pipe.unfuse_lora(components=type(pipe)._lora_loadable_modules)
    pipe.set_adapters(["one", "two"])
    both = video(pipe)
    pipe.fuse_lora(adapter_names=["two", "one"])
    yield pipe.num_fused_loras, torch.allclose(video(pipe), both, atol=1e-4)
    pipe.unfuse_lora()
    yield pipe.num_fused_loras, torch.allclose(video(pipe), both, atol=1e-4)


def saved_styles(pipe, folder):
    """A LoRA saved with its metadata, deleted or unloaded, loaded, and put on anew; a file without any of its keys."""
    base = video(pipe)
    add_style(pipe)
    styled = video(pipe)
    save_style(pipe, folder)
    yield styled, pipe.lora_state_dict(folder, return_lora_metadata=True)[-1]["transformer.lora_alpha"]
    pipe.delete_adapters(pipe.get_active_adapters())
    yield torch.equal(video(pipe), base)
    for options in ({}, {"low_cpu_mem_usage": False}):
        pipe.load_lora_weights(folder, **options)
        yield torch.allclose(video(pipe), styled, atol=1e-5)
        pipe.unload_lora_weights()
        yield hasattr(pipe.transformer, "peft_config"), torch.equal(video(pipe), base)
    add_style(pipe)
    yield video(pipe)
    pipe.unload_lora_weights()
    pipe.load_lora_weights({"lora_a": torch.ones(1), "lora_b": torch.ones(1)})
    yield torch.equal(video(pipe), base)


COURSES = [calls, callbacks, prompts_apart, folders, types, styles, strengths, fused, saved_styles]


@cache
def by_stock(course):
    with TemporaryDirectory() as folder:
        return list(course(quiet(tiny_pipeline()), Path(folder)))


@pytest.mark.parametrize("course", COURSES, ids=lambda course: course.__name__)
def test_it_does_what_the_stock_pipeline_does(ours, course, tmp_path):
    for index, (expected, got) in enumerate(zip(by_stock(course), course(ours, tmp_path), strict=True)):
        assert same(got, expected), (index, got, expected)


def same(got, expected):
    """Whether values are equal, tensors inside of tuples, lists and dictionaries to the bit."""
    if isinstance(expected, torch.Tensor):
        return got.dtype == expected.dtype and torch.equal(got, expected)
    if isinstance(expected, tuple | list):
        return len(got) == len(expected) and all(map(same, got, expected))
    return got == expected


def test_lists_of_adapters_name_the_reference_adapter_first(fresh_isolated):
    add_style(fresh_isolated)
    assert fresh_isolated.get_list_adapters() == {"transformer": ["refalign", "style"]}
    assert fresh_isolated.get_active_adapters() == ["style"]
