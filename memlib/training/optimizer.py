"""Parameter groups with separate learning rates, and learning-rate schedules."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LambdaLR

from memlib.config import TrainingConfig


def parameter_groups(model: nn.Module, training: TrainingConfig) -> list[dict[str, Any]]:
    """Groups gates, memory, LoRA and base, each in two: with weight decay (matrices) and without.

    A module says by `parameter_group` where its parameters belong, with those of the modules inside it unless
    these say otherwise. Every parameter is in exactly one group. Gates get `gate_lr` and no weight decay: at
    the weights' rate, and pulled to zero, they stay where they started.
    """
    kind_of: dict[int, str] = {}
    for module in model.modules():  # parents come first: a gate inside a memory ends as a gate
        if kind := getattr(module, "parameter_group", None):
            kind_of.update({id(p): kind for p in module.parameters()})
    rate = {
        "gates": training.gate_lr,
        "memory": training.memory_lr,
        "lora": training.lora_lr,
        "base": training.base_model_lr,
    }
    groups: dict[tuple[str, bool], list[nn.Parameter]] = {}
    for p in model.parameters():
        if p.requires_grad:
            kind = kind_of.get(id(p), "base")
            groups.setdefault((kind, kind != "gates" and p.ndim >= 2), []).append(p)
    return [
        {
            "name": kind,
            "params": params,
            "lr": rate[kind],
            "weight_decay": training.weight_decay if decays else 0.0,
        }
        for (kind, decays), params in groups.items()
    ]


def make_optimizer(model: nn.Module, training: TrainingConfig) -> torch.optim.AdamW:
    """AdamW over the parameter groups."""
    return torch.optim.AdamW(parameter_groups(model, training))


def get_cosine_schedule(
    optimizer: Optimizer, warmup_steps: int, total_steps: int, min_ratio: float = 0.0
) -> LambdaLR:
    """Linear warm-up, then half a cosine down to min_ratio of the full rate at total_steps."""
    return _schedule(
        optimizer, warmup_steps, total_steps, min_ratio, lambda x: 0.5 * (1 + math.cos(math.pi * x))
    )


def get_linear_schedule(
    optimizer: Optimizer, warmup_steps: int, total_steps: int, min_ratio: float = 0.0
) -> LambdaLR:
    """Linear warm-up, then a straight line down to min_ratio of the full rate at total_steps."""
    return _schedule(optimizer, warmup_steps, total_steps, min_ratio, lambda x: 1 - x)


def get_constant_schedule(optimizer: Optimizer, warmup_steps: int) -> LambdaLR:
    """Linear warm-up, then the full rate."""
    return _schedule(optimizer, warmup_steps, warmup_steps + 1, 1.0, lambda x: 1.0)


def make_schedule(optimizer: Optimizer, training: TrainingConfig) -> LambdaLR:
    """The schedule that the configuration names."""
    if training.lr_schedule == "constant":
        return get_constant_schedule(optimizer, training.warmup_steps)
    make = {"cosine": get_cosine_schedule, "linear": get_linear_schedule}[training.lr_schedule]
    return make(optimizer, training.warmup_steps, training.max_steps, training.min_lr_ratio)


def _schedule(
    optimizer: Optimizer, warmup_steps: int, total_steps: int, min_ratio: float, shape: Any
) -> LambdaLR:
    def factor(step: int) -> float:
        if step < warmup_steps:
            return (step + 1) / warmup_steps
        done = (step - warmup_steps) / max(1, total_steps - warmup_steps)
        return min_ratio + (1 - min_ratio) * shape(min(1.0, done))

    return LambdaLR(optimizer, factor)
