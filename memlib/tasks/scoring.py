"""How answers at the scored positions are judged: the loss and the hits."""

from __future__ import annotations

from torch import Tensor
from torch.nn import functional as F


def scored_cross_entropy(logits: Tensor, targets: Tensor, scored: Tensor) -> Tensor:
    """Sum of -log p(target) over the scored positions (a sum, so that pieces of a batch add up).

    logits: [b t v], targets, scored: [b t] -> scalar.
    """
    return F.cross_entropy(logits[scored], targets[scored], reduction="sum")


def correct(logits: Tensor, targets: Tensor, scored: Tensor) -> int:
    """How many scored positions have their target as the most likely token."""
    return int((logits[scored].argmax(-1) == targets[scored]).sum())
