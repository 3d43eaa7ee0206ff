"""What a model remembers between two calls, and what a call returns.

Axes: b batch (independent streams), t tokens of a call, n tokens of a segment, p tokens already in the
open segment, d hidden, h heads, k head width, v vocabulary.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any, Self

import torch
from torch import Tensor

from memlib.memory.state import State, axes


@dataclass(frozen=True)
class Window(State):
    """The open segment: p < n tokens that have been read and not yet written.

    keys, values: per layer [b h p k]; hidden: per memory layer [b p d]; mask: [b p], false for padding;
    ids: [b p].
    """

    keys: tuple[Tensor, ...] = axes("batch head token feature")
    values: tuple[Tensor, ...] = axes("batch head token feature")
    hidden: tuple[Tensor, ...] = axes("batch token feature")
    mask: Tensor = axes("batch token")
    ids: Tensor = axes("batch token")

    @property
    def length(self) -> int:
        return self.mask.shape[1]

    def token_counts(self) -> Iterator[tuple[str, int, int]]:
        """(name, its tokens, the tokens it should have) of each tensor: those of the open segment."""
        for name, tensor, labels in self.labelled_tensors():
            yield name, tensor.shape[labels.index("token")], self.length

    @property
    def shape(self) -> tuple[int, ...]:
        """Token counts of all tensors; rows of equal shape can share a batch."""
        return tuple(tokens for _, tokens, _ in self.token_counts())

    def emptied(self) -> Window:
        """The window of the next segment, before its first token."""

        def none(tensor: Tensor) -> Tensor:
            return tensor[:, :, :0] if tensor.ndim == 4 else tensor[:, :0]

        return self.map(none)


@dataclass(frozen=True)
class MemoryState(State):
    """All that a model remembers of its streams: its memories' states and the open window."""

    memories: tuple[State, ...]
    window: Window

    def reset(self, rows: Tensor, fresh: tuple[State, ...]) -> Self:
        """The same state, but some rows have fresh memories and nothing in the window; rows: [b]."""
        return replace(
            self,
            memories=tuple(old.where(~rows, new) for old, new in zip(self.memories, fresh, strict=True)),
            window=self.window.where(~rows, self.window.map(torch.zeros_like)),
        )

    def load(self, tensors: Mapping[str, Tensor]) -> Self:
        """`State.load`; also takes the names that version 0.1 wrote: `banks` for `memories`, no ids."""
        named = {
            "memories." + name.removeprefix("banks.") if name.startswith("banks.") else name: tensor
            for name, tensor in tensors.items()
        }
        if "window.mask" in named and "window.ids" not in named:
            named["window.ids"] = torch.zeros_like(named["window.mask"], dtype=torch.int64)
        return super().load(named)


@dataclass(frozen=True)
class ModelOutput:
    """What a forward pass returns, by attribute or by key: `outputs.logits`, `outputs["logits"]`.

    logits: [b t v]; loss: scalar or None; memory_state: what to pass to the next call;
    router_losses: the routers' auxiliary losses by name, each times its coefficient and averaged over
    layers and the segments completed in this call; training adds them. Empty without a router.
    """

    logits: Tensor
    memory_state: MemoryState
    loss: Tensor | None
    router_losses: dict[str, Tensor]

    def __getitem__(self, key: str) -> Any:
        if key not in self.keys():
            raise KeyError(f"{key!r}: the output has {', '.join(self.keys())}")
        return getattr(self, key)

    def keys(self) -> list[str]:
        return ["logits", "memory_state", "loss", "router_losses"]

    def __iter__(self) -> Iterator[str]:
        return iter(self.keys())
