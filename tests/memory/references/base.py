"""The contract of a reference, and the arithmetic that references share.

Axes: b batch, n tokens of a segment, d hidden, h heads, k head width.

A reference loops over rows and tokens. It reads the weights of the memory it is given and shares no code
with it.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import Any

import torch
from torch import Tensor

Row = dict[str, Any]  # the state of one stream


class Reference(ABC):
    """The equations of a memory, built from its options. A state is a list of rows; subclasses treat one.

    variants: options to compare beside the variants of the laws, as changes of the small values.
    """

    variants: tuple[dict[str, Any], ...] = ()

    def __init__(self, config: Any) -> None:
        self.config = config

    def init_state(self, memory: Any, batch: int) -> list[Row]:
        """The state of streams that have seen nothing."""
        return [self.init_row(memory) for _ in range(batch)]

    def read(self, memory: Any, hidden: Tensor, state: list[Row]) -> Tensor:
        """The memory's output for each token; hidden: [b n d] -> [b n d]."""
        return torch.stack([self.read_row(memory, hidden[b], row) for b, row in enumerate(state)])

    def mix(
        self, memory: Any, hidden: Tensor, attended: Tensor, logsumexp: Tensor, state: list[Row]
    ) -> Tensor:
        """For a memory inside the attention; attended: [b h n k], logsumexp: [b h n] -> [b h n k]."""
        rows = zip(hidden, attended, logsumexp, state, strict=True)
        return torch.stack([self.mix_row(memory, *row) for row in rows])

    def write(self, memory: Any, hidden: Tensor, state: list[Row], mask: Tensor) -> list[Row]:
        """The state after a segment; a row in which no token counts keeps what it has."""
        return [
            self.write_row(memory, hidden[b], row, mask[b]) if mask[b].any() else row
            for b, row in enumerate(state)
        ]

    def opened(self, memory: Any, state: list[Row], hidden: Tensor, mask: Tensor) -> list[Row]:
        """The state that the open segment's next tokens see, after its tokens `hidden`: [b p d]."""
        return [self.opened_row(memory, row, hidden[b], mask[b]) for b, row in enumerate(state)]

    @abstractmethod
    def init_row(self, memory: Any) -> Row: ...

    def read_row(self, memory: Any, hidden: Tensor, row: Row) -> Tensor:
        raise NotImplementedError

    def mix_row(self, memory: Any, hidden: Tensor, attended: Tensor, logsumexp: Tensor, row: Row) -> Tensor:
        raise NotImplementedError

    @abstractmethod
    def write_row(self, memory: Any, hidden: Tensor, row: Row, mask: Tensor) -> Row: ...

    def opened_row(self, memory: Any, row: Row, hidden: Tensor, mask: Tensor) -> Row:
        return row

    @abstractmethod
    def named(self, memory: Any, row: Row) -> dict[str, Any]:
        """A row of this reference as named numbers, to compare."""

    @abstractmethod
    def theirs(self, memory: Any, state: Any, b: int) -> dict[str, Any]:
        """Row b of the memory's own state in the same form, without places that are never read."""


def sigmoid(x: Tensor) -> Tensor:
    return 1 / (1 + torch.exp(-x))


def softmax(scores: list[Tensor]) -> list[Tensor]:
    """exp(s_i) / sum_j exp(s_j); the largest is taken off first, so that none overflows."""
    if not scores:
        return []
    top = max(number(score) for score in scores)
    raised = [torch.exp(score - top) for score in scores]
    return [one / sum(raised) for one in raised]


def linear(layer: Any, x: Tensor) -> Tensor:
    """x W + b; x: [d] -> [e]."""
    y = layer.weight @ x
    return y if layer.bias is None else y + layer.bias


def unit(x: Tensor) -> Tensor:
    """x / |x|."""
    return x / torch.sqrt((x * x).sum()).clamp(min=1e-12)


def scalar(x: Tensor) -> Tensor:
    """A parameter that is one number, of shape [] or [1]."""
    return x.sum()


def shifted(shift: Tensor, x: Tensor, before: Tensor) -> Tensor:
    """The token shift: this part of the token before, the rest of the token itself."""
    return shift * before + (1 - shift) * x


def heads_of(x: Tensor, count: int) -> list[Tensor]:
    """A vector cut into its heads."""
    width = len(x) // count
    return [x[h * width : (h + 1) * width] for h in range(count)]


def with_before(hidden: Tensor, mask: Tensor) -> list[tuple[Tensor, Tensor]]:
    """Each token of a segment that counts, with the place before it: zeros at the start and at padding."""
    pairs = []
    for t in range(len(hidden)):
        before = hidden[t - 1] if t > 0 and mask[t - 1] else torch.zeros_like(hidden[t])
        if mask[t]:
            pairs.append((hidden[t], before))
    return pairs


def number(x: Tensor) -> float:
    """A tensor's one value, to decide by: no gradient passes."""
    return float(x.detach())
