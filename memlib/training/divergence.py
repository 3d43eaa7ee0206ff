"""Stop a run with a loss or a gradient that is not finite, and say where it went wrong."""

from __future__ import annotations

import math
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from memlib.training.checkpoint import latest_checkpoint


class TrainingDiverged(RuntimeError):
    """The loss or a gradient is not finite; the message names the step, the parameters and remedies."""


def check_finite(
    loss: float,
    norm: float,
    step: int,
    model: nn.Module,
    optimizer: Optimizer,
    max_grad_norm: float,
    folder: Path | None,
) -> None:
    """Raise TrainingDiverged unless loss and gradient norm of a step are finite.

    folder: of the run, for the name of its last checkpoint
    """
    if math.isfinite(loss) and math.isfinite(norm):
        return

    def bad(tensor: Tensor | None) -> bool:
        return tensor is not None and not bool(torch.isfinite(tensor).all())

    named = list(model.named_parameters())
    weights = [name for name, p in named if bad(p)]
    gradients = [name for name, p in named if bad(p.grad)]
    first = f"weights not finite: {weights[0]}" if weights else "all weights are finite"
    if gradients:
        first += f"; {len(gradients)} of {len(named)} gradients are not finite, first {gradients[0]}"
    rates = ", ".join(f"{g['name']} {g['lr']:.1e}" for g in optimizer.param_groups)
    saved = latest_checkpoint(folder) if folder else None
    raise TrainingDiverged(
        f"step {step}: loss {loss}, gradient norm {norm}; {first}. Rates: {rates}. "
        f"Last checkpoint: {saved or 'none'}. "
        f"Try a smaller learning rate, a longer warm-up, or training.max_grad_norm below {max_grad_norm}"
    )
