"""Sums over the rows of a batch that may lie on several processes.

A module that needs the whole batch for a loss, not only its own rows, sums by `self.batch_sum`. Here it
changes nothing; training on several processes sets it from outside to a sum over their rows.
"""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor

BatchSum = Callable[[Tensor], Tensor]


def own_rows(total: Tensor) -> Tensor:
    """The sum where this process has all rows."""
    return total
