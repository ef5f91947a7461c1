"""A real run on random batches: what it trains is what the estimate counts."""

import pytest
import torch
from accelerate import Accelerator

from refalign_adapter.estimate.live_bytes import bytes_of, module_bytes
from refalign_adapter.estimate.measure import RandomData, measure_steps
from refalign_adapter.estimate.memory import training_memory
from refalign_adapter.training.interrupt import SignalWatch
from refalign_adapter.training.loop import optimizer_step
from refalign_adapter.training.setup import build_run
from refalign_adapter.training.tracking import LossMeter


@pytest.mark.parametrize("overrides", [(), ("adapter.attention=isolated", "adapter.lora_scope=reference")])
def test_a_run_holds_the_bytes_that_are_estimated(setting_of, tmp_path, overrides):
    setting = setting_of("ema_decay=0.9", "optimizer=adamw", "data.max_references=2", *overrides)
    recipe, shapes = setting.recipe, setting.shapes
    accelerator = Accelerator(cpu=True)
    run = build_run(recipe, accelerator, tmp_path, RandomData(shapes, accelerator.device))
    batch = shapes.batch(1, setting.references, "cpu")
    values = optimizer_step(run, iter([batch]), LossMeter(run.module.logs), SignalWatch())
    assert values is not None
    assert values["train/alignment_weight"] == 1.0

    parts = {part.name: part.bytes for part in training_memory(setting).gpu.parts}
    trained = run.trained
    assert parts["LoRA"] == bytes_of(parameter for _, parameter in trained.branch.named_parameters())
    (objective,) = trained.objectives
    assert parts["projectors"] == module_bytes(objective)
    assert trained.ema is not None
    assert parts["moving average"] == bytes_of(trained.ema.shadow_params)
    states = [value for state in trained.optimizer.state.values() for value in state.values()]
    assert parts["optimizer state (adamw)"] == bytes_of(value for value in states if value.ndim)
    base = module_bytes(run.module.transformer) - parts["LoRA"]
    assert sum(size for name, size in parts.items() if name.startswith("base, ")) == base


def test_steps_are_measured_without_a_cache(setting_of, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    measured = measure_steps(setting_of("train_batch_size=2", "gradient_accumulation_steps=2"), 3)
    assert measured.steps == 3
    assert measured.seconds > 0
    assert (measured.peak is None) is not torch.cuda.is_available()
    assert not list(tmp_path.iterdir())
