"""What references and their alignment cost in training: plain LoRA training, joint and isolated attention.

    python benchmarks/training.py                        # a small Wan on the CPU: ten minutes
    python benchmarks/training.py --frames 21            # a quarter of the video, two minutes
    python benchmarks/training.py --device cuda --preset 1.3b --checkpointing
    python benchmarks/training.py --device cuda --preset 14b --checkpointing --nf4

One optimizer step each: forward, backward, AdamW in 8 bits (of bitsandbytes; torch's where that is missing). Random
weights, shared by all; random latents, text and teacher features, as they come from a cache. Plain LoRA training has
the same LoRA as joint and no references. With alignment all blocks but the last have a projector. No condition is
dropped, so that every step is a full one. Every round times all steps there and back, ratios are medians over rounds.
"""

from __future__ import annotations

import gc
from collections.abc import Callable
from dataclasses import dataclass
from typing import Annotated, Any

import _models as models
import _setting as options
import torch
import typer
from _measure import Times, peak_bytes, time_in_turn
from _report import MIB, Bar, print_bars, print_table, report, start
from _setting import Setting
from torch import Tensor, nn

import refalign_adapter as ra
from refalign_adapter.alignment.projector import Projectors
from refalign_adapter.alignment.reference.objective import ReferenceAlignment
from refalign_adapter.batch import REFERENCE, Batch
from refalign_adapter.branch.reference_branch import ReferenceBranch
from refalign_adapter.errors import UserError
from refalign_adapter.recipes.optimizers import find_optimizer
from refalign_adapter.training.step import StepOptions, TrainingStep

TEACHER, TEACHER_WIDTH, TEACHER_PATCH = "teacher", 768, 14
PLAIN = "plain LoRA"
VARIANTS = {
    "joint": ("joint", "all"),
    "isolated/reference": ("isolated", "reference"),
    "isolated/all": ("isolated", "all"),
}
"""Name -> attention and scope."""
ALIGNED = "{} + alignment"
COLUMNS = ("", "step s", "/ plain", "/ joint", "alignment adds", "step MiB", "trained MiB")


@dataclass
class Case:
    """One kind of training.

    Attributes:
        module: transformer, branch and, with alignment, projectors.
        optimizer: of its LoRA and projectors.
        batch: what every step sees.
        setting: see `Setting`.
    """

    module: TrainingStep
    optimizer: torch.optim.Optimizer
    batch: Batch
    setting: Setting

    def step(self) -> None:
        """Forward, backward, update."""
        low = self.setting.dtype != torch.float32
        with torch.autocast(self.setting.device, self.setting.dtype, enabled=low):
            output = self.module(
                self.batch,
                {name: text[0] for name, text in self.batch.text.items()},
                generator=torch.Generator().manual_seed(0),
                weights={REFERENCE: 1.0},
                drop_conditions=False,
            )
        output.loss.backward()
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)

    def trained_bytes(self) -> int:
        """Of LoRA, projectors and, once a step was made, the optimizer's state."""
        parameters = [parameter for group in self.optimizer.param_groups for parameter in group["params"]]
        state = [value for item in self.optimizer.state.values() for value in item.values()]
        return sum(tensor.nbytes for tensor in (*parameters, *state) if isinstance(tensor, Tensor))


def random_batch(setting: Setting, transformer: Any, references: Tensor, tokens: Tensor | None) -> Batch:
    """A batch as the data set makes it.

    Args:
        setting: see `Setting`.
        transformer: that takes it.
        references: (B, C, M, h, w), M from 0.
        tokens: (B, M, rows, columns) bool, those that are kept; None: all.
    """
    batch, device = setting.batch, setting.device
    count = references.shape[2]
    grid = tuple(side * setting.size.pixels // TEACHER_PATCH for side in references.shape[3:])
    return Batch(
        keys=[str(index) for index in range(batch)],
        latents=models.random_video(setting),
        text=models.random_text(setting, transformer),
        references=references,
        mask=torch.ones(batch, count, dtype=torch.bool, device=device),
        subjects=torch.arange(count, device=device).expand(batch, -1),
        targets={REFERENCE: {TEACHER: torch.randn(batch, count, *grid, TEACHER_WIDTH, device=device)}},
        tokens=tokens,
    )


def build_cases(setting: Setting) -> dict[str, Case]:
    """All cases on one copy of the base's weights."""
    torch.manual_seed(0)
    base = models.random_transformer(setting)
    if setting.checkpointing:
        base.enable_gradient_checkpointing()
    full, _ = models.random_references(setting, economical=False)
    batches = {
        "joint": random_batch(setting, base, full, None),
        "isolated": random_batch(setting, base, *models.random_references(setting, economical=True)),
    }
    cases = {}
    for name, (attention, scope) in VARIANTS.items():
        branch = _attach(models.sharing_weights(base), attention, scope, setting)
        if name == "joint":
            cases[PLAIN] = _case(branch, None, random_batch(setting, base, full[:, :, :0], None), setting)
        projectors = Projectors(branch.align_blocks, setting.size.dim, {TEACHER: TEACHER_WIDTH}).to(setting.device)
        cases[name] = _case(branch, None, batches[attention], setting)
        cases[ALIGNED.format(name)] = _case(branch, projectors, batches[attention], setting)
    return cases


def _attach(transformer: Any, attention: str, scope: str, setting: Setting) -> ReferenceBranch:
    economical = {"reference_scale": setting.scale, "drop_background": setting.dropped > 0}
    config = ra.RefAlignConfig(
        attention=attention,
        lora_scope=scope,
        r=setting.rank,
        lora_alpha=setting.rank,
        align_layers=setting.size.layers - 1,
        max_sequence_length=setting.size.text_tokens,
        **economical if attention == "isolated" else {},
    )
    return ra.attach(transformer, config, seed=0)


def _case(branch: ReferenceBranch, projectors: Projectors | None, batch: Batch, setting: Setting) -> Case:
    parameters = [parameter for _, parameter in branch.named_parameters()]
    objectives = [] if projectors is None else [ReferenceAlignment(projectors)]
    module = TrainingStep(branch, objectives, StepOptions()).train()
    parameters += list(module.objectives.parameters())
    return Case(module, optimizer_of(parameters), batch, setting)


def optimizer_of(parameters: list[nn.Parameter]) -> torch.optim.Optimizer:
    """8-bit AdamW, or torch's where bitsandbytes is missing."""
    try:
        cls = find_optimizer("adamw8bit")
    except UserError:
        cls = find_optimizer("adamw")
    return cls(parameters, lr=1e-4)  # type: ignore[call-arg]


@dataclass
class Result:
    """All that was measured.

    Attributes:
        times: seconds of every step.
        peaks: peak bytes of every step beyond weights, optimizer state and batch.
        trained: bytes of LoRA, projectors and optimizer state.
        base: bytes of the base's weights.
        optimizer: its name.
    """

    times: Times
    peaks: dict[str, int]
    trained: dict[str, int]
    base: int
    optimizer: str

    def added_by_alignment(self, name: str) -> float:
        """What projectors and alignment loss add to a step, as a share of the step without them."""
        return self.times.ratio(ALIGNED.format(name), name) - 1

    def bars(self) -> list[Bar]:
        """What training has to reach."""
        bars = [Bar(f"{name}: alignment adds to a step", self.added_by_alignment(name), 0.05) for name in VARIANTS]
        for name in VARIANTS:
            if name != "joint":
                aligned = ALIGNED.format(name), ALIGNED.format("joint")
                bars.append(Bar(f"{name}: step / joint step", self.times.ratio(name, "joint"), 1.0))
                bars.append(Bar(f"{name}: the same, with alignment", self.times.ratio(*aligned), 1.0))
        return bars

    def to_dict(self) -> dict[str, Any]:
        """JSON."""
        return {
            "seconds": dict(self.times),
            "peak_bytes": self.peaks,
            "trained_bytes": self.trained,
            "base_bytes": self.base,
            "optimizer": self.optimizer,
            "added_by_alignment": {name: self.added_by_alignment(name) for name in VARIANTS},
            "bars": [bar.to_dict() for bar in self.bars()],
        }


def measure(setting: Setting) -> Result:
    """Build and measure; memory last, when the optimizers have their states."""
    cases = build_cases(setting)
    works: dict[str, Callable[[], None]] = {name: case.step for name, case in cases.items()}
    times = time_in_turn(works, setting.rounds, setting.device)
    gc.collect()
    peaks = {name: peak_bytes(work, setting.device) for name, work in works.items()}
    trained = {name: case.trained_bytes() for name, case in cases.items()}
    case = cases[PLAIN]
    weights = case.module.transformer.state_dict()  # with what four-bit layers keep besides their parameters
    base = sum(tensor.nbytes for name, tensor in weights.items() if ".lora_" not in name)
    return Result(times, peaks, trained, base, type(case.optimizer).__name__)


def print_result(result: Result) -> None:
    """The table of steps and the bars."""
    rows = []
    for name in result.times:
        aligned = name.endswith(ALIGNED.format(""))
        joint = ALIGNED.format("joint") if aligned else "joint"
        variant = name.removesuffix(ALIGNED.format(""))
        rows.append(
            [
                name,
                f"{result.times.median(name):.3f}",
                f"{result.times.ratio(name, PLAIN):.3f}",
                f"{result.times.ratio(name, joint):.3f}",
                f"{result.added_by_alignment(variant):.1%}" if aligned else "",
                f"{result.peaks[name] / MIB:.0f}",
                f"{result.trained[name] / MIB:.1f}",
            ]
        )
    print_table(f"Training steps with {result.optimizer}", COLUMNS, rows)
    print("step MiB: activations and gradients at their peak; trained MiB: LoRA, projectors, optimizer state")
    print(f"the base's weights: {result.base / MIB:.0f} MiB")
    print_bars(result.bars())


def main(
    preset: options.PresetOption = None,
    dim: options.DimOption = None,
    heads: options.HeadsOption = None,
    layers: options.LayersOption = None,
    ffn: options.FfnOption = None,
    frames: options.FramesOption = None,
    height: options.HeightOption = None,
    width: options.WidthOption = None,
    references: options.ReferencesOption = 3,
    reference_scale: options.ScaleOption = 1.0,
    dropped: options.DroppedOption = 0.0,
    batch: options.BatchOption = 1,
    rank: options.RankOption = 64,
    dtype: options.DtypeOption = None,
    device: options.DeviceOption = "cpu",
    backend: options.BackendOption = None,
    checkpointing: Annotated[bool, typer.Option("--checkpointing", help="Run blocks again in backward.")] = False,
    nf4: Annotated[bool, typer.Option("--nf4", help="Quantise the base's blocks to four bits.")] = False,
    rounds: options.RoundsOption = 3,
    threads: options.ThreadsOption = None,
    json: options.JsonOption = None,
) -> None:
    """Time plain, joint and isolated training steps in turn, each without and with alignment."""
    if threads is not None:
        torch.set_num_threads(threads)
    model = {"dim": dim, "heads": heads, "layers": layers, "ffn": ffn}
    video = {"frames": frames, "height": height, "width": width}
    setting = options.make_setting(
        options.choose_size(preset, device, model=model, video=video),
        references=references,
        scale=reference_scale,
        dropped=dropped,
        batch=batch,
        rank=rank,
        dtype=dtype,
        device=device,
        backend=backend,
        checkpointing=checkpointing,
        nf4=nf4,
        rounds=rounds,
    )
    report(setting, measure, print_result, json)


if __name__ == "__main__":
    start(main)
