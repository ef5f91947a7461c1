"""Joint attention with references at timestep 0, against its definition written out from the model's own layers."""

import pytest
import torch
from tiny_models import tiny_transformer
from torch.nn.functional import pad, scaled_dot_product_attention

import refalign_adapter as ra
from refalign_adapter.families.wan import WanFamily

C, F, M, H, W, S, D = 16, 3, 2, 8, 12, 5, 32
N = (H // 2) * (W // 2)


def draw(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def build(timestep="clean"):
    transformer = tiny_transformer().double()
    config = ra.RefAlignConfig(attention="joint", r=4, align_layers=2, reference_timestep=timestep)
    branch = ra.attach(transformer, config, seed=0)
    for index, (name, parameter) in enumerate(branch.named_parameters()):
        parameter.data = parameter.data.double()
        if "lora_B" in name:
            parameter.data += 0.1 * draw(*parameter.shape, seed=index)
    return transformer, branch


def written_out(model, video, references, timesteps, text):
    """Each token modulated by its own timestep; references seen by all, prompt by the video alone.

    `timesteps` are the video's and the references'; returns the video's frames and the references' tokens per block.
    """
    frames, length = video.shape[2], video.shape[2] * N
    together = torch.cat([video, references], 2)
    cosine, sine = model.rope(together)
    tokens = model.patch_embedding(together).flatten(2).transpose(1, 2)
    parts = [model.condition_embedder(torch.tensor([time]).double(), text, None) for time in timesteps]
    prompt, counts = parts[0][2], (length, references.shape[2] * N)
    embedded = torch.cat(
        [part[0].unsqueeze(1).expand(-1, count, -1) for part, count in zip(parts, counts, strict=True)], 1
    )
    modulation = torch.cat(
        [p[1].unflatten(1, (6, -1)).unsqueeze(1).expand(-1, n, -1, -1) for p, n in zip(parts, counts, strict=True)], 1
    )
    seen = []
    for block in model.blocks:
        shift, scale, gate, ffn_shift, ffn_scale, ffn_gate = (block.scale_shift_table[0] + modulation).unbind(2)
        attention, normed = block.attn1, block.norm1(tokens) * (1 + scale) + shift

        def turn(values, heads=attention.heads):
            values = values.unflatten(-1, (heads, -1))
            even, odd = values[..., 0::2], values[..., 1::2]
            c, s = cosine[..., 0::2], sine[..., 1::2]
            return torch.stack([even * c - odd * s, even * s + odd * c], -1).flatten(-2)

        query, key = turn(attention.norm_q(attention.to_q(normed))), turn(attention.norm_k(attention.to_k(normed)))
        value = attention.to_v(normed).unflatten(-1, (attention.heads, -1))
        attended = scaled_dot_product_attention(*(part.transpose(1, 2) for part in (query, key, value)))
        tokens = tokens + attention.to_out[0](attended.transpose(1, 2).flatten(2)) * gate
        crossed = block.attn2(block.norm2(tokens[:, :length]), prompt)
        tokens = tokens + pad(crossed, (0, 0, 0, tokens.shape[1] - length))
        tokens = tokens + block.ffn(block.norm3(tokens) * (1 + ffn_scale) + ffn_shift) * ffn_gate
        seen.append(tokens[:, length:])
    shift, scale = (model.scale_shift_table[0] + embedded.unsqueeze(2)).unbind(2)
    out = model.proj_out(model.norm_out(tokens) * (1 + scale) + shift)[:, :length]
    out = out.unflatten(1, (frames, H // 2, W // 2)).unflatten(-1, (2, 2, -1))
    return torch.einsum("bfhwpqc->bcfhpwq", out).flatten(5).flatten(3, 4), seen


@pytest.mark.parametrize("timestep", ["clean", "video"])
def test_output_and_features_are_the_definitions(timestep):
    transformer, branch = build(timestep)
    video, references, text = draw(1, C, F, H, W, seed=1), draw(1, C, M, H, W, seed=2), draw(1, S, D, seed=3)
    branch.capture = True
    with torch.no_grad():
        with branch.references(references):
            got = transformer(video, torch.tensor([700.0]).double(), text).sample
        times = (700.0, 0.0 if timestep == "clean" else 700.0)
        expected, seen = written_out(transformer, video, references, times, text)
    torch.testing.assert_close(got, expected, atol=2e-6, rtol=0)
    for block, features in branch.features.items():
        torch.testing.assert_close(features.flatten(1, 2), seen[block], atol=2e-6, rtol=0)


def test_a_sample_of_a_batch_gets_what_it_gets_alone_and_without_references_nothing_changes():
    transformer, branch = build()
    video, references, text = draw(2, C, F, H, W, seed=1), draw(2, C, M, H, W, seed=2), draw(2, S, D, seed=3)
    times, mask = torch.tensor([900.0, 200.0]).double(), torch.tensor([[True, True], [False, True]])
    plain = tiny_transformer().double()
    with torch.no_grad():
        with branch.references(references, mask):
            together = transformer(video, times, text).sample
        for i in range(2):
            with branch.references(references[i : i + 1, :, mask[i]]):
                alone = transformer(video[i : i + 1], times[i : i + 1], text[i : i + 1]).sample
            torch.testing.assert_close(together[i : i + 1], alone, atol=1e-6, rtol=0)
        branch.detach()
        assert torch.equal(transformer(video, times, text).sample, plain(video, times, text).sample)


@pytest.mark.parametrize(
    "timestep",
    [torch.tensor(700), torch.tensor([700, 700]), torch.full((2, 4), 700)],
    ids=["one", "a sample", "a token"],
)
def test_a_timestep_in_any_of_its_forms(timestep):
    for clean, of_references in ((True, 0), (False, 700)):
        arguments = {"timestep": timestep}
        WanFamily().append_timesteps(arguments, 2, 4, 3, clean=clean)
        got = arguments["timestep"]
        assert got.dtype == timestep.dtype
        if clean or timestep.ndim == 2:
            assert got.tolist() == [[700] * 4 + [of_references] * 3] * 2
        else:
            assert got is timestep
