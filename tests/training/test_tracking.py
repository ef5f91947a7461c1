"""Means over batches of unequal size, and the log that a resumed run continues."""

import json

import pytest
import torch
from accelerate import Accelerator

from refalign_adapter.batch import StepOutput
from refalign_adapter.training.tracking import LossMeter, RunLog, read_metrics

COSINES = ("cosine/block_0", "cosine/block_2")


def output(loss, flow, positive=None, negative=None, cosines=(), references=0):
    logs = {"positive": positive, "negative": negative, **dict(zip(COSINES, cosines, strict=False))}
    told = {name: torch.tensor(value) for name, value in logs.items() if value is not None}
    counts = dict.fromkeys(COSINES, references)
    return StepOutput(torch.tensor(loss, requires_grad=True), torch.tensor(flow), told, counts)


def test_means_weigh_samples_alike_and_other_logs_by_their_own_counts():
    meter = LossMeter(("positive", "negative", *COSINES))
    meter.add(output(3.0, 1.0, 2.0, 0.5, (0.5, -0.5), references=2), 3)
    meter.add(output(3.0, 1.0, 2.0, 0.5, (0.8, 0.1), references=4), 0)
    meter.add(output(7.0, 5.0, 0.0, 0.0), 1)  # no references: counts 0 in the terms, not in the cosine
    assert meter.reduce(Accelerator()) == pytest.approx(
        {
            "loss": 4.0,
            "flow": 2.0,
            "positive": 1.5,
            "negative": 0.375,
            "cosine/block_0": 0.7,
            "cosine/block_2": -0.1,
        }
    )
    meter.add(output(1.0, 1.0), 2)
    assert meter.reduce(Accelerator()) == {"loss": 1.0, "flow": 1.0}
    assert meter.reduce(Accelerator()) == {}


def test_log_is_cut_where_a_run_is_taken_up(tmp_path):
    accelerator = Accelerator()
    log = RunLog(accelerator, tmp_path, 0)
    for step in (1, 2, 3):
        log.write(step, {"train/loss": float(step)})
    log.close()
    with (tmp_path / "metrics.jsonl").open("a") as file:
        file.write('{"step": 4, "tr')
    assert len(read_metrics(tmp_path / "metrics.jsonl")) == 3
    log = RunLog(accelerator, tmp_path, 2)
    log.write(3, {"train/loss": 9.0})
    log.close()
    rows = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert [(row["step"], row["train/loss"]) for row in rows] == [(1, 1.0), (2, 2.0), (3, 9.0)]
    RunLog(accelerator, tmp_path, 0).close()
    assert read_metrics(tmp_path / "metrics.jsonl") == []
    assert read_metrics(tmp_path / "none.jsonl") == []
