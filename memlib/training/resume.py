"""What a run continues from besides tensors: its step, its schedule, and a configuration that fits."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from torch import Tensor, nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LambdaLR

from memlib.config import Config, from_dict, to_dict
from memlib.models import MemoryState
from memlib.training.checkpoint import CheckpointError, latest_checkpoint, load_checkpoint
from memlib.training.parallel.ranks import Ranks


def checkpoint_to_resume(folder: Path, resume: bool) -> Path | None:
    """The newest checkpoint of a run, or None; FileExistsError if there is one and resume is false."""
    found = latest_checkpoint(folder)
    if found is not None and not resume:
        raise FileExistsError(
            f"{folder} already holds a run ({found.name}): resume it (--resume) or choose another folder"
        )
    return found


def refill(template: MemoryState, stored: dict[str, Tensor]) -> MemoryState:
    """A carried memory from a checkpoint's tensors, of which empty ones may be left out."""
    empty = {name: tensor for name, tensor in template.named_tensors() if not tensor.numel()}
    return template.load(empty | stored)


def progress_of(step: int, cpu_seconds: float, schedule: LambdaLR, config: Config) -> dict[str, Any]:
    """The progress that `resume_checkpoint` continues from, as JSON."""
    return {
        "step": step,
        "cpu_seconds": cpu_seconds,
        "schedule": {k: v for k, v in schedule.state_dict().items() if k != "lr_lambdas"},
        "config": to_dict(config),
    }


def resume_checkpoint(
    path: Path,
    model: nn.Module,
    optimizer: Optimizer,
    schedule: LambdaLR,
    config: Config,
    fixed: Sequence[str],
    ranks: Ranks | None = None,
) -> tuple[dict[str, Any], dict[str, Tensor] | None]:
    """Load a checkpoint into model, optimizer, schedule and random generators; returns its progress and
    memory tensors, if any; of several processes (`ranks`), each its part.

    Rates and weight decay are those of `config`, not the saved ones. fixed: groups of the configuration that
    must be as saved. `progress["config"]` is completed with the defaults of options that a later version has
    added. Raises CheckpointError.
    """
    progress, _ = load_checkpoint(path)
    progress["config"] = to_dict(from_dict(Config, progress["config"]))
    for group in fixed:
        if progress["config"][group] != to_dict(config)[group]:
            raise CheckpointError(
                f"{path}: saved with another {group} configuration; resume with that run's config.yaml"
            )
    rates = schedule.base_lrs
    decays = [group["weight_decay"] for group in optimizer.param_groups]
    _, memory = load_checkpoint(path, model, optimizer, restore_random=True, ranks=ranks)
    schedule.load_state_dict(progress["schedule"] | {"lr_lambdas": [None] * len(rates), "base_lrs": rates})
    for options, rate, decay, factor in zip(
        optimizer.param_groups, rates, decays, schedule.lr_lambdas, strict=True
    ):
        options.update(initial_lr=rate, lr=rate * factor(progress["step"]), weight_decay=decay)
    return progress, memory
