"""A reference pipeline behaves as any diffusers pipeline: copied, pickled, saved, unloaded, its guidance changed."""

import copy
import inspect
import io
import pickle
import re

import numpy as np
import pytest
import torch
from diffusers import DiffusionPipeline, EulerDiscreteScheduler, WanPipeline
from peft import LoraConfig
from PIL import Image
from tiny_adapter import SIZE, anatomy, picture
from tiny_generation import IMAGES, calls_of, generate, noise
from tiny_models import tiny_pipeline, tiny_transformer

import refalign_adapter as ra
from refalign_adapter.pipelines.saving import FOLDER


def stock(**components):
    pipe = tiny_pipeline(**components)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def style(pipe, name="style"):
    pipe.transformer.add_adapter(LoraConfig(r=2, target_modules=["to_q"], init_lora_weights=False), adapter_name=name)


def through_pickle(value):
    return pickle.loads(pickle.dumps(value))


def through_torch(value):
    file = io.BytesIO()
    torch.save(value, file)
    file.seek(0)
    return torch.load(file, weights_only=False)


@pytest.mark.parametrize("make", [copy.deepcopy, through_pickle, through_torch])
def test_a_copy_generates_the_same_and_is_its_own(either, make):
    expected = generate(either, "a cat", IMAGES)
    other = make(either)
    other.set_progress_bar_config(disable=True)
    assert type(other) is type(either)
    assert other.transformer is not either.transformer
    assert torch.equal(generate(other, "a cat", IMAGES), expected)
    other.unload()
    assert not hasattr(other.transformer, "peft_config")
    assert torch.equal(generate(either, "a cat", IMAGES), expected)


def test_a_transformer_is_copied_with_its_branch(fresh_pipe):
    branch = fresh_pipe.branch
    other = copy.deepcopy(fresh_pipe.transformer)
    (copied,) = ra.branch.reference_branch.branches_of(other).values()
    assert copied is not branch
    assert copied.transformer is other
    copied.detach()
    assert anatomy(other) != anatomy(fresh_pipe.transformer)
    assert fresh_pipe.branch is branch


def test_it_is_saved_as_a_stock_pipeline_with_its_adapter_beside_it(either_fresh, tmp_path):
    pipe = either_fresh
    expected = generate(pipe, "a cat", IMAGES)
    pipe.save_pretrained(tmp_path / "pipe")
    assert torch.equal(generate(pipe, "a cat", IMAGES), expected)
    base = DiffusionPipeline.from_pretrained(tmp_path / "pipe")
    base.set_progress_bar_config(disable=True)
    assert type(base) is WanPipeline
    weights, saved = stock().transformer.state_dict(), base.transformer.state_dict()
    assert weights.keys() == saved.keys()
    assert all(torch.equal(weights[name], saved[name]) for name in weights)
    again = ra.load_adapter(base, tmp_path / "pipe" / FOLDER / "refalign")
    torch.testing.assert_close(generate(again, "a cat", IMAGES), expected, atol=1e-5, rtol=0)


@pytest.fixture(params=["joint", "isolated"])
def either_fresh(request, fresh_pipe, fresh_isolated):
    return fresh_pipe if request.param == "joint" else fresh_isolated


def test_what_a_folder_cannot_hold_is_not_saved(fresh_pipe, tmp_path):
    style(fresh_pipe)
    fresh_pipe.set_adapters(["refalign", "style"])
    with pytest.raises(ra.UserError, match=r"other LoRAs, \['style'\], .* save_lora_weights"):
        fresh_pipe.save_pretrained(tmp_path / "pipe")
    fresh_pipe.delete_adapters("style")
    fresh_pipe.fuse_lora()
    with pytest.raises(ra.UserError, match="fused into the transformer's weights; call unfuse_lora"):
        fresh_pipe.save_pretrained(tmp_path / "pipe")
    assert not (tmp_path / "pipe").exists()


def test_a_merged_pipeline_is_saved_as_it_is(fresh_pipe, tmp_path):
    ra.merge_and_unload(fresh_pipe)
    expected = generate(fresh_pipe, "a cat")
    fresh_pipe.save_pretrained(tmp_path / "pipe")
    assert not (tmp_path / "pipe" / FOLDER).exists()
    base = DiffusionPipeline.from_pretrained(tmp_path / "pipe")
    base.set_progress_bar_config(disable=True)
    got = generate(base, "a cat", guidance_scale=7.5, max_sequence_length=16)
    torch.testing.assert_close(got, expected, atol=1e-5, rtol=0)


@pytest.mark.parametrize("take_off", ["unload", "unload_lora_weights", "delete"])
def test_without_its_adapter_it_goes_on_as_the_base(fresh_pipe, take_off):
    if take_off == "delete":
        fresh_pipe.delete_adapters("refalign")
    else:
        getattr(fresh_pipe, take_off)()
    assert fresh_pipe.changes == ()
    assert torch.equal(generate(fresh_pipe, "a cat"), generate(stock(), "a cat"))
    with pytest.raises(ra.UserError, match=r"no reference adapter is loaded \(any more\); call load_adapter"):
        generate(fresh_pipe, "a cat", IMAGES)


def test_its_class_knows_all_arguments_and_saves_like_the_stock_one(fresh_isolated, fresh_pipe, tmp_path):
    cls = type(fresh_pipe)
    names = list(inspect.signature(cls.__call__).parameters)
    assert names[:4] == ["self", "prompt", "reference_images", "negative_prompt"]
    assert set(inspect.signature(WanPipeline.__call__).parameters) < set(names)
    assert {"image_guidance_scale", "guidance_interval", "batch_guidance", "reference_cache"} < set(names)
    layers = {"a.lora_A.weight": torch.ones(2, 2), "a.lora_B.weight": torch.ones(2, 2)}
    cls.save_lora_weights(tmp_path, transformer_lora_layers=layers)
    assert (tmp_path / "pytorch_lora_weights.safetensors").exists()
    held = {name: parameter.clone() for name, parameter in fresh_isolated.branch.named_parameters()}
    with pytest.raises(ra.UserError, match="save_lora_weights: .* reference"):
        cls.save_lora_weights(tmp_path, transformer_lora_layers=held)


@pytest.mark.parametrize("scale", [1.0, 3.0])
def test_guidance_follows_what_a_callback_sets(either, scale):
    """From the second step on as if the scale had been given; 1 and less switch guidance by the prompt off."""

    def change(pipe, *_):
        pipe._guidance_scale = scale
        return {}

    given = {"num_inference_steps": 3, "image_guidance_scale": 4.0}
    with calls_of(either.transformer) as calls:
        got = generate(either, "a cat", IMAGES, guidance_scale=6.0, callback_on_step_end=change, **given)
    passes = [3, 3, 3] if scale > 1 else [3, 2, 2]
    assert len([call for call in calls if call[2] > 1]) == sum(passes)

    latents = []
    keep = lambda pipe, step, time, values: latents.append(values["latents"]) or {}  # noqa: E731
    generate(either, "a cat", IMAGES, guidance_scale=6.0, callback_on_step_end=keep, **given)
    swap = lambda pipe, step, time, values: {"latents": latents[0]} if step == 0 else {}  # noqa: E731
    expected = generate(either, "a cat", IMAGES, guidance_scale=scale, callback_on_step_end=swap, **given)
    torch.testing.assert_close(got, expected, atol=2e-5, rtol=1e-5)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"output_type": "gif"}, "output_type must be one of np, pt, pil, latent, got 'gif'"),
        ({"prompt_embeds": torch.zeros(1, 16, 32)}, "prompt: give either texts or prompt_embeds, got both"),
        ({"prompt": None, "prompt_embeds": torch.zeros(16, 32)}, r"prompt_embeds must be \(prompts, tokens, 32\)"),
        ({"prompt": None, "prompt_embeds": torch.zeros(1, 16, 31)}, r"prompt_embeds must be .*, got \(1, 16, 31\)"),
        (
            {"prompt": None, "prompt_embeds": [1]},
            r"prompt_embeds must be a tensor \(prompts, tokens, width\), got list",
        ),
        ({"guidance_scale": None}, "guidance_scale must be a number, got None"),
        ({"image_guidance_scale": "5"}, "image_guidance_scale must be a number, got '5'"),
        ({"guidance_interval": 0.5}, "guidance_interval must be two shares of the steps, .* got 0.5"),
        ({"num_frames": 5.0}, "num_frames must be a whole number, got 5.0"),
        ({"height": None}, "height must be a whole number, got None"),
        ({"num_inference_steps": 2.0}, "num_inference_steps must be a whole number of at least 1, got 2.0"),
        ({"generator": 5}, "generator: expected a torch.Generator or a list of them, got 5"),
        ({"latents": [1]}, r"latents must have shape \(1, 16, 2, 4, 6\) .*, got list"),
        ({"attention_kwargs": 3}, "attention_kwargs must be a mapping, got int"),
        ({"negative_prompt": 3}, "negative_prompt: expected a text or a list of them, got 3"),
        ({"max_sequence_length": 0}, "max_sequence_length must be a whole number of at least 1, got 0"),
        ({"batch_guidance": "yes"}, "batch_guidance must be True or False, got 'yes'"),
        ({"callback_on_step_end": 3}, "callback_on_step_end: expected a function, got int"),
    ],
)
def test_a_wrong_argument_is_told_before_any_model_runs(either, changes, message):
    with calls_of(either.transformer) as calls, pytest.raises(ra.UserError) as caught:
        generate(either, **{"prompt": "a cat", "reference_images": IMAGES} | changes)
    assert re.search(message, str(caught.value)), caught.value
    assert "\n" not in str(caught.value)
    assert len(str(caught.value)) < 300
    assert calls == []


def test_components_that_are_missing_or_cannot_drive_it_are_told(fresh_pipe):
    pipe = fresh_pipe
    pipe.scheduler = type("Other", (), {"config": pipe.scheduler.config})()
    with pytest.raises(ra.UserError, match="scheduler: a Other cannot drive this pipeline; take the base's own"):
        generate(pipe, "a cat", IMAGES)
    pipe.scheduler, pipe.text_encoder = tiny_pipeline().scheduler, None
    with pytest.raises(ra.UserError, match="prompt: the pipeline has no text encoder; give prompt_embeds"):
        generate(pipe, "a cat", IMAGES)


def test_a_scheduler_of_another_kind_drives_it(fresh_pipe):
    expected = generate(fresh_pipe, "a cat", IMAGES)
    fresh_pipe.scheduler = EulerDiscreteScheduler(prediction_type="v_prediction")
    assert not torch.equal(generate(fresh_pipe, "a cat", IMAGES), expected)


@pytest.mark.parametrize("name", [None, "", "lora_A", "a.b", "blocks", 3])
def test_a_refused_name_leaves_no_trace(adapter, name):
    base = stock()
    before = anatomy(base.transformer), set(vars(base))
    with pytest.raises(ra.UserError, match="^adapter_name"):
        ra.load_adapter(base, adapter, adapter_name=name)
    assert (anatomy(base.transformer), set(vars(base))) == before


def test_a_compiled_transformer_is_told_the_way_out(adapter):
    base = stock()
    base.transformer = torch.compile(base.transformer, backend="eager")
    with pytest.raises(ra.UserError, match="compiled, .* load the adapter first, and compile then"):
        ra.load_adapter(base, adapter)


def test_fusing_another_lora_never_silences_references(fresh_pipe, isolated_adapters):
    style(fresh_pipe)
    fresh_pipe.set_adapters(["refalign", "style"])
    expected = generate(fresh_pipe, "a cat", IMAGES)
    with pytest.raises(ra.UserError, match="would keep it from acting; leave them unfused"):
        fresh_pipe.fuse_lora(adapter_names=["style"])
    assert torch.equal(generate(fresh_pipe, "a cat", IMAGES), expected)

    for scope, message in (("all", "would act on references too"), ("reference", None)):
        pipe = ra.load_adapter(stock(), isolated_adapters[scope])
        style(pipe)
        pipe.set_adapters(["refalign", "style"])
        expected = generate(pipe, "a cat", IMAGES)
        if message:
            with pytest.raises(ra.UserError, match=message):
                pipe.fuse_lora()
        else:
            cache = pipe.encode_references(IMAGES, **SIZE)
            pipe.fuse_lora(adapter_names=["style"])
            with pytest.raises(ra.UserError, match=r"does not act while \['style'\] are fused into its layers"):
                generate(pipe, "a cat", IMAGES)
            got = generate(pipe, "a cat", reference_cache=cache)
            torch.testing.assert_close(got, expected, atol=1e-4, rtol=1e-4)
            with pytest.raises(ra.UserError, match="'style' is fused .* call unfuse_lora"):
                pipe.delete_adapters("style")
            pipe.unfuse_lora()
        torch.testing.assert_close(generate(pipe, "a cat", IMAGES), expected, atol=1e-4, rtol=1e-4)


def test_a_lora_that_was_fused_at_half_strength_has_its_own_again(fresh_pipe):
    expected = generate(fresh_pipe, "a cat", IMAGES)
    fresh_pipe.fuse_lora(lora_scale=0.5)
    assert (generate(fresh_pipe, "a cat", IMAGES) - expected).abs().max() > 1e-3
    fresh_pipe.unfuse_lora()
    torch.testing.assert_close(generate(fresh_pipe, "a cat", IMAGES), expected, atol=1e-5, rtol=1e-4)


def test_pictures_in_memory_mean_what_the_same_file_means(either, tmp_path):
    grey = np.linspace(0, 65_535, 32 * 48).reshape(32, 48).astype(np.uint16)
    image = Image.fromarray(grey)
    image.save(tmp_path / "grey.png")
    with Image.open(tmp_path / "grey.png") as opened:
        in_memory = opened.copy()
    given = {"num_inference_steps": 1}
    expected = generate(either, "a cat", [str(tmp_path / "grey.png")], **given)
    assert torch.equal(generate(either, "a cat", [image], **given), expected)
    assert torch.equal(generate(either, "a cat", [in_memory], **given), expected)
    with pytest.raises(ra.UserError, match="is an address; download it and give its path"):
        generate(either, "a cat", ["https://example.com/a.png"])


def test_a_cache_knows_the_size_of_the_videos_it_was_made_for(fresh_isolated, tmp_path):
    cache = fresh_isolated.encode_references(IMAGES, **SIZE)
    path = cache.save(tmp_path / "cache.safetensors")
    for given in (cache, ra.ReferenceCache.load(path)):
        assert generate(fresh_isolated, "a cat", reference_cache=given).shape == noise().shape
        with pytest.raises(ra.UserError, match="of another size than those of a video of 64 x 64 pixels .*height=64"):
            generate(fresh_isolated, "a cat", reference_cache=given, height=64, width=64, latents=None)


def test_context_parallelism_is_refused(either, monkeypatch):
    monkeypatch.setattr(either.transformer, "_parallel_config", object(), raising=False)
    with pytest.raises(ra.UserError, match="shares a video out among devices .*, which references do not take yet"):
        generate(either, "a cat", IMAGES)
    assert generate(either, "a cat").shape == noise().shape


def test_prompts_can_be_encoded_alone(either):
    embeds, negative = either.encode_prompt("a cat", "ugly", max_sequence_length=16)
    wanted, unwanted = stock().encode_prompt("a cat", "ugly", max_sequence_length=16)
    assert torch.equal(embeds, wanted)
    assert torch.equal(negative, unwanted)


@pytest.mark.parametrize("source", [None, 3, b"x", ["x"]])
def test_a_source_that_is_no_path_is_told(source):
    with pytest.raises(ra.UserError, match="^adapter: expected a folder or a Hub id, got "):
        ra.load_adapter(stock(), source)


def test_a_transformer_alone_is_no_pipeline(adapter):
    with pytest.raises(ra.UserError, match="expected a diffusers pipeline with a transformer"):
        ra.load_adapter(tiny_transformer(), adapter)


def test_images_at_the_place_of_the_negative_prompt_are_told(either):
    with pytest.raises(ra.UserError, match="negative_prompt: expected texts"):
        generate(either, "a cat", None, [picture()])
