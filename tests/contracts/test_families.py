"""Every DiT family through one case table: what is promised of references holds for each of its rows.

A new family is one row of `family_cases.CASES`; a family of another package can take these files, its own row in them.
"""

import copy
import warnings

import numpy as np
import pytest
import torch
from diffusers.models.attention_dispatch import dispatch_attention_fn
from family_case import MODES, F, H, W, draw
from family_cases import CASES
from tiny_adapter import anatomy, picture
from tiny_toy import tiny_toy_pipeline

import refalign_adapter as ra
from refalign_adapter.alignment.projector import Projectors
from refalign_adapter.alignment.reference.objective import REFERENCE, ReferenceAlignment
from refalign_adapter.batch import Batch
from refalign_adapter.branch.rewired import Rewired
from refalign_adapter.families._base_model import read_base_model
from refalign_adapter.families.base import loading_options
from refalign_adapter.families.lookup import PLUGINS, load_family
from refalign_adapter.media.canvas import prepare_reference
from refalign_adapter.training.step import StepOptions, TrainingStep

modes = pytest.mark.parametrize("mode", MODES, ids="/".join)
isolated_modes = pytest.mark.parametrize("mode", [mode for mode in MODES if mode[0] == "isolated"], ids="/".join)


@pytest.fixture(params=sorted(CASES), scope="module")
def case(request):
    return CASES[request.param]


@pytest.fixture(scope="module")
def pipe(case):
    """To be left as it was."""
    return case.pipeline()


def test_every_family_has_a_case():
    assert all(name.split()[0] == case.family.key for name, case in CASES.items())
    assert set(PLUGINS.known()) <= set(CASES)


def test_it_is_found_as_object_and_by_dotted_path(case, pipe):
    family = case.family
    path = f"{type(family).__module__}:FAMILY"
    assert load_family(pipe.transformer, family) is load_family(pipe.transformer, path) is family


def test_those_of_this_package_are_found_by_model_class_name_and_key():
    for key, family in PLUGINS.known().items():
        transformer = CASES[key].pipeline().transformer
        assert load_family(transformer) is load_family(type(transformer).__name__) is family
        assert load_family(transformer, key) is family


def test_the_geometry_is_consistent(case, pipe):
    family, transformer = case.family, pipe.transformer
    patch = family.patch_size(transformer)
    time, height, width = family.size_multiples(pipe, patch)
    frames, rows, columns = 2 * time + 1, 3 * height, 2 * width
    video = torch.rand(1, 3, frames, rows, columns, generator=torch.Generator().manual_seed(0)) * 2 - 1
    latents = family.encode_video(pipe, video)
    assert latents.dtype == torch.float32
    assert latents.shape[1:] == (family.channels(transformer), 3, 3 * patch[1], 2 * patch[2])
    images = family.encode_images(pipe, video[:, :, 0])
    assert images.shape == (1, latents.shape[1], *latents.shape[3:])
    torch.testing.assert_close(images, latents[:, :, 0], atol=1e-4, rtol=1e-4)  # the first frame stands alone in time
    text = family.encode_text(pipe, ["a dog"], 12)
    like = family.no_text(transformer, torch.zeros(1), 12)
    assert tuple(text) == tuple(like) == family.text_arguments
    assert {name: (part.shape, part.dtype) for name, part in text.items()} == {
        name: (part.shape, part.dtype) for name, part in like.items()
    }
    embeds = text[family.text_arguments[0]]
    assert embeds.shape == (1, 12, family.text_width(transformer))
    assert embeds.ne(0).any(-1).tolist() == [[True] * 6 + [False] * 6]  # a byte a token, and one for the end
    masks = [part for part in text.values() if part.dtype == torch.bool]
    assert all(mask.tolist() == [[True] * 6 + [False] * 6] for mask in masks)
    seen, blocks = [], family.blocks(transformer)
    handles = [
        block.register_forward_hook(lambda _, __, output: seen.append(family.block_tokens(output).shape))
        for block in blocks
    ]
    arguments = family.forward_arguments(transformer, latents, torch.tensor([0.5]), text)
    with torch.no_grad():
        assert case.velocity(transformer, arguments).shape == latents.shape
    for handle in handles:
        handle.remove()
    assert family.call_shape(transformer, arguments) == (1, 3, 3, 2)
    assert seen == [(1, 3 * 3 * 2, family.hidden_size(transformer))] * len(blocks)
    noise = arguments[family.video_argument]
    assert family.latents_shape(pipe, transformer, 1, (frames, rows, columns)) == noise.shape


def test_latents_are_normalised_as_the_pipeline_undoes_it(case, pipe):
    family = case.family
    video = torch.rand(1, 3, *case.size(pipe), generator=torch.Generator().manual_seed(0)) * 2 - 1
    latents = family.encode_video(pipe, video)
    kept = vars(pipe.vae.config) if "latents_mean" in pipe.vae.config else dict(pipe.vae.named_buffers())
    mean, std = (torch.as_tensor(kept[f"latents_{name}"]).view(1, -1, 1, 1, 1) for name in ("mean", "std"))
    expected = pipe.vae.encode(video).latent_dist.mode()
    torch.testing.assert_close(latents * std + mean, expected, atol=1e-5, rtol=1e-5)


def test_references_and_lora_reach_the_declared_modules(case, pipe):
    family, transformer = case.family, pipe.transformer
    names = {name for name, _ in transformer.named_modules()}
    for target in family.target_modules(transformer):
        assert any(name.endswith(f".{target}") for name in names), target
    for block in family.blocks(transformer):
        assert isinstance(family.self_attention(block), torch.nn.Module)
    described = family.describe(transformer)
    assert described["family"] == family.key
    assert ra.RefAlignConfig.from_dict(ra.RefAlignConfig(base=described).to_dict()).base == described


def calls_of(module, run):
    """(args, kwargs, output) of every call of `module` while `run` runs."""
    calls = []
    handle = module.register_forward_hook(lambda _, *call: calls.append(call), with_kwargs=True)
    with torch.no_grad():
        run()
    handle.remove()
    return calls


def forward(family, transformer, latents):
    text = family.no_text(transformer, latents, 3)
    arguments = family.forward_arguments(transformer, latents, torch.full((len(latents),), 0.5), text)
    return lambda: transformer(**arguments)


class Watched:
    """In the place of a processor's attention: what it was called with."""

    def __init__(self):
        self.seen = []

    def attend(self, *parts, **options):
        self.seen.append(parts)
        return dispatch_attention_fn(*parts, **options)


def cast(value, dtype):
    """Tensors, also inside tuples, in another floating type."""
    if isinstance(value, tuple):
        return tuple(cast(part, dtype) for part in value)
    return value.to(dtype) if torch.is_tensor(value) and value.is_floating_point() else value


def parts_of(output):
    return output if isinstance(output, tuple) else (output,)


def call_of_self_attention(case, transformer):
    """Of the second block: the module, and what it is called with."""
    attention = case.family.self_attention(case.family.blocks(transformer)[1])
    run = forward(case.family, transformer, draw(2, case.family.channels(transformer), 3, 8, 8))
    args, kwargs, _ = calls_of(attention, run)[0]
    return attention, args, kwargs


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_self_attention_is_rewired_without_changing_a_bit(case, pipe, dtype):
    attention, args, kwargs = call_of_self_attention(case, pipe.transformer)
    attention, args = copy.deepcopy(attention).to(dtype), cast(args, dtype)
    kwargs = {name: cast(value, dtype) for name, value in kwargs.items()}
    rewired = Rewired(type(attention.processor))
    rewired.slot = watched = Watched()
    with torch.no_grad():
        expected, got = attention(*args, **kwargs), rewired.call(attention.processor, attention, *args, **kwargs)
    assert all(map(torch.equal, parts_of(got), parts_of(expected)))
    (parts,) = watched.seen
    query, key, value = parts
    assert query.shape == key.shape == value.shape
    assert query.shape[2] * query.shape[3] == case.family.hidden_size(pipe.transformer)


def test_keys_and_values_come_from_the_declared_layers(case, pipe):
    attention, args, kwargs = call_of_self_attention(case, pipe.transformer)
    layers = case.family.key_value_layers(case.family.blocks(pipe.transformer)[1])
    assert {id(layer) for layer in layers} < {id(module) for module in attention.modules()}
    video = (args[0] if args else kwargs["hidden_states"]).shape[1]
    rewired = Rewired(type(attention.processor))
    rewired.slot = watched = Watched()
    with torch.no_grad():
        rewired.call(attention.processor, attention, *args, **kwargs)
        handles = [layer.register_forward_hook(lambda _, __, output: output * 0) for layer in layers]
        rewired.call(attention.processor, attention, *args, **kwargs)
    for handle in handles:
        handle.remove()
    before, after = watched.seen
    text = before[0].shape[1] - video
    own = slice(text, None) if case.family.text_first else slice(0, video)
    assert torch.equal(before[0], after[0])
    assert all(part[:, own].any() for part in before[1:])
    assert not any(part[:, own].any() for part in after[1:])


def rotary_of(case, transformer):
    rotary = case.family.rotary_embedding(transformer)
    if rotary is None:
        pytest.skip("its positions are arguments")
    return rotary


def test_a_frame_at_its_place_has_the_rotary_embedding_it_has_in_a_longer_video(case, pipe):
    family, transformer = case.family, pipe.transformer
    latents = torch.zeros(1, family.channels(transformer), 6, 8, 12)
    whole = calls_of(rotary_of(case, transformer), forward(family, transformer, latents))[0][2]
    frames = torch.tensor([5, 0, 3])
    got = family.rotary_at(transformer, latents[:, :, :1].expand(3, -1, -1, -1, -1), frames)
    for part, longer in zip(got, whole, strict=True):
        expected = longer.unflatten(1, (6, -1))[0][frames]
        assert torch.equal(part, expected)


def test_a_frame_beyond_the_videos_end_has_the_rotary_embedding_it_has_in_a_larger_video(case, pipe):
    family, transformer = case.family, pipe.transformer
    _, rows, columns = family.patch_size(transformer)
    larger = torch.zeros(1, family.channels(transformer), 3, 7 * rows, 9 * columns)
    whole = calls_of(rotary_of(case, transformer), forward(family, transformer, larger))[0][2]
    clips, frames = larger.new_zeros(2, larger.shape[1], 1, 3 * rows, 4 * columns), torch.tensor([2, 1])
    got = family.rotary_at(transformer, clips, frames, (4, 5))
    for part, table in zip(got, whole, strict=True):
        expected = table.unflatten(1, (3, 7, 9))[0][frames][:, 4:, 5:].flatten(1, 2)
        assert torch.equal(part, expected)


def test_positions_below_zero_and_beyond_the_models_table_turn_by_their_angles(case, pipe):
    family, transformer = case.family, pipe.transformer
    rotary_of(case, transformer)
    _, rows, columns = family.patch_size(transformer)
    clips = torch.zeros(1, family.channels(transformer), 1, 2 * rows, 2 * columns)
    frames = {index: family.rotary_at(transformer, clips, torch.tensor([index])) for index in (-1, 1)}
    zero = family.rotary_at(transformer, clips, torch.tensor([0]))
    far = family.rotary_at(transformer, clips, torch.tensor([0]), (10_000, 10_000))
    assert all(part.isfinite().all() for part in far)
    # cos(-a) = cos(a), sin(-a) = -sin(a): at row and column 0 the frame alone turns
    assert torch.equal(frames[-1][0][:, 0], frames[1][0][:, 0])
    assert torch.equal(frames[-1][1][:, 0], -frames[1][1][:, 0])
    assert not torch.equal(far[0], zero[0])


def test_references_have_the_same_first_keys_alone_and_in_the_videos_sequence(case, monkeypatch):
    """Their places, then: the video's frames go on in them, whichever way they are let in."""
    transformer, branch = case.attached("isolated", "all")
    references, mask = case.references(transformer), torch.tensor([[True, True], [True, False]])
    cache = branch.encode_references(references, frames=F)
    branch.detach()
    joint, branch = case.attached("joint", "all")
    arguments, seen = case.arguments(joint), []
    latents = draw(2, case.family.channels(joint), F, H, W)
    zero = case.family.forward_arguments(joint, latents, torch.zeros(2), case.family.no_text(joint, latents))
    arguments[case.family.timestep_argument] = zero[case.family.timestep_argument]

    def attend(query, key, *parts, **options):
        seen.append(key)
        return dispatch_attention_fn(query, key, *parts, **options)

    monkeypatch.setattr("refalign_adapter.branch.processors.dispatch_attention_fn", attend)
    with torch.no_grad(), branch.references(references, mask):
        joint(**arguments)
    of_video = F * cache.tokens // 2
    text = seen[0].shape[1] - of_video - cache.tokens
    begin = of_video + text * case.family.text_first
    torch.testing.assert_close(seen[0][:, begin : begin + cache.tokens], cache.keys[0], atol=2e-6, rtol=1e-5)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_without_references_the_base_is_itself_bit_for_bit(case, dtype):
    base = case.pipeline().transformer.to(dtype)
    transformer, branch = case.attached("isolated", "reference", dtype)
    arguments, references = case.arguments(base), case.references(base)
    with torch.no_grad():
        expected = base(**arguments)[0]
        assert torch.equal(transformer(**arguments)[0], expected)
        with branch.references(references):
            assert not torch.equal(transformer(**arguments)[0], expected)
        with branch.references(references, torch.zeros(2, 2, dtype=torch.bool)):
            assert torch.equal(transformer(**arguments)[0], expected)
        assert torch.equal(transformer(**arguments)[0], expected)


@modes
def test_detached_the_transformer_is_as_it_was(case, mode):
    transformer = case.pipeline().transformer
    arguments = case.arguments(transformer)
    before, processors = anatomy(transformer), processors_of(case, transformer)
    with torch.no_grad():
        expected = transformer(**arguments)[0]
    config = ra.RefAlignConfig(attention=mode[0], lora_scope=mode[1], r=4, align_layers=2, max_sequence_length=16)
    branch = ra.attach(transformer, config, family=case.family)
    branch.capture = True
    with branch.references(case.references(transformer)):
        transformer(**arguments)
    branch.detach()
    assert anatomy(transformer) == before
    assert list(map(id, processors_of(case, transformer))) == list(map(id, processors))
    with torch.no_grad():
        assert torch.equal(transformer(**arguments)[0], expected)


def processors_of(case, transformer):
    return [case.family.self_attention(block).processor for block in case.family.blocks(transformer)]


@modes
def test_references_their_order_and_their_number_matter(case, mode):
    transformer, branch = case.attached(*mode)
    arguments, references = case.arguments(transformer), case.references(transformer)
    outputs = []
    for given in (references, references.flip(2), references[:, :, :1], None):
        with torch.no_grad(), branch.references(given):
            outputs.append(case.velocity(transformer, arguments))
    assert outputs[0].shape == references.shape[:2] + (F, H, W)
    for index, one in enumerate(outputs):
        for other in outputs[index + 1 :]:
            assert (one - other).abs().amax((1, 2, 3, 4)).min() > 1e-4


@isolated_modes
def test_cached_references_give_what_uncached_ones_give(case, mode):
    transformer, branch = case.attached(*mode)
    references, mask = case.references(transformer), torch.tensor([[True, True], [False, True]])
    cache = branch.encode_references(references, mask, frames=F)
    for seed in (1, 7):
        arguments = case.arguments(transformer, seed=seed)
        with torch.no_grad():
            with branch.references(cache):
                cached = transformer(**arguments)[0]
            with branch.references(references, mask):
                assert torch.equal(cached, transformer(**arguments)[0])


@isolated_modes
def test_references_may_begin_where_the_videos_rows_and_columns_end(case, mode):
    outputs = []
    for place in ("origin", "beyond"):
        transformer, branch = case.attached(*mode, reference_place=place, reference_frame=-1)
        references, arguments = case.references(transformer), case.arguments(transformer)
        cache = branch.encode_references(references, frames=F, size=(H, W))
        with torch.no_grad(), branch.references(cache):
            outputs.append(transformer(**arguments)[0])
        with torch.no_grad(), branch.references(references):
            assert torch.equal(transformer(**arguments)[0], outputs[-1])
    assert not torch.equal(*outputs)


@modes
def test_nothing_leaks_from_padding(case, mode):
    transformer, branch = case.attached(*mode)
    arguments, references = case.arguments(transformer, 3), case.references(transformer, 3)
    mask = torch.tensor([[True, True], [False, True], [False, False]])
    other = torch.where(mask[:, None, :, None, None], references, 1e3)
    outputs, features, branch.capture = [], [], True
    for given in (references, other):
        with torch.no_grad(), branch.references(given, mask):
            outputs.append(case.velocity(transformer, arguments))
        features.append(branch.features[1])
    assert torch.equal(*outputs)
    assert torch.equal(*features)
    assert not features[0][~mask].any()
    for sample in range(3):
        one = {name: of_sample(value, sample) for name, value in arguments.items()}
        with torch.no_grad(), branch.references(references[sample : sample + 1, :, mask[sample]]):
            alone = case.velocity(transformer, one)
        torch.testing.assert_close(outputs[0][sample : sample + 1], alone, atol=1e-5, rtol=1e-5)
        if mask[sample].any():
            torch.testing.assert_close(features[0][sample][mask[sample]], branch.features[1][0], atol=1e-5, rtol=1e-5)


def of_sample(value, sample):
    return value[sample : sample + 1] if torch.is_tensor(value) and len(value) == 3 else value


def gradients(case, transformer, branch):
    """Of a loss on the prediction and the features of references, one of which is padding."""
    branch.capture = True
    arguments, references = case.arguments(transformer), case.references(transformer)
    with branch.references(references, torch.tensor([[True, True], [True, False]])):
        loss = case.velocity(transformer, arguments).square().mean()
    (loss + sum(part.square().mean() for part in branch.features.values())).backward()
    return {name: parameter.grad for name, parameter in branch.named_parameters()}


@modes
def test_gradients_are_equal_with_checkpointing(case, mode):
    expected = gradients(case, *case.attached(*mode, dtype=torch.float64))
    transformer, branch = case.attached(*mode, dtype=torch.float64)
    transformer.enable_gradient_checkpointing()
    got = gradients(case, transformer, branch)
    for name, gradient in expected.items():
        torch.testing.assert_close(got[name], gradient, atol=1e-12, rtol=1e-9, msg=name)


@modes
@pytest.mark.parametrize("align_layers", [2, 3])
def test_every_trained_tensor_gets_a_gradient_and_no_other(case, mode, align_layers):
    transformer, branch = case.attached(*mode, align_layers=align_layers)
    found = gradients(case, transformer, branch)
    assert [name for name, gradient in found.items() if gradient is None or not gradient.any()] == []
    trained = {name for name, parameter in transformer.named_parameters() if parameter.grad is not None}
    assert trained == set(found)


def released():
    return [(key, name) for key, case in CASES.items() for name in case.released]


@pytest.mark.parametrize(("key", "name"), released())
def test_released_models_take_references_by_their_configs(key, name):
    case = CASES[key]
    config, parameters = case.released[name]
    transformer_class = type(case.pipeline().transformer)
    with torch.device("meta"):
        transformer = transformer_class(**config)
        assert sum(parameter.numel() for parameter in transformer.parameters()) == parameters
        options = {"r": 8, "max_sequence_length": case.family.max_text_tokens}
        branch = ra.attach(transformer, ra.RefAlignConfig(attention="isolated", lora_scope="reference", **options))
    assert branch.config.base == case.family.describe(transformer)
    arguments = {
        name: value.to("meta") if torch.is_tensor(value) else value
        for name, value in case.arguments(transformer).items()
    }
    branch.capture = True
    with torch.no_grad(), branch.references(case.references(transformer).to("meta")):
        assert case.velocity(transformer, arguments).shape == (2, case.family.channels(transformer), F, H, W)
    assert set(branch.features) == set(range(9))
    width = case.family.hidden_size(transformer)
    assert all(part.shape == (2, 2, case.tokens(transformer), width) for part in branch.features.values())
    inside = {id(module) for block in case.family.blocks(transformer) for module in block.modules()}
    layers = {name.rpartition(".lora_")[0] for name, _ in branch.named_parameters()}
    assert all(id(transformer.get_submodule(layer)) in inside for layer in layers)


def trained_adapter(case, mode, folder):
    """A few steps of training on a clip, captions and references that the family encodes; returns the folder."""
    pipe = case.pipeline()
    family, transformer = case.family, pipe.transformer
    config = ra.RefAlignConfig(attention=mode[0], lora_scope=mode[1], r=4, align_layers=2, max_sequence_length=16)
    branch = ra.attach(transformer, config, family=family, seed=0)
    generator = torch.Generator().manual_seed(2)
    video, images = (
        torch.rand(2, 3, *size, generator=generator) * 2 - 1 for size in (case.size(pipe), case.size(pipe)[1:])
    )
    batch = Batch(
        keys=["a", "b"],
        latents=family.encode_video(pipe, video),
        text=family.encode_text(pipe, ["a cat", "dogs"], 16),
        references=family.encode_images(pipe, images).unsqueeze(2),
        mask=torch.tensor([[True], [True]]),
        subjects=torch.zeros(2, 1, dtype=torch.int64),
        targets={REFERENCE: {"teacher": torch.randn(2, 1, 2, 3, 10, generator=generator)}},
    )
    projectors = Projectors(branch.align_blocks, family.hidden_size(transformer), {"teacher": 10}, generator)
    step = TrainingStep(branch, [ReferenceAlignment(projectors)], StepOptions())
    optimizer = torch.optim.AdamW([item for item in step.parameters() if item.requires_grad], lr=1e-2)
    empty, losses = {name: part[0] for name, part in family.encode_text(pipe, [""], 16).items()}, []
    for _ in range(8):
        options = {"sigmas": torch.tensor([0.4, 0.8]), "noise": draw(*batch.latents.shape, seed=3)}
        output = step(batch, empty, generator=generator, weights={REFERENCE: 0.5}, drop_conditions=False, **options)
        optimizer.zero_grad()
        output.loss.backward()
        optimizer.step()
        losses.append(float(output.loss.detach()))
    assert losses[-1] < losses[0]
    return branch.save_pretrained(folder)


@pytest.mark.parametrize("mode", MODES[:2], ids="/".join)
def test_a_trained_adapter_is_loaded_and_generates_by_the_formula(case, mode, tmp_path):
    folder = trained_adapter(case, mode, tmp_path / "adapter")
    pipe = ra.load_adapter(case.pipeline(), folder, family=case.family)
    pipe.set_progress_bar_config(disable=True)
    family, transformer = case.family, pipe.transformer
    text, negative = (family.encode_text(pipe, [prompt], 16) for prompt in ("a cat", "ugly"))
    _, rows, columns = family.patch_size(transformer)
    x = draw(1, family.channels(transformer), 2, 2 * rows, 3 * columns, seed=4)

    def arguments(x, sigma, text):
        return family.forward_arguments(transformer, x, torch.tensor([sigma]), text)

    given = {
        "reference_images": [picture(0), picture(1, (10, 60))],
        "negative_prompt": "ugly",
        "latents": arguments(x, 1.0, text)[family.video_argument],
        "guidance_scale": 6.0,
        "image_guidance_scale": 4.0,
        "num_inference_steps": 2,
        "output_type": "latent",
        **case.named_size(pipe),
    }
    sigmas = []

    def watch(pipe, *_):
        sigmas[:] = pipe.scheduler.sigmas.tolist()
        return {}

    got = pipe("a cat", callback_on_step_end=watch, **given).frames
    batched = pipe("a cat", batch_guidance=True, **given).frames
    embeds = {name: value for name, value in given.items() if name != "negative_prompt"}
    by_embeds = pipe(**embeds, **family.pipeline_text(text, negative)).frames

    references = torch.cat(
        [encoded(family, pipe, image, *case.size(pipe)[1:]) for image in given["reference_images"]], 2
    )

    def velocity(x, sigma, text, references=None):
        with torch.no_grad(), pipe.branch.references(references):
            return case.velocity(transformer, arguments(x, sigma, text))

    for sigma, after in zip(sigmas[:-1], sigmas[1:], strict=True):
        neither, image_only, both = (
            velocity(x, sigma, *seen) for seen in ((negative,), (negative, references), (text, references))
        )
        assert (both - image_only).abs().max() > 1e-4
        x = x + (after - sigma) * (neither + 4.0 * (image_only - neither) + 6.0 * (both - image_only))
    expected = arguments(x, 1.0, text)[family.video_argument]
    for frames in (got, batched, by_embeds):
        torch.testing.assert_close(frames, expected, atol=5e-5, rtol=1e-4)


def encoded(family, pipe, image, height, width):
    """(1, C, 1, H, W) latents of a reference as the pipeline encodes it."""
    canvas = np.array(prepare_reference(image, height=height, width=width))
    pixels = torch.from_numpy(canvas).permute(2, 0, 1)[None] / 127.5 - 1
    return family.encode_images(pipe, pixels).unsqueeze(2)


def test_without_references_the_video_is_the_stock_pipelines_bit_for_bit(case, tmp_path):
    case.attached("isolated", "reference")[1].save_pretrained(tmp_path / "adapter")
    videos = []
    for pipe in (case.pipeline(), ra.load_adapter(case.pipeline(), tmp_path / "adapter", family=case.family)):
        pipe.set_progress_bar_config(disable=True)
        options = {"guidance_scale": 5.0, "num_inference_steps": 2, "output_type": "latent", **case.named_size(pipe)}
        options |= {"max_sequence_length": 16, "generator": torch.Generator().manual_seed(0)}
        videos.append(pipe(prompt="a cat", negative_prompt="ugly", **options).frames)
    assert torch.equal(*videos)


def test_named_adapters_are_switched_and_unloaded(case, tmp_path):
    base = case.pipeline()
    for seed, name in enumerate(("one", "two")):
        transformer, branch = case.attached("isolated", "reference")
        for _, parameter in branch.named_parameters():
            parameter.data += 0.05 * draw(*parameter.shape, seed=seed)
        branch.save_pretrained(tmp_path / name)
    before = {name: tensor.clone() for name, tensor in base.transformer.state_dict().items()}
    pipe = ra.load_adapter(base, tmp_path / "one", "one", family=case.family)
    pipe = ra.load_adapter(pipe, tmp_path / "two", "two", family=case.family)
    pipe.set_progress_bar_config(disable=True)
    options = {"num_inference_steps": 2, "output_type": "latent", "guidance_scale": 1.0, **case.named_size(pipe)}
    videos = []
    for name in ("one", "two", "one"):
        pipe.set_adapters(name)
        assert pipe.branch.adapter_name == name
        generator = torch.Generator().manual_seed(0)
        videos.append(pipe("a cat", [picture(0)], generator=generator, **options).frames)
    assert torch.equal(videos[0], videos[2])
    assert not torch.equal(videos[0], videos[1])
    pipe.unload_lora_weights()
    assert set(base.transformer.state_dict()) == set(before)
    assert all(torch.equal(tensor, before[name]) for name, tensor in base.transformer.state_dict().items())


def test_its_adapters_are_weighed_where_diffusers_has_a_table_of_models_without_it(case, tmp_path, monkeypatch):
    """As it has before 0.38, without the models of plug-ins."""
    monkeypatch.setattr("refalign_adapter.pipelines.adapters.diffusers_version", "0.37.1")
    monkeypatch.setattr("diffusers.loaders.peft._SET_ADAPTER_SCALE_FN_MAPPING", {})
    case.attached("isolated", "all", lora_alpha=8)[1].save_pretrained(tmp_path / "adapter")
    pipe = ra.load_adapter(case.pipeline(), tmp_path / "adapter", family=case.family)
    pipe.set_adapters("refalign", 0.25)
    layers = [layer for layer in pipe.transformer.modules() if hasattr(layer, "lora_A")]
    assert {layer.scaling["refalign"] for layer in layers} == {0.25 * 8 / 4}


def test_an_adapter_on_all_tokens_is_fused_unfused_and_merged(case, tmp_path):
    case.attached("isolated", "all")[1].save_pretrained(tmp_path / "adapter")
    pipe = ra.load_adapter(case.pipeline(), tmp_path / "adapter", family=case.family)
    pipe.set_progress_bar_config(disable=True)
    arguments = case.arguments(pipe.transformer, batch=1)

    def outputs():
        with torch.no_grad():
            for given in (None, case.references(pipe.transformer, 1)):
                with pipe.branch.references(given):
                    yield pipe.transformer(**arguments)[0]

    expected = list(outputs())
    for change in (pipe.fuse_lora, pipe.unfuse_lora, lambda: ra.merge_and_unload(pipe)):
        change()
        for got, wanted in zip(outputs(), expected, strict=True):
            torch.testing.assert_close(got, wanted, atol=2e-5, rtol=1e-4)
    assert not getattr(pipe.transformer, "peft_config", None)


@pytest.fixture(scope="module")
def base(pipe, tmp_path_factory):
    """The pipeline's folder."""
    folder = tmp_path_factory.mktemp("base")
    pipe.save_pretrained(folder)
    return str(folder)


def test_it_loads_from_a_local_folder(case, pipe, base):
    family = case.family
    transformer, expected = family.load_transformer(base), pipe.transformer.state_dict()
    assert all(torch.equal(tensor, expected[name]) for name, tensor in transformer.state_dict().items())
    encoders = family.load_encoders(base)
    assert encoders.transformer is None
    for tokens, shift in case.shifts.items():
        assert family.flow_shift(encoders.scheduler, tokens) == pytest.approx(shift)
    assert family.load_pipeline(base).transformer is not None


def test_it_loads_in_the_type_that_is_asked_for_without_a_warning(case, base):
    with warnings.catch_warnings():
        warnings.simplefilter("error", FutureWarning)
        transformer = case.family.load_transformer(base, dtype=torch.bfloat16)
        pipe = case.family.load_encoders(base, dtype={"vae": torch.float32, "default": torch.bfloat16})
    assert transformer.dtype == torch.bfloat16
    assert (pipe.vae.dtype, pipe.text_encoder.dtype) == (torch.float32, torch.bfloat16)


def test_its_configs_are_read_without_weights(case, base):
    model = read_base_model(base, field="base", family=case.family)
    assert model.family is case.family
    assert model.transformer.device.type == "meta"
    assert {tokens: pytest.approx(model.flow_shift()(tokens)) for tokens in case.shifts} == case.shifts


@pytest.mark.parametrize(("version", "name"), [("0.41.9", "torch_dtype"), ("0.42.0", "dtype"), ("1.0.0", "dtype")])
def test_the_type_has_the_name_that_the_installed_diffusers_has_for_it(monkeypatch, version, name):
    monkeypatch.setattr("refalign_adapter.families.base.diffusers_version", version)
    assert loading_options({"dtype": torch.bfloat16, "variant": None}) == {name: torch.bfloat16, "variant": None}
    assert loading_options({"variant": "fp16"}) == {"variant": "fp16"}


@pytest.mark.parametrize(
    "name", ["cogvideo", "no.such.module:FAMILY", "refalign_adapter.families.wan:NOTHING", "os:getcwd"]
)
def test_an_unknown_name_is_one_line(name):
    with pytest.raises(ra.UserError, match="family") as caught:
        load_family(None, name)
    assert "\n" not in str(caught.value)


def test_a_family_of_another_model_is_refused():
    with pytest.raises(ra.UserError) as caught:
        ra.attach(tiny_toy_pipeline().transformer, family="wan")
    assert str(caught.value) == ("family: 'wan' is for WanTransformer3DModel, the base is a ToyTransformer3DModel")
    with pytest.raises(ra.UserError, match="family must be an instance of .*, got int"):
        ra.attach(tiny_toy_pipeline().transformer, family=3)
