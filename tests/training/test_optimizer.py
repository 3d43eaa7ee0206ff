"""Which parameter learns how fast, and how the rates change over a run."""

import math

import pytest
import torch

from memlib.models import MemoryTransformer
from memlib.training.optimizer import (
    get_cosine_schedule,
    get_linear_schedule,
    make_optimizer,
    make_schedule,
    parameter_groups,
)

RATES = {
    "training.gate_lr": 0.3,
    "training.memory_lr": 0.2,
    "training.base_model_lr": 0.1,
    "training.weight_decay": 0.05,
}


@pytest.fixture(params=["addressed", "attention"])
def model_and_groups(request, tiny):
    config = tiny(RATES | {"memory.internal.write": request.param, "model.tie_embeddings": True})
    model = MemoryTransformer(config)
    return model, parameter_groups(model, config.training)


def test_every_parameter_is_in_exactly_one_group(model_and_groups):
    model, groups = model_and_groups
    grouped = [id(p) for group in groups for p in group["params"]]
    assert sorted(grouped) == sorted(id(p) for p in model.parameters())


def test_gates_memories_and_the_rest_have_their_own_rates(model_and_groups):
    model, groups = model_and_groups
    settings = {id(p): group for group in groups for p in group["params"]}
    for name, p in model.named_parameters():
        kind = "gates" if "gate." in name else "memory" if "memories." in name else "base"
        rate = {"gates": 0.3, "memory": 0.2, "base": 0.1}[kind]
        assert (settings[id(p)]["name"], settings[id(p)]["lr"]) == (kind, rate), name


def test_weight_decay_is_for_matrices_that_are_not_gates(model_and_groups):
    _, groups = model_and_groups
    for group in groups:
        for p in group["params"]:
            decays = group["name"] != "gates" and p.ndim >= 2
            assert group["weight_decay"] == (0.05 if decays else 0.0)


def test_frozen_parameters_are_left_out(tiny):
    model = MemoryTransformer(tiny())
    model.embedding.requires_grad_(False)
    grouped = [p for group in parameter_groups(model, tiny().training) for p in group["params"]]
    assert not any(p is model.embedding.weight for p in grouped)
    assert len(grouped) == len(list(model.parameters())) - 1


def optimizer(*rates):
    return torch.optim.AdamW([{"params": [torch.nn.Parameter(torch.zeros(1))], "lr": r} for r in rates])


def walk(schedule, steps):
    """The rates of every group before each of the steps."""
    seen = []
    for _ in range(steps):
        seen.append([group["lr"] for group in schedule.optimizer.param_groups])
        schedule.optimizer.step()
        schedule.step()
    return seen


@pytest.mark.parametrize(
    ("make", "shape"),
    [
        (get_cosine_schedule, lambda x: 0.5 * (1 + math.cos(math.pi * x))),
        (get_linear_schedule, lambda x: 1 - x),
    ],
)
def test_schedules_are_their_formulas_for_every_group(make, shape):
    warmup, total, least = 4, 20, 0.1
    seen = walk(make(optimizer(1.0, 0.5), warmup, total, least), total + 5)
    for step, (first, second) in enumerate(seen):
        done = min(1.0, (step - warmup) / (total - warmup))
        want = (step + 1) / warmup if step < warmup else least + (1 - least) * shape(done)
        assert (first, second) == pytest.approx((want, want / 2))
    assert max(first for first, _ in seen) == 1.0 and seen[-1][0] == pytest.approx(least)


@pytest.mark.parametrize(("name", "last"), [("cosine", 0.1), ("linear", 0.1), ("constant", 1.0)])
def test_the_configured_schedule_ends_where_it_should(name, last, tiny):
    config = tiny(
        {"training.lr_schedule": name, "training.max_steps": 10, "training.min_lr_ratio": 0.1} | RATES
    )
    made = make_optimizer(MemoryTransformer(config), config.training)
    rates = walk(make_schedule(made, config.training), 11)
    full = {"gates": 0.3, "memory": 0.2, "base": 0.1}
    want = [full[group["name"]] for group in made.param_groups]
    assert rates[2] == pytest.approx(want)
    assert rates[10] == pytest.approx([last * rate for rate in want])


def test_without_warm_up_the_first_step_has_the_full_rate():
    assert walk(get_cosine_schedule(optimizer(1.0), 0, 10), 1) == [[1.0]]
