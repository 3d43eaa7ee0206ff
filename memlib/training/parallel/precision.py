"""Loss scaling for float16: small gradients are multiplied into its range, and divided again in float32.

The scale doubles after `GROWTH` steps in a row without an overflow and halves at each overflow, whose step is
left out. All processes see the same gradient norm, so they all leave out the same steps.
Source: Micikevicius et al. 2018, arXiv 1710.03740, section 3.2.
"""

from __future__ import annotations

import math
from collections.abc import Iterable

from torch import nn

GROWTH = 2000
LARGEST = 2.0**24


class LossScale:
    """value: what the loss is multiplied by, 1 unless the precision is fp16."""

    def __init__(self, mixed_precision: str) -> None:
        self.used = mixed_precision == "fp16"
        self.value = 2.0**16 if self.used else 1.0
        self.good_steps = 0

    def divide(self, parameters: Iterable[nn.Parameter]) -> None:
        """Give gradients their true size."""
        if self.value != 1:
            for p in parameters:
                if p.grad is not None:
                    p.grad.div_(self.value)

    def overflowed(self, norm: float) -> bool:
        """Whether to leave this step out, by its gradients' norm; then the scale is halved.

        A scale of 1 is not halved: gradients that are not finite then are not the scale's fault.
        """
        if not self.used or (not math.isfinite(norm) and self.value <= 1):
            return False
        if not math.isfinite(norm):
            self.value, self.good_steps = self.value / 2, 0
            return True
        self.good_steps += 1
        if self.good_steps == GROWTH:
            self.value, self.good_steps = min(2 * self.value, LARGEST), 0
        return False
