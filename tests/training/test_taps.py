"""Video tokens out of a call against plain hooks that know which pass they see, for both attentions."""

import pytest
import torch
from tiny_models import tiny_transformer

import refalign_adapter as ra
from refalign_adapter.training.taps import video_tokens

ADAPTERS = {
    "joint": {"attention": "joint"},
    "isolated": {"attention": "isolated", "lora_scope": "reference"},
    "isolated, all": {"attention": "isolated", "lora_scope": "all"},
}
FRAMES = {"two frames": 2, "one frame, as many tokens as a reference": 1}
BLOCKS = (0, 2)


def run(adapter, *, frames, checkpointing, references, tap):
    """Loss, gradients, features of the tapped blocks and the transformer; `tap` gives these during the call."""
    transformer = tiny_transformer().double().train()
    if checkpointing:
        transformer.enable_gradient_checkpointing()
    branch = ra.attach(transformer, ra.RefAlignConfig(r=4, align_layers=2, **adapter), seed=0)
    for name, parameter in branch.named_parameters():
        parameter.data = parameter.data.double()
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.1, generator=torch.Generator().manual_seed(1))
    generator = torch.Generator().manual_seed(2)
    draw = lambda *shape: torch.randn(shape, generator=generator, dtype=torch.float64)  # noqa: E731
    video, text, latents = draw(2, 16, frames, 6, 8), draw(2, 5, 32), draw(2, 16, 2, 6, 8)
    mask = torch.tensor([[True, False], [True, False]])  # as many references as videos
    branch.capture = True
    with tap(branch, (frames, 3, 4)) as features, branch.references(latents if references else None, mask):
        prediction = transformer(video, torch.tensor([300.0, 800.0]), text).sample
    loss = prediction.square().mean() + sum(value.pow(3).mean() for value in features.values())
    loss += sum(value.square().mean() for value in branch.features.values())
    loss.backward()
    gradients = {name: parameter.grad for name, parameter in branch.named_parameters()}
    return loss.detach(), gradients, {block: value.detach() for block, value in features.items()}, branch


def ours(branch, grid):
    return video_tokens(branch.transformer, branch.family, BLOCKS, grid)


class by_hand:  # noqa: N801
    """The tokens of each block's last run, which is the video's, before those that references add at the end."""

    def __init__(self, branch, grid):
        self.branch, self.grid, self.features = branch, grid, {}

    def __enter__(self):
        def take(index):
            def hook(block, args, output):
                count = self.grid[0] * self.grid[1] * self.grid[2]
                self.features[index] = output[:, :count].reshape(len(output), *self.grid, -1)

            return hook

        blocks = self.branch.family.blocks(self.branch.transformer)
        self.handles = [blocks[index].register_forward_hook(take(index)) for index in BLOCKS]
        return self.features

    def __exit__(self, *_):
        for handle in self.handles:
            handle.remove()


@pytest.mark.parametrize("adapter", ADAPTERS.values(), ids=ADAPTERS)
@pytest.mark.parametrize("frames", FRAMES.values(), ids=FRAMES)
@pytest.mark.parametrize("references", [True, False], ids=["references", "none"])
def test_values_and_gradients_are_those_of_plain_hooks_with_and_without_checkpointing(adapter, frames, references):
    if not references and adapter.get("lora_scope") == "reference":
        pytest.skip("nothing is trained then")
    options = {"frames": frames, "references": references}
    expected = run(adapter, **options, checkpointing=False, tap=by_hand)
    assert set(expected[2]) == set(BLOCKS)
    for checkpointing in (False, True):
        loss, gradients, features, _ = run(adapter, **options, checkpointing=checkpointing, tap=ours)
        assert torch.equal(loss, expected[0])
        for block in BLOCKS:
            assert features[block].shape == (2, frames, 3, 4, 48)
            assert torch.equal(features[block], expected[2][block])
        for name, gradient in gradients.items():
            wanted = expected[1][name]
            assert (gradient is None) == (wanted is None), name
            if gradient is not None:
                torch.testing.assert_close(gradient, wanted, atol=1e-12, rtol=1e-9, msg=name)


def test_hooks_are_there_while_they_are_needed_alone():
    branch = ra.attach(tiny_transformer(), ra.RefAlignConfig(attention="joint", r=4, align_layers=2), seed=0)
    transformer, blocks = branch.transformer, branch.family.blocks(branch.transformer)

    def count():
        return len(transformer._forward_pre_hooks), [len(block._forward_hooks) for block in blocks]

    before = count()
    with video_tokens(transformer, branch.family, (), (2, 3, 4)):
        assert count() == before

    def fail():
        with video_tokens(transformer, branch.family, (1,), (2, 3, 4)):
            assert count()[1] == [before[1][0], before[1][1] + 1, before[1][2]]
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        fail()
    assert count() == before


def test_what_is_kept_of_a_joint_sequence_holds_no_reference():
    branch = ra.attach(tiny_transformer(), ra.RefAlignConfig(attention="joint", r=4, align_layers=2), seed=0)
    video, text = torch.zeros(1, 16, 2, 6, 8), torch.zeros(1, 5, 32)
    with (
        video_tokens(branch.transformer, branch.family, (1,), (2, 3, 4)) as tokens,
        branch.references(torch.ones(1, 16, 2, 6, 8)),
    ):
        branch.transformer(video, torch.tensor([500.0]), text)
    assert tokens[1].untyped_storage().nbytes() == tokens[1].nbytes
