"""Alignment schedule and timestep gate against their closed forms."""

import json
import math

import pytest
import torch

from refalign_adapter.alignment.schedule import AlignmentSchedule, timestep_gate
from refalign_adapter.errors import ConfigError, UserError


def test_constant_is_the_default():
    schedule = AlignmentSchedule(weight=0.5)
    assert [schedule.weight_at(step) for step in (0, 1, 10**6)] == [0.5, 0.5, 0.5]
    assert AlignmentSchedule().weight_at(0) == 1.0


def test_warmup_is_linear():
    schedule = AlignmentSchedule(weight=2.0, warmup_steps=4)
    assert [schedule.weight_at(step) for step in range(6)] == [0.0, 0.5, 1.0, 1.5, 2.0, 2.0]


def test_cosine_decays_to_the_final_weight():
    schedule = AlignmentSchedule(weight=1.0, decay="cosine", decay_steps=8, final_weight=0.2)
    for step in range(9):
        expected = 0.2 + 0.8 * math.cos(math.pi * step / 16) ** 2  # the half-angle form
        assert schedule.weight_at(step) == pytest.approx(expected, abs=1e-12)
    assert schedule.weight_at(9) == schedule.weight_at(1000) == pytest.approx(0.2)


def test_cutoff():
    schedule = AlignmentSchedule(weight=0.7, cutoff_step=3)
    assert [schedule.weight_at(step) for step in (2, 3, 4)] == [0.7, 0.0, 0.0]


def test_warmup_cosine_and_cutoff_compose():
    schedule = AlignmentSchedule(2.0, warmup_steps=2, decay="cosine", decay_steps=4, final_weight=1.0, cutoff_step=8)
    values = [schedule.weight_at(step) for step in range(10)]
    half = 0.5 * (1 + math.sqrt(0.5))
    assert values == pytest.approx([0.0, 1.0, 2.0, 1 + half, 1.5, 2 - half, 1.0, 1.0, 0.0, 0.0])


def test_state_goes_through_json_into_another_schedule():
    schedule = AlignmentSchedule(2.0, warmup_steps=2, decay="cosine", decay_steps=4, cutoff_step=9)
    other = AlignmentSchedule()
    other.load_state_dict(json.loads(json.dumps(schedule.state_dict())))
    assert other == schedule
    assert other.weight_at(3) == schedule.weight_at(3)


@pytest.mark.parametrize("state", [{"weight": -1.0}, {"wieght": 1.0}])
def test_a_bad_state_leaves_the_schedule_alone(state):
    schedule = AlignmentSchedule(weight=0.5)
    with pytest.raises(ConfigError, match="weight"):
        schedule.load_state_dict(state)
    assert schedule == AlignmentSchedule(weight=0.5)


def test_all_mistakes_are_reported_at_once():
    with pytest.raises(ConfigError) as error:
        AlignmentSchedule(weight=-1, warmup_steps=-2, decay="linear", cutoff_step=-3)
    assert error.value.problems == [
        "weight must be finite and at least 0, got -1",
        "warmup_steps must be finite and at least 0, got -2",
        "cutoff_step must be finite and at least 0, got -3",
        "decay must be one of ['constant', 'cosine'], got 'linear'",
    ]
    with pytest.raises(ConfigError, match="decay_steps must be at least 1"):
        AlignmentSchedule(decay="cosine")


def test_negative_step_is_refused():
    with pytest.raises(UserError, match="step must be at least 0, got -1"):
        AlignmentSchedule().weight_at(-1)


def test_gate_is_a_power_of_the_timestep():
    sigmas = torch.tensor([0.0, 0.25, 0.5, 1.0])
    assert timestep_gate(sigmas, None).tolist() == [1.0, 1.0, 1.0, 1.0]
    assert timestep_gate(sigmas, 3).tolist() == [0.0, 0.015625, 0.125, 1.0]
    assert timestep_gate(sigmas, 0).tolist() == [1.0, 1.0, 1.0, 1.0]
    with pytest.raises(UserError, match="must be at least 0, got -1"):
        timestep_gate(sigmas, -1)
