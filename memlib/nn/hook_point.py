"""Named points of a model that a recording can listen to.

A module hands a `HookPoint` a value, or a function that computes it. While nobody listens nothing is
computed, so a value that only a view needs costs nothing in training and never stands in the way of a
fused kernel.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager

from torch import Tensor, nn

Listener = Callable[[Tensor], None]


class HookPoint(nn.Module):
    """A point by its name and the axes of what passes: HookPoint("writer.input", "batch token").

    Names are the protocol between memories and views: docs/widgets.md lists which view needs which. Axes
    are words, the first one is `batch`. A point with a `token` axis is told once for the tokens of each
    call, another one once for each write.
    """

    def __init__(self, name: str, axes: str) -> None:
        super().__init__()
        self.name, self.axes = name, tuple(axes.split())
        self.listeners: list[Listener] = []

    def forward(self, value: Tensor | Callable[[], Tensor]) -> None:
        if self.listeners:
            tensor = value if isinstance(value, Tensor) else value()
            for listener in self.listeners:
                listener(tensor)

    @contextmanager
    def listening(self, listener: Listener) -> Iterator[None]:
        """Inside, a listener gets what passes here."""
        self.listeners.append(listener)
        try:
            yield
        finally:
            self.listeners.remove(listener)

    def extra_repr(self) -> str:
        return f"{self.name}: {' '.join(self.axes)}"
