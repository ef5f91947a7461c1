"""Every DiT family through one case table. A new family adds its tiny pipeline here and nothing else."""

import copy
import warnings

import pytest
import torch
from diffusers.models.attention_dispatch import dispatch_attention_fn
from tiny_models import save_tiny_pipeline, tiny_pipeline

import refalign_adapter as ra
from refalign_adapter.branch.rewired import Rewired
from refalign_adapter.families.base import known_families, load_family, loading_options

PIPELINES = {"wan": tiny_pipeline}
FAMILIES = known_families()


@pytest.fixture(params=sorted(FAMILIES), scope="module")
def case(request):
    return FAMILIES[request.param], PIPELINES[request.param]()


def test_every_family_has_a_case():
    assert set(FAMILIES) == set(PIPELINES)
    assert all(family.key == name for name, family in FAMILIES.items())


def test_it_is_found_by_model_class_name_key_and_dotted_path(case):
    family, pipe = case
    for found in (
        load_family(pipe.transformer),
        load_family(type(pipe.transformer).__name__),
        load_family(pipe.transformer, family.key),
        load_family(pipe.transformer, f"refalign_adapter.families.{family.key}:FAMILY"),
    ):
        assert found is family


def test_the_geometry_is_consistent(case):
    family, pipe = case
    transformer = pipe.transformer
    patch = family.patch_size(transformer)
    time, height, width = family.size_multiples(pipe, patch)
    frames, rows, columns = 2 * time + 1, 3 * height, 2 * width
    video = torch.rand(1, 3, frames, rows, columns, generator=torch.Generator().manual_seed(0)) * 2 - 1
    latents = family.encode_video(pipe, video)
    assert latents.dtype == torch.float32
    assert latents.shape[2:] == (3, 3 * patch[1], 2 * patch[2])
    images = family.encode_images(pipe, video[:, :, 0])
    assert images.shape == (1, latents.shape[1], *latents.shape[3:])
    torch.testing.assert_close(images, latents[:, :, 0], atol=1e-4, rtol=1e-4)  # the first frame stands alone in time
    text = family.encode_text(pipe, ["a dog"], 12)
    assert text.shape[:2] == (1, 12)
    assert not text[0, -1].any()
    blocks = family.blocks(transformer)
    seen = []
    handles = [block.register_forward_hook(lambda _, __, output: seen.append(output.shape)) for block in blocks]
    with torch.no_grad():
        out = transformer(**family.forward_arguments(transformer, latents, torch.tensor([0.5]), text))[0]
    for handle in handles:
        handle.remove()
    assert out.shape == latents.shape
    assert seen == [(1, 3 * 3 * 2, family.hidden_size(transformer))] * len(blocks)


def test_latents_are_normalised_as_the_pipeline_undoes_it(case):
    family, pipe = case
    video = torch.rand(1, 3, 5, 16, 16, generator=torch.Generator().manual_seed(0)) * 2 - 1
    latents = family.encode_video(pipe, video)
    mean, std = (
        torch.tensor(getattr(pipe.vae.config, f"latents_{name}")).view(1, -1, 1, 1, 1) for name in ("mean", "std")
    )
    expected = pipe.vae.encode(video).latent_dist.mode()
    torch.testing.assert_close(latents * std + mean, expected, atol=1e-5, rtol=1e-5)


def test_references_and_lora_reach_the_declared_modules(case):
    family, pipe = case
    transformer = pipe.transformer
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
    text = torch.zeros(len(latents), 3, family.text_width(transformer), dtype=latents.dtype)
    arguments = family.forward_arguments(transformer, latents, torch.full((len(latents),), 0.5), text)
    return lambda: transformer(**arguments)


class Watched:
    """In the place of a processor's attention: what it was called with."""

    def __init__(self):
        self.seen = []

    def attend(self, *parts, **options):
        self.seen.append(parts)
        return dispatch_attention_fn(*parts, **options)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_self_attention_is_rewired_without_changing_a_bit(case, dtype):
    family, pipe = case
    transformer = pipe.transformer
    latents = torch.randn(2, transformer.config.in_channels, 3, 8, 8, generator=torch.Generator().manual_seed(0))
    attention = family.self_attention(family.blocks(transformer)[1])
    args, kwargs, _ = calls_of(attention, forward(family, transformer, latents))[0]
    attention = copy.deepcopy(attention).to(dtype)
    args = [value.to(dtype) if torch.is_tensor(value) else value for value in args]
    rewired = Rewired(type(attention.processor))
    rewired.slot = watched = Watched()
    with torch.no_grad():
        expected, got = attention(*args, **kwargs), rewired.call(attention.processor, attention, *args, **kwargs)
    assert torch.equal(got, expected)
    (parts,) = watched.seen
    query, key, value = parts
    assert query.shape == key.shape == value.shape
    assert query.shape[2] * query.shape[3] == family.hidden_size(transformer)


def test_keys_and_values_come_from_the_declared_layers(case):
    family, pipe = case
    transformer = pipe.transformer
    block = family.blocks(transformer)[0]
    layers = family.key_value_layers(block)
    attention = family.self_attention(block)
    assert {id(layer) for layer in layers} < {id(module) for module in attention.modules()}
    tokens = torch.randn(1, 6, family.hidden_size(transformer), generator=torch.Generator().manual_seed(0))
    rewired = Rewired(type(attention.processor))
    rewired.slot = watched = Watched()
    with torch.no_grad():
        rewired.call(attention.processor, attention, tokens)
        handles = [layer.register_forward_hook(lambda _, __, output: output * 0) for layer in layers]
        rewired.call(attention.processor, attention, tokens)
    for handle in handles:
        handle.remove()
    before, after = watched.seen
    assert torch.equal(before[0], after[0])
    assert not any(part.any() for part in after[1:])


def test_a_frame_at_its_place_has_the_rotary_embedding_it_has_in_a_longer_video(case):
    family, pipe = case
    transformer = pipe.transformer
    rotary = family.rotary_embedding(transformer)
    latents = torch.zeros(1, transformer.config.in_channels, 6, 8, 12)
    whole = calls_of(rotary, forward(family, transformer, latents))[0][2]
    frames = torch.tensor([5, 0, 3])
    got = family.rotary_at(transformer, latents[:, :, :1].expand(3, -1, -1, -1, -1), frames)
    for part, longer in zip(got, whole, strict=True):
        expected = longer.unflatten(1, (6, -1))[0][frames]
        assert torch.equal(part, expected)


def test_a_frame_beyond_the_videos_end_has_the_rotary_embedding_it_has_in_a_larger_video(case):
    family, pipe = case
    transformer = pipe.transformer
    _, rows, columns = family.patch_size(transformer)
    larger = torch.zeros(1, transformer.config.in_channels, 3, 7 * rows, 9 * columns)
    whole = calls_of(family.rotary_embedding(transformer), forward(family, transformer, larger))[0][2]
    clips, frames = larger.new_zeros(2, larger.shape[1], 1, 3 * rows, 4 * columns), torch.tensor([2, 1])
    got = family.rotary_at(transformer, clips, frames, (4, 5))
    for part, table in zip(got, whole, strict=True):
        expected = table.unflatten(1, (3, 7, 9))[0][frames][:, 4:, 5:].flatten(1, 2)
        assert torch.equal(part, expected)


def test_positions_below_zero_and_beyond_the_models_table_turn_by_their_angles(case):
    family, pipe = case
    transformer = pipe.transformer
    _, rows, columns = family.patch_size(transformer)
    clips = torch.zeros(1, transformer.config.in_channels, 1, 2 * rows, 2 * columns)
    frames = {index: family.rotary_at(transformer, clips, torch.tensor([index])) for index in (-1, 1)}
    zero = family.rotary_at(transformer, clips, torch.tensor([0]))
    far = family.rotary_at(transformer, clips, torch.tensor([0]), (10_000, 10_000))
    assert all(part.isfinite().all() for part in far)
    # cos(-a) = cos(a), sin(-a) = -sin(a): at row and column 0 the frame alone turns
    assert torch.equal(frames[-1][0][:, 0], frames[1][0][:, 0])
    assert torch.equal(frames[-1][1][:, 0], -frames[1][1][:, 0])
    assert not torch.equal(far[0], zero[0])


def test_it_loads_from_a_local_folder(case, tmp_path):
    family, pipe = case
    folder = save_tiny_pipeline(tmp_path / "base")
    transformer = family.load_transformer(str(folder))
    expected = pipe.transformer.state_dict()
    assert all(torch.equal(tensor, expected[name]) for name, tensor in transformer.state_dict().items())
    encoders = family.load_encoders(str(folder))
    assert encoders.transformer is None
    assert family.flow_shift(encoders.scheduler) == 3.0
    assert family.load_pipeline(str(folder)).transformer is not None


def test_it_loads_in_the_type_that_is_asked_for_without_a_warning(case, tmp_path):
    family, _ = case
    folder = str(save_tiny_pipeline(tmp_path / "base"))
    with warnings.catch_warnings():
        warnings.simplefilter("error", FutureWarning)
        transformer = family.load_transformer(folder, dtype=torch.bfloat16)
        pipe = family.load_encoders(folder, dtype={"vae": torch.float32, "default": torch.bfloat16})
    assert transformer.dtype == torch.bfloat16
    assert (pipe.vae.dtype, pipe.text_encoder.dtype) == (torch.float32, torch.bfloat16)


@pytest.mark.parametrize(("version", "name"), [("0.41.9", "torch_dtype"), ("0.42.0", "dtype"), ("1.0.0", "dtype")])
def test_the_type_has_the_name_that_the_installed_diffusers_has_for_it(monkeypatch, version, name):
    monkeypatch.setattr("refalign_adapter.families.base.diffusers_version", version)
    assert loading_options({"dtype": torch.bfloat16, "variant": None}) == {name: torch.bfloat16, "variant": None}
    assert loading_options({"variant": "fp16"}) == {"variant": "fp16"}


@pytest.mark.parametrize("name", ["cogvideo", "no.such.module:FAMILY", "refalign_adapter.families.wan:NOTHING"])
def test_an_unknown_name_is_one_line(name):
    with pytest.raises(ra.UserError, match="family") as caught:
        load_family(None, name)
    assert "\n" not in str(caught.value)
