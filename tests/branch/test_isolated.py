"""Isolated attention against its definition, written out block by block from the model's own layers.

The model computes parts in float32 whatever its type, which bounds how close the two can be.
"""

import pytest
import torch
from tiny_models import tiny_transformer
from torch.nn.functional import scaled_dot_product_attention

import refalign_adapter as ra

C, F, H, W, S, D = 16, 3, 8, 8, 5, 32
SCOPES = ("reference", "all")


def draw(*shape, seed=0, dtype=torch.float64):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


def config(scope="reference", **fields):
    return ra.RefAlignConfig(attention="isolated", lora_scope=scope, r=4, **{"align_layers": 2} | fields)


def build(scope="reference", dtype=torch.float64, **fields):
    transformer = tiny_transformer().to(dtype)
    branch = ra.attach(transformer, config(scope, **fields), seed=0)
    for index, (name, parameter) in enumerate(branch.named_parameters()):
        parameter.data = parameter.data.to(dtype)
        if "lora_B" in name:
            parameter.data += 0.1 * draw(*parameter.shape, seed=index, dtype=dtype)
    return transformer, branch


def inputs(batch=1, frames=F, seed=1, dtype=torch.float64, height=H, width=W):
    return {
        "hidden_states": draw(batch, C, frames, height, width, seed=seed, dtype=dtype),
        "timestep": torch.linspace(300, 700, batch).to(dtype),
        "encoder_hidden_states": draw(batch, S, D, seed=seed + 1, dtype=dtype),
        "return_dict": False,
    }


def merged(transformer, branch, adapted):
    """A plain copy of the model, with the LoRA in its weights or without it."""
    plain = tiny_transformer().to(transformer.dtype)
    plain.load_state_dict(
        {
            name.replace(".base_layer", ""): tensor
            for name, tensor in transformer.state_dict().items()
            if ".lora_" not in name
        }
    )
    if adapted:
        lora = dict(branch.named_parameters())
        for name, up in lora.items():
            if ".lora_B." in name:
                down = lora[name.replace(".lora_B.", ".lora_A.")]
                layer = plain.get_submodule(name.split(".lora_B.")[0])
                layer.weight.data += up.data @ down.data * branch.config.lora_alpha / branch.config.r
    return plain


def written_out(model, video, timestep, text, *, first_frame=0, corner=(0, 0), read=None, keep=None, crosses=True):
    """The definition: one sample through all blocks; returns the output, each block's keys and values, its tokens."""
    frames, rows, columns = video.shape[2], video.shape[3] // 2, video.shape[4] // 2
    grid = first_frame + frames, corner[0] + rows, corner[1] + columns
    turned = model.rope(video.new_zeros(1, C, grid[0], 2 * grid[1], 2 * grid[2]))
    turned = [part[0].unflatten(0, grid)[first_frame:, corner[0] :, corner[1] :] for part in turned]
    cosine, sine = (part.flatten(0, 2) for part in turned)
    tokens = model.patch_embedding(video).flatten(2).transpose(1, 2)
    embedded, modulation, text, _ = model.condition_embedder(timestep, text, None)
    modulation, seen, outputs = modulation.unflatten(1, (6, -1)), [], []
    for index, block in enumerate(model.blocks):
        shift, scale, gate, ffn_shift, ffn_scale, ffn_gate = (block.scale_shift_table + modulation).chunk(6, 1)
        attention, normed = block.attn1, block.norm1(tokens) * (1 + scale) + shift

        def heads(values, heads=attention.heads):
            return values.unflatten(-1, (heads, -1))

        def turn(values, cosine=cosine, sine=sine):
            even, odd = values[..., 0::2], values[..., 1::2]
            c, s = cosine[..., 0::2], sine[..., 1::2]
            return torch.stack([even * c - odd * s, even * s + odd * c], -1).flatten(-2)

        query = turn(heads(attention.norm_q(attention.to_q(normed))))
        key, value = turn(heads(attention.norm_k(attention.to_k(normed)))), heads(attention.to_v(normed))
        if keep is not None:
            key, value = key[:, keep], value[:, keep]
        seen.append((key, value))
        if read is not None:
            key, value = torch.cat([key, read[index][0]], 1), torch.cat([value, read[index][1]], 1)
        attended = scaled_dot_product_attention(*(part.transpose(1, 2) for part in (query, key, value)))
        tokens = tokens + attention.to_out[0](attended.transpose(1, 2).flatten(2)) * gate
        if crosses:
            tokens = tokens + block.attn2(block.norm2(tokens), text)
        tokens = tokens + block.ffn(block.norm3(tokens) * (1 + ffn_scale) + ffn_shift) * ffn_gate
        outputs.append(tokens)
    shift, scale = (model.scale_shift_table + embedded.unsqueeze(1)).chunk(2, 1)
    out = model.proj_out(model.norm_out(tokens) * (1 + scale) + shift)
    out = out.unflatten(1, (frames, rows, columns)).unflatten(-1, (2, 2, -1))
    return torch.einsum("bfhwpqc->bcfhpwq", out).flatten(5).flatten(3, 4), seen, outputs


def expected_output(transformer, branch, arguments, references, sample=0, first=None, keep=None, corner=(0, 0)):
    """One sample's output with its list of references (C, h, w), and each reference's tokens after every block."""
    adapted, base = merged(transformer, branch, True), merged(transformer, branch, False)
    one = {name: value[sample : sample + 1] for name, value in arguments.items() if name != "return_dict"}
    first = one["hidden_states"].shape[2] if first is None else first
    no_text, none = torch.zeros(1, 1, D).double(), torch.zeros(1).double()
    runs = [
        written_out(
            adapted,
            reference[None, :, None],
            none,
            no_text,
            first_frame=first + place,
            corner=corner,
            keep=None if keep is None else keep[place],
            crosses=False,
        )
        for place, reference in enumerate(references)
    ]
    read = [
        tuple(torch.cat([run[1][block][part] for run in runs], 1) for part in (0, 1))
        for block in range(len(base.blocks))
    ]
    model = adapted if branch.config.lora_scope == "all" else base
    out = written_out(model, one["hidden_states"], one["timestep"], one["encoder_hidden_states"], read=read)[0]
    return out, [run[2] for run in runs]


@pytest.mark.parametrize("scope", SCOPES)
def test_output_and_features_are_the_definitions(scope):
    transformer, branch = build(scope)
    arguments, references = inputs(), draw(1, C, 2, H, W, seed=5)
    branch.capture = True
    with torch.no_grad():
        with branch.references(references):
            got = transformer(**arguments)[0]
        expected, tokens = expected_output(transformer, branch, arguments, references[0].unbind(1))
    torch.testing.assert_close(got, expected, atol=2e-6, rtol=0)
    assert set(branch.features) == {0, 1}
    for block, features in branch.features.items():
        for place in range(2):
            torch.testing.assert_close(features[0, place], tokens[place][block][0], atol=2e-6, rtol=0)


@pytest.mark.parametrize("scope", SCOPES)
def test_cached_references_give_the_same_output_at_any_step_and_prompt(scope):
    transformer, branch = build(scope)
    references = draw(1, C, 2, H, W, seed=5)
    cache = branch.encode_references(references, frames=F)
    assert cache.tokens == 2 * 16
    assert cache.nbytes == 3 * 2 * cache.tokens * 48 * 8
    for seed in (1, 7):
        with torch.no_grad():
            with branch.references(cache):
                cached = transformer(**inputs(seed=seed))[0]
            with branch.references(references):
                fresh = transformer(**inputs(seed=seed))[0]
        assert torch.equal(cached, fresh)


@pytest.mark.parametrize("scope", SCOPES)
def test_samples_with_different_numbers_of_references_get_what_they_get_alone(scope):
    transformer, branch = build(scope, dtype=torch.float32)
    arguments = inputs(4, dtype=torch.float32)
    references = draw(4, C, 3, H, W, seed=5, dtype=torch.float32)
    mask = torch.tensor([[True, True, True], [True, False, True], [False, False, False], [False, True, False]])
    branch.capture = True
    with branch.references(references, mask), torch.no_grad():
        together = transformer(**arguments)[0]
    features = branch.features[1]
    for sample in range(4):
        one = {name: part[sample : sample + 1] for name, part in arguments.items() if name != "return_dict"}
        real = mask[sample].nonzero()[:, 0]
        with branch.references(references[sample : sample + 1, :, real]), torch.no_grad():
            alone = transformer(**one, return_dict=False)[0]
        torch.testing.assert_close(together[sample : sample + 1], alone, atol=1e-5, rtol=0)
        if len(real):
            torch.testing.assert_close(features[sample, real], branch.features[1][0], atol=1e-5, rtol=0)
        assert features[sample, ~mask[sample]].abs().sum() == 0


def test_dropped_tokens_are_attended_to_by_nobody():
    transformer, branch = build()
    references = draw(2, C, 2, H, W, seed=5)
    tokens = torch.ones(2, 2, 4, 4, dtype=torch.bool)
    tokens[0, 0, 2:], tokens[1, 1, :, 1:3] = False, False
    arguments = inputs(2)
    with branch.references(references, tokens=tokens), torch.no_grad():
        got = transformer(**arguments)[0]
    cache = branch.encode_references(references, tokens=tokens, frames=F)
    assert cache.tokens == 24
    for sample in range(2):
        kept = [tokens[sample, place].flatten() for place in range(2)]
        with torch.no_grad():
            expected, _ = expected_output(
                transformer, branch, arguments, references[sample].unbind(1), sample=sample, keep=kept
            )
        torch.testing.assert_close(got[sample : sample + 1], expected, atol=2e-6, rtol=0)
    with pytest.raises(ra.UserError, match="keeps none of its tokens"):
        branch.references(references, tokens=torch.zeros_like(tokens))


def test_references_may_have_another_size_than_the_video():
    transformer, branch = build()
    arguments, references = inputs(), draw(1, C, 2, 4, 6, seed=5)
    with branch.references(references), torch.no_grad():
        got = transformer(**arguments)[0]
        expected, _ = expected_output(transformer, branch, arguments, references[0].unbind(1))
    torch.testing.assert_close(got, expected, atol=2e-6, rtol=0)
    assert branch.encode_references(references, frames=F).tokens == 2 * 6


def test_a_frame_of_their_own_serves_videos_of_any_length():
    transformer, branch = build(reference_frame=20)
    references = draw(1, C, 2, H, W, seed=5)
    cache = branch.encode_references(references, frames=F)
    for frames in (1, 5):
        arguments = inputs(frames=frames)
        with branch.references(cache), torch.no_grad():
            got = transformer(**arguments)[0]
            expected, _ = expected_output(transformer, branch, arguments, references[0].unbind(1), first=20)
        torch.testing.assert_close(got, expected, atol=2e-6, rtol=0)


@pytest.mark.parametrize("frame", [None, 0, 7])
def test_rows_and_columns_may_begin_where_the_videos_end(frame):
    transformer, branch = build(reference_frame=frame, reference_place="beyond")
    references = draw(1, C, 2, 4, 6, seed=5)
    for height, width in ((8, 8), (4, 12)):
        arguments = inputs(height=height, width=width)
        cache = branch.encode_references(references, frames=F, size=(height, width))
        assert (cache.grid, cache.frames) == ((height // 2, width // 2), F if frame is None else None)
        with torch.no_grad():
            with branch.references(references):
                got = transformer(**arguments)[0]
            with branch.references(cache):
                assert torch.equal(transformer(**arguments)[0], got)
            where = {"first": frame, "corner": cache.grid}
            expected, _ = expected_output(transformer, branch, arguments, references[0].unbind(1), **where)
        torch.testing.assert_close(got, expected, atol=2e-6, rtol=0)


def test_references_may_stand_where_the_models_own_table_has_no_positions():
    """A table of 8 rows and columns; beyond a video of 5 x 4 tokens, a reference of 4 x 6 needs 9 and 10."""
    outputs = []
    for longest in (8, 1024):
        transformer = tiny_transformer(rope_max_seq_len=longest)
        branch = ra.attach(transformer, config(reference_frame=500, reference_place="beyond"), seed=0)
        with branch.references(draw(1, C, 2, 8, 12, dtype=torch.float32)), torch.no_grad():
            outputs.append(transformer(**inputs(height=10, width=8, dtype=torch.float32))[0])
    assert torch.equal(*outputs)


def test_references_after_the_video_are_for_one_length():
    transformer, branch = build()
    cache = branch.encode_references(draw(1, C, 1, H, W), frames=F)
    with pytest.raises(ra.UserError, match="cached for a video of 3 latent frames, this one has 5"):
        with branch.references(cache):
            transformer(**inputs(frames=5))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_without_references_the_output_is_the_bases_bit_for_bit(dtype):
    arguments = inputs(2, dtype=dtype)
    with torch.no_grad():
        expected = tiny_transformer().to(dtype)(**arguments)[0]
        transformer, branch = build(dtype=dtype)
        assert torch.equal(transformer(**arguments)[0], expected)
        with branch.references(draw(2, C, 1, H, W, dtype=dtype)):
            assert not torch.equal(transformer(**arguments)[0], expected)
        with branch.references(None):
            assert torch.equal(transformer(**arguments)[0], expected)
        with branch.references(draw(2, C, 1, H, W, dtype=dtype), torch.zeros(2, 1, dtype=torch.bool)):
            assert torch.equal(transformer(**arguments)[0], expected)
        assert torch.equal(transformer(**arguments)[0], expected)


def test_an_exception_inside_a_pass_leaves_nothing_behind():
    transformer, branch = build(dtype=torch.float32)
    arguments, references = inputs(dtype=torch.float32), draw(1, C, 1, H, W, dtype=torch.float32)
    with torch.no_grad():
        before = transformer(**arguments)[0]
        with branch.references(references):
            with_references = transformer(**arguments)[0]

        def fail(*_):
            raise RuntimeError("in the middle")

        for block in (0, 2):  # of the references' own pass
            handle = transformer.blocks[block].attn1.to_v.register_forward_hook(fail)
            with pytest.raises(RuntimeError, match="in the middle"), branch.references(references):
                transformer(**arguments)
            handle.remove()
        handle = transformer.blocks[1].attn2.to_k.register_forward_hook(fail)  # of the video's
        with pytest.raises(RuntimeError, match="in the middle"), branch.references(references):
            transformer(**arguments)
        handle.remove()
        assert torch.equal(transformer(**arguments)[0], before)
        with branch.references(references):
            assert torch.equal(transformer(**arguments)[0], with_references)


@pytest.mark.parametrize("last", [False, True], ids=["first blocks aligned", "last block aligned"])
def test_every_parameter_of_a_reference_scoped_lora_gets_a_gradient(last):
    transformer, branch = build(align_layers=3 if last else 2)
    branch.capture = True
    with branch.references(draw(1, C, 2, H, W, seed=5)):
        loss = transformer(**inputs())[0].square().mean()
    (loss + sum(part.square().mean() for part in branch.features.values())).backward()
    gradients = {name: parameter.grad for name, parameter in branch.named_parameters()}
    assert all(gradient is not None and gradient.abs().max() > 0 for gradient in gradients.values())
    layers = {name.split(".lora_")[0] for name in gradients}
    block = {"attn1.to_q", "attn1.to_k", "attn1.to_v", "attn1.to_out.0", "ffn.net.0.proj", "ffn.net.2"}
    wanted = {f"blocks.{index}.{name}" for index in (0, 1) for name in block}
    wanted |= {f"blocks.2.{name}" for name in (block if last else {"attn1.to_k", "attn1.to_v"})}
    assert layers == wanted
    assert all(parameter.grad is None for name, parameter in transformer.named_parameters() if "lora_" not in name)


@pytest.mark.parametrize("scope", SCOPES)
def test_detach_leaves_the_transformer_as_it_was(scope):
    plain = tiny_transformer()
    processors = dict(plain.attn_processors)
    with torch.no_grad():
        expected = plain(**inputs(dtype=torch.float32))[0]
    branch = ra.attach(plain, config(scope))
    branch.capture = True
    with branch.references(draw(1, C, 1, H, W, dtype=torch.float32)):
        plain(**inputs(dtype=torch.float32))
    branch.detach()
    assert dict(plain.attn_processors) == processors
    hooks = [part for module in plain.modules() for part in (module._forward_hooks, module._forward_pre_hooks)]
    assert not any(hooks)
    with torch.no_grad():
        assert torch.equal(plain(**inputs(dtype=torch.float32))[0], expected)


def test_bad_references_are_refused_in_one_line():
    transformer, branch = build()
    with pytest.raises(ra.UserError, match="must fit the video's batch and channels"):
        with branch.references(draw(2, C, 1, H, W)):
            transformer(**inputs())
    with pytest.raises(ra.UserError, match=r"tokens must have shape \(B, M, rows, columns\)"):
        branch.references(draw(1, C, 1, H, W), tokens=torch.ones(1, 2, 4, 4, dtype=torch.bool))
    with pytest.raises(ra.UserError, match="joint"):
        ra.attach(tiny_transformer(), ra.RefAlignConfig(attention="joint", r=4, align_layers=1)).encode_references(
            draw(1, C, 1, H, W), frames=F
        )
    cache = branch.encode_references(draw(2, C, 1, H, W), frames=F)
    with pytest.raises(ra.UserError, match="cached for 2 samples, the video's batch has 3"):
        with branch.references(cache):
            transformer(**inputs(3))


def test_one_sample_of_cached_references_serves_a_batch():
    transformer, branch = build()
    references = draw(1, C, 1, H, W, seed=5)
    cache = branch.encode_references(references, frames=F)
    with torch.no_grad():
        with branch.references(cache):
            got = transformer(**inputs(3))[0]
        with branch.references(references.expand(3, -1, -1, -1, -1)):
            expected = transformer(**inputs(3))[0]
    torch.testing.assert_close(got, expected, atol=1e-12, rtol=0)
