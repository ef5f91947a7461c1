"""Optimizers by name, their groups, and schedules that are functions of the step."""

import math

import bitsandbytes
import pytest
import torch
from torch import nn

from refalign_adapter.errors import UserError
from refalign_adapter.recipes.optimizers import build_optimizer, build_scheduler, find_optimizer


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("adamw8bit", bitsandbytes.optim.AdamW8bit),
        ("AdamW_8bit", bitsandbytes.optim.AdamW8bit),
        ("paged_adamw8bit", bitsandbytes.optim.PagedAdamW8bit),
        ("adamw", torch.optim.AdamW),
        ("lion8bit", bitsandbytes.optim.Lion8bit),
        ("sgd", torch.optim.SGD),
    ],
)
def test_names(name, expected):
    assert find_optimizer(name) is expected


@pytest.mark.parametrize("name", ["lbfgs", "adamw16bit", "GlobalOptimManager"])
def test_unknown_and_unsuitable_names(name):
    with pytest.raises(UserError, match="^optimizer: "):
        find_optimizer(name)


def parts():
    return [nn.Parameter(torch.ones(64, 8))], [nn.Parameter(torch.ones(32, 8))]


def test_groups_have_their_own_rates_and_the_recipes_numbers(make_recipe):
    recipe = make_recipe(
        "projector_learning_rate=3e-4", "adam_beta2=0.95", "adam_weight_decay=0.02", "adam_epsilon=1e-7"
    )
    optimizer = build_optimizer(recipe, *parts())
    lora, heads = optimizer.param_groups
    assert (lora["lr"], heads["lr"]) == (1e-3, 3e-4)
    assert (lora["betas"], lora["weight_decay"], lora["eps"]) == ((0.9, 0.95), 0.02, 1e-7)
    assert len(build_optimizer(recipe, parts()[0], ()).param_groups) == 1


@pytest.mark.parametrize("name", ["adafactor", "ademamix", "rprop", "muon", "lion8bit"])
def test_arguments_that_mean_something_else_keep_their_defaults(make_recipe, name):
    lora, heads = parts()
    optimizer = build_optimizer(make_recipe(f"optimizer={name}", "adam_epsilon=1e-7"), lora, heads)
    lora[0].grad = torch.ones_like(lora[0])
    optimizer.step()
    assert not torch.equal(lora[0], torch.ones_like(lora[0]))
    expected = {"adafactor": (None, 1e-3), "muon": 1e-7, "ademamix": 1e-7}
    assert optimizer.param_groups[0].get("eps") == expected.get(name, optimizer.param_groups[0].get("eps"))


def test_min_8bit_size_decides_which_state_is_8_bit(make_recipe):
    kinds = {}
    for size in (16, 4096):
        lora, heads = parts()
        optimizer = build_optimizer(make_recipe(f"min_8bit_size={size}"), lora, heads)
        lora[0].grad = torch.ones_like(lora[0])
        optimizer.step()
        kinds[size] = optimizer.state[lora[0]]["state1"].dtype
    assert kinds == {16: torch.uint8, 4096: torch.float32}


@pytest.mark.parametrize("name", ["lion8bit", "paged_adamw8bit", "rmsprop", "ademamix8bit", "sgd", "muon"])
def test_others_by_the_same_route_make_a_step(make_recipe, name):
    lora, heads = parts()
    optimizer = build_optimizer(make_recipe(f"optimizer={name}"), lora, heads)
    for parameter in (*lora, *heads):
        parameter.grad = torch.ones_like(parameter)
    optimizer.step()
    assert float(lora[0].detach().max()) < 1


SHAPES = {
    "constant": lambda step: 1.0,
    "constant_with_warmup": lambda step: min(1.0, step / 4),
    "cosine": lambda step: step / 4 if step < 4 else (1 + math.cos(math.pi * (step - 4) / 16)) / 2,
    "linear": lambda step: step / 4 if step < 4 else (20 - step) / 16,
}


@pytest.mark.parametrize("name", SHAPES)
def test_schedule_follows_its_formula_and_continues_at_any_step(make_recipe, name):
    recipe = make_recipe(
        "optimizer=adamw", "max_train_steps=20", f"lr_scheduler={name}", "projector_learning_rate=1e-4",
        f"lr_warmup_steps={0 if name == 'constant' else 4}",
    )  # fmt: skip
    optimizer = build_optimizer(recipe, *parts())
    scheduler = build_scheduler(recipe, optimizer)
    rates = []
    for step in range(20):
        rates.append(scheduler.get_last_lr())
        assert rates[-1] == pytest.approx([1e-3 * SHAPES[name](step), 1e-4 * SHAPES[name](step)])
        optimizer.step()
        scheduler.step()
    for step in (1, 7):
        fresh = build_optimizer(recipe, *parts())
        resumed = build_scheduler(recipe, fresh, step)
        assert resumed.get_last_lr() == rates[step]
        assert [group["lr"] for group in fresh.param_groups] == rates[step]
        fresh.step()
        resumed.step()
        assert resumed.get_last_lr() == rates[step + 1]
