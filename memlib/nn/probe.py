"""Named points of a model that a recording can listen to.

A `Probe` passes its input on unchanged. It exists so that `memlib.lab.record` can hook the values the
house wants to see (gates, weights, slots) without flags or return values in the model's code.
"""

from __future__ import annotations

from torch import Tensor, nn


class Probe(nn.Module):
    """The identity, with the axes of what flows through it: `Probe("batch token slot")`.

    Axis names are words, the first one is `batch`. Points with a `token` axis speak once per token of
    the stream, the others once per write.
    """

    def __init__(self, axes: str) -> None:
        super().__init__()
        self.axes = tuple(axes.split())

    def forward(self, value: Tensor) -> Tensor:
        return value

    def extra_repr(self) -> str:
        return " ".join(self.axes)
