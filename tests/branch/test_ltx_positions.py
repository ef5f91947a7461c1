"""Where references of LTX-Video stand, in seconds and pixels, beside longer and larger videos; their timesteps."""

import math

import pytest
import torch
from family_case import Case, F, H, W, draw
from tiny_ltx import tiny_ltx_pipeline

import refalign_adapter as ra
from refalign_adapter.families.ltx import FAMILY, SCALE

CASE = Case(FAMILY, tiny_ltx_pipeline)


@pytest.fixture(scope="module")
def transformer():
    return tiny_ltx_pipeline().transformer


def rotary(transformer, arguments):
    """(B, N, dim) cosines and sines that the transformer makes of a call."""
    names = ("hidden_states", "num_frames", "height", "width", "rope_interpolation_scale", "video_coords")
    return transformer.rope(*(arguments.get(name) for name in names))


def of_video(transformer, frames, height, width):
    latents = torch.zeros(1, 16, frames, height, width)
    text = FAMILY.no_text(transformer, latents)
    arguments = FAMILY.forward_arguments(transformer, latents, torch.zeros(1), text)
    return [part[0].unflatten(0, (frames, height, width)) for part in rotary(transformer, arguments)]


def of_references(transformer, frames, size, corner=(0, 0)):
    clips = torch.zeros(len(frames), 16, 1, *size)
    arguments = FAMILY.reference_arguments(transformer, clips, torch.tensor(frames), corner)
    return [part.unflatten(1, size) for part in rotary(transformer, arguments)]


def test_a_frame_at_its_place_is_the_one_of_a_longer_video(transformer):
    for got, whole in zip(of_references(transformer, [5, 0, 3], (4, 6)), of_video(transformer, 6, 4, 6), strict=True):
        assert torch.equal(got, whole[[5, 0, 3]])


def test_a_frame_beyond_the_end_is_the_one_of_a_larger_video(transformer):
    got = of_references(transformer, [2, 1], (3, 4), (4, 5))
    for part, whole in zip(got, of_video(transformer, 3, 7, 9), strict=True):
        assert torch.equal(part, whole[[2, 1]][:, 4:, 5:])


@pytest.mark.parametrize("frame", [-1, 20, 999])
def test_any_frame_turns_by_its_seconds(transformer, frame):
    """Angles are π/2 · θ^(k/(K-1)) · (2p − 1), p being shares of 20 s and of 2048 pixels."""
    cosine, sine = of_references(transformer, [frame], (2, 3), (10, 0))
    shares = frame * 8 / 25 / 20, (10 + 1) * 32 / 2048, 2 * 32 / 2048
    turns = [math.pi / 2 * 10_000 ** (k / 8) for k in range(9)]  # 56 // 6 of each axis
    angles = torch.tensor([turn * (2 * share - 1) for turn in turns for share in shares], dtype=torch.float64)
    angles = torch.cat([torch.zeros(1, dtype=torch.float64), angles]).repeat_interleave(2)  # 56 % 6 do not turn
    tolerance = {"atol": 4e-7 * 10_000 * math.pi * (1 + 2 * abs(shares[0])), "rtol": 0}
    torch.testing.assert_close(cosine[0, 1, 2].double(), angles.cos(), **tolerance)
    torch.testing.assert_close(sine[0, 1, 2].double(), angles.sin(), **tolerance)
    slow = {"atol": 1e-5, "rtol": 0}
    torch.testing.assert_close(cosine[0, 1, 2, :20].double(), angles[:20].cos(), **slow)


def test_references_are_at_timestep_zero_without_text(transformer):
    clips = torch.zeros(2, 16, 1, 2, 3)
    arguments = FAMILY.reference_arguments(transformer, clips, torch.tensor([1, 2]))
    assert not arguments["timestep"].any()
    assert not arguments["encoder_attention_mask"].any()
    assert SCALE == (0.32, 32, 32)


@pytest.mark.parametrize("per_token", [False, True])
@pytest.mark.parametrize("clean", [False, True])
def test_joint_references_are_further_frames_that_see_no_text(clean, per_token):
    """Against the plain transformer on more frames, cross-attention's output zero on the last ones."""
    plain = tiny_ltx_pipeline().transformer
    transformer = tiny_ltx_pipeline().transformer
    fields = {"reference_timestep": "clean"} if clean else {}
    config = ra.RefAlignConfig(
        attention="joint", lora_scope="all", r=4, align_layers=2, max_sequence_length=16, **fields
    )
    branch = ra.attach(transformer, config, seed=0)  # its update is zero
    references, arguments = CASE.references(transformer), CASE.arguments(transformer)
    tokens, further = F * H * W, 2 * H * W
    if per_token:
        arguments["timestep"] = arguments["timestep"][:, None].repeat(1, tokens)
    with torch.no_grad(), branch.references(references):
        got = CASE.velocity(transformer, arguments)

    times = arguments["timestep"].reshape(2, -1)[:, :1].repeat(1, tokens + further)
    times[:, tokens:] *= not clean
    longer = arguments | {
        "hidden_states": torch.cat([arguments["hidden_states"], references.flatten(2).transpose(1, 2)], 1),
        "num_frames": F + 2,
        "timestep": times,
    }
    kept = torch.ones(1, tokens + further, 1)
    kept[:, tokens:] = 0
    for block in plain.transformer_blocks:
        block.attn2.register_forward_hook(lambda _, args, output: output * kept)
    with torch.no_grad():
        expected = CASE.velocity(plain, longer)[:, :, :F]
    torch.testing.assert_close(got, expected, atol=1e-5, rtol=1e-5)


def test_joint_references_of_a_call_with_its_own_coordinates_are_refused():
    transformer, branch = CASE.attached("joint", "all")
    arguments = CASE.arguments(transformer) | {"video_coords": torch.zeros(2, 3, F * H * W)}
    with branch.references(CASE.references(transformer)), pytest.raises(ra.UserError, match="^video_coords: joint"):
        transformer(**arguments)


def test_a_call_that_does_not_tell_its_grid_is_refused():
    transformer, branch = CASE.attached("isolated", "reference")
    arguments = CASE.arguments(transformer)
    del arguments["num_frames"]
    with branch.references(CASE.references(transformer)), pytest.raises(ra.UserError, match="num_frames, height and"):
        transformer(**arguments)


@pytest.mark.parametrize(("fields", "part"), [({"patch_size": 2}, "tokens"), ({"out_channels": 8}, "tokens")])
def test_other_transformers_of_the_class_are_refused(fields, part):
    transformer = tiny_ltx_pipeline(**fields).transformer
    with pytest.raises(ra.UserError, match=rf"^base: this LTX-Video's {part} .*, such as Lightricks/LTX-Video$"):
        ra.attach(transformer)


def test_prompts_are_at_most_as_long_as_they_were_trained(transformer):
    with pytest.raises(ra.UserError, match="max_sequence_length must be at most 128, .*, got 512"):
        ra.attach(transformer, ra.RefAlignConfig(align_layers=2, max_sequence_length=512))


def test_text_is_the_stock_pipelines_but_for_rows_that_are_masked():
    pipe = tiny_ltx_pipeline()
    with torch.no_grad():
        embeds, mask, _, _ = pipe.encode_prompt(["a cat", "dogs"], None, False, max_sequence_length=16)
    text = FAMILY.encode_text(pipe, ["a cat", "dogs"], 16)
    assert mask.sum(1).tolist() == [6, 5]
    assert torch.equal(text["encoder_attention_mask"], mask)
    assert torch.equal(text["encoder_hidden_states"][mask], embeds[mask])
    assert not text["encoder_hidden_states"][~mask].any()
    call = {"hidden_states": draw(2, 4, 16), "timestep": torch.full((2,), 500.0), "num_frames": 1}
    call |= {"height": 2, "width": 2, "return_dict": False, "encoder_attention_mask": mask}
    with torch.no_grad():
        outputs = [
            pipe.transformer(**call, encoder_hidden_states=part)[0] for part in (embeds, text["encoder_hidden_states"])
        ]
    assert torch.equal(*outputs)
    with pytest.raises(ra.UserError, match="prompt: expected at least one"):
        FAMILY.encode_text(pipe, [], 16)
