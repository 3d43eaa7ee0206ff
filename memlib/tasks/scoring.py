"""Loss and number of correct predictions at the scored positions."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F


def scored_cross_entropy(logits: Tensor, targets: Tensor, scored: Tensor) -> Tensor:
    """Sum of -log p(target) over the scored positions; a sum, so that parts of a batch can be added.

    logits: [b t v], targets, scored: [b t] -> scalar, at least float32.
    """
    wide = torch.promote_types(logits.dtype, torch.float32)
    return F.cross_entropy(logits[scored].to(wide), targets[scored], reduction="sum")


def correct(logits: Tensor, targets: Tensor, scored: Tensor) -> int:
    """Number of scored positions at which the target is the most likely token."""
    return int((logits[scored].argmax(-1) == targets[scored]).sum())
