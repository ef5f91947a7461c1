"""The simulated step against the same step run for real on the CPU, and against closed forms."""

import pytest
import torch
from tiny_models import tiny_vae
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from refalign_adapter.alignment.reference.allocations import AllocatedLoss
from refalign_adapter.alignment.reference.loss import reference_alignment_loss
from refalign_adapter.estimate import kernels
from refalign_adapter.estimate.live_bytes import LiveBytes, bytes_of
from refalign_adapter.estimate.simulate import build_step, simulate_encoding, simulate_step

PAPERS_WAY = ("adapter.attention=joint", "adapter.lora_scope=all", "dropout={}")
ISOLATED = ("adapter.attention=isolated", "adapter.lora_scope=reference")
CASES = {
    "joint": (),
    "isolated": ISOLATED,
    "isolated, all": ("adapter.attention=isolated", "adapter.lora_scope=all"),
    "checkpointed": (*ISOLATED, "gradient_checkpointing=true"),
    "joint, checkpointed": ("gradient_checkpointing=true",),
    "accumulating batches of 2": ("train_batch_size=2", "gradient_accumulation_steps=2"),
    "small references": (*ISOLATED, "adapter.reference_scale=0.5"),
    "references of their own size": (*ISOLATED, "adapter.reference_size=[32, 64]", "adapter.reference_place=beyond"),
    "clean references": ("adapter.reference_timestep=clean",),
    "teacher's own grid": (*ISOLATED, "data.teacher_grid=native"),
    "gated": (*ISOLATED, "alignment.timestep_gate=3"),
    "no alignment": (*ISOLATED, "alignment.weight=0"),
}


def on_the(device, step):
    """The same step with memory."""
    step.to_empty(device=device)
    for parameter in step.parameters():
        nn.init.normal_(parameter, std=0.02)
    return step


@pytest.mark.parametrize("case", CASES)
def test_the_simulation_counts_what_the_same_step_takes_on_the_cpu(setting_of, monkeypatch, case):
    monkeypatch.setattr(kernels, "FUSED", {})  # the CPU has none of a GPU's kernels
    setting = setting_of(*CASES[case])
    arguments = (setting.recipe, setting.shapes, 3)
    simulated = simulate_step(build_step(setting.recipe, setting.models, torch.float32), *arguments)
    step = on_the("cpu", build_step(setting.recipe, setting.models, torch.float32))
    with sdpa_kernel(SDPBackend.MATH):  # all that meta has
        real = simulate_step(step, *arguments, device="cpu")
    on_the_host = setting.recipe.train_batch_size * 3 * (1 + 8)  # mask and subjects, which never are on a GPU
    assert real.peak - on_the_host == simulated.peak > 100_000
    gradients = [parameter.grad for parameter in step.parameters() if parameter.requires_grad]
    assert all(gradient is not None for gradient in gradients)


def test_checkpointing_keeps_the_inputs_of_every_block(setting_of):
    """What waits in host memory is B x tokens x width of every block, in both passes, pinned in powers of two."""
    overrides = (*ISOLATED, "gradient_checkpointing=true", "offload_activations=true", "mixed_precision=bf16")
    setting = setting_of(*overrides, "train_batch_size=2", "data.dtype=bf16")
    step = build_step(setting.recipe, setting.models, torch.bfloat16)
    memory = simulate_step(step, setting.recipe, setting.shapes, 3, torch.bfloat16)
    width, blocks = 48, 3
    video = 2 * (2 * 2 * 3) * width * 2  # samples x tokens of 2 latent frames of 4 x 6 x width x bytes
    references = (2 * 3) * (2 * 3) * width * 2  # each of 6 references alone
    assert memory.host == blocks * (pinned(video) + pinned(references))


def pinned(size):
    return 1 << (size - 1).bit_length()


@pytest.mark.slow
def test_checkpointing_and_offloading_need_less(wan, wan_setting):
    def peak(*overrides):
        short = (f"pretrained_model_name_or_path={wan / 'short'}", "adapter.align_layers=3")
        setting = wan_setting("1.3b", *PAPERS_WAY, *short, *overrides)
        step = build_step(setting.recipe, setting.models, torch.bfloat16)
        return simulate_step(step, setting.recipe, setting.shapes, 2, torch.bfloat16).peak

    kept, checkpointed, offloaded = peak("gradient_checkpointing=false"), peak(), peak("offload_activations=true")
    inputs = 6 * (32_760 + 2 * 1560) * 1536 * 2  # of every block, in bf16
    assert kept > 3 * checkpointed
    assert checkpointed - offloaded == pytest.approx(inputs, rel=0.25)


@pytest.mark.gpu
@pytest.mark.parametrize("overrides", [(), PAPERS_WAY])
def test_the_simulation_is_near_what_a_gpu_takes(wan, wan_setting, overrides):
    short = (f"pretrained_model_name_or_path={wan / 'short'}", "adapter.align_layers=3")
    setting = wan_setting("1.3b", *short, *overrides)
    arguments = (setting.recipe, setting.shapes, 2)
    step = build_step(setting.recipe, setting.models, torch.bfloat16)
    simulated = simulate_step(step, *arguments, torch.bfloat16).peak
    step = on_the("cuda", build_step(setting.recipe, setting.models, torch.bfloat16))
    step.forward = torch.autocast("cuda", torch.bfloat16)(step.forward)
    for _ in range(2):  # libraries take their work space the first time
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        simulate_step(step, *arguments, device="cuda")
        peak = torch.cuda.max_memory_allocated() - before
    assert peak == pytest.approx(simulated, rel=0.1)


def test_the_stand_in_for_the_alignment_loss_keeps_what_the_loss_does():
    def kept_and_peak(loss, device):
        student = torch.randn(2, 3, 600, 64, device=device, requires_grad=True)
        target = torch.randn(2, 3, 600, 64, device=device)
        with LiveBytes(device) as live:
            total = loss(student, target)
            kept = live.live
            total.backward()
        assert student.grad.shape == student.shape
        return kept, live.peak

    def real(student, target):
        with torch.backends.mkldnn.flags(enabled=False):  # its layouts are the CPU's own
            return reference_alignment_loss(student, target).total

    kept, peak = kept_and_peak(AllocatedLoss.apply, "meta")
    real_kept, real_peak = kept_and_peak(real, "cpu")
    assert kept == pytest.approx(real_kept, abs=200)  # single numbers
    assert kept == pytest.approx(2 * 3 * 600 * 64 * 4, abs=200)
    assert 0.9 * peak < real_peak < 1.1 * peak


def test_the_vae_is_simulated_as_it_runs_on_the_cpu(setting_of, monkeypatch):
    monkeypatch.setattr(kernels, "FUSED", {})
    setting = setting_of()
    simulated = simulate_encoding(setting.models, setting.options)
    pipe = setting.models.encoders.pipe
    assert bytes_of(pipe.vae.parameters()) == bytes_of(tiny_vae().parameters())
    pipe.vae = tiny_vae()
    with LiveBytes("cpu") as live, sdpa_kernel(SDPBackend.MATH), torch.no_grad():
        setting.models.family.encode_video(pipe, torch.empty(1, 3, 5, 32, 48))
    assert simulated == live.peak
