"""Random numbers that belong to a row of the batch, wherever and in whatever company it is computed.

A generator gives each number to whoever asks next: with other rows beside it, or on another process, a row
would get others. Here a number is a function of (seed, step, row, segment, layer, place), by Philox: the same
for every division of a batch among processes, microbatches and pipeline stages, and when a block is computed
again in the backward pass.

Axes: b batch.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from einops import rearrange
from torch import Tensor, nn

from memlib_kernels.philox import LOW, philox, uniform_from_bits

SITES = 8  # places in a layer where something is drawn
LAYERS = 2**12


@dataclass(frozen=True)
class Noise:
    """keys: [b], one for each row; segment, layer: where the numbers are drawn."""

    keys: Tensor
    segment: int = 0
    layer: int = 0

    @classmethod
    def of(cls, seed: int, batch: int, start: int, rows: Tensor) -> Noise:
        """The noise of a batch, by its number, from token `start` on; rows: [b], their numbers in it."""
        key = (seed & LOW) | batch << 32
        low, high = (philox(key, rows + (start << 24) + (half << 48)) for half in (0, 1))
        return cls(high << 32 | low)

    def at(self, segment: int, layer: int = 0) -> Noise:
        """The noise of a layer in a segment of the step."""
        return replace(self, segment=segment, layer=layer)

    def uniform(self, site: int, like: Tensor) -> Tensor:
        """Numbers in 0 … 1 of a tensor's shape, whose first axis is the batch; site: below 8, which of the
        layer's draws this is."""
        place = (self.segment * LAYERS + self.layer) * SITES + site
        count = torch.arange(like[0].numel(), device=like.device) + (place << 32)
        bits = philox(rearrange(self.keys, "b -> b 1"), count)
        return uniform_from_bits(bits).view(like.shape)


class Dropout(nn.Module):
    """Zero elements with probability p in training, and scale the others by 1 / (1 - p).

    noise: of the rows; None: from torch's generator.
    """

    def __init__(self, p: float) -> None:
        super().__init__()
        self.p = p

    def forward(self, hidden: Tensor, noise: Noise | None = None, site: int = 0) -> Tensor:
        if noise is None or not self.training or not self.p:
            return nn.functional.dropout(hidden, self.p, self.training)
        kept = noise.uniform(site, hidden) >= self.p
        return hidden * kept / (1 - self.p)
