"""The contract of every memory.

What every memory does:

    init_state(batch_size) -> State          the state of streams that have seen nothing
    read(hidden, state) -> [b n d]           from what earlier segments wrote
    write(hidden, state, mask) -> State      after the segment; visible from the next one on

What only some do, with defaults that do nothing:

    with_open_segment(state, hidden, mask)   lets a read also see the open segment's earlier tokens
    losses(hidden, state, mask)              adds to the training loss when a segment is complete
    share(first)                             takes what layers of one group learn together
    mix(heads, state), close()               read inside the layer's attention instead (`in_attention`)

and what only some ask for, by an attribute of the class:

    uses_ids        read and write also get the token ids of the window (n-gram tables)
    uses_heads      write also gets the layer's own keys and values of the segment (Infini-attention)
    uses_logsumexp  mix also gets the log-sum-exp of the window's scores (`AttentionHeads`)
    starts_silent   a new one reads zero by itself: an adapter's map after it need not start at zero

A memory that brings tokens of its own into the window attends to them in `mix`, through the layer's own
projections (`AttentionHeads.project`).

What a memory remembers is a `State` that goes in and comes out; the module holds parameters only. State
is float32, or float64 with float64 weights: reads get it in the weights' type, writes accumulate in its
own (`zeros`).

Axes: b batch, n tokens, p tokens already in the open segment, d hidden, h heads, k head width.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass
from itertools import chain
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from memlib.memory.state import Layout, State, axes
from memlib.nn.batch_sum import BatchSum, own_rows

if TYPE_CHECKING:
    from memlib.config.memory import MemoryOptions

__all__ = ["AttentionHeads", "Memory", "State", "axes", "zeros"]


def zeros(module: nn.Module, *shape: int, dtype: torch.dtype | None = None) -> Tensor:
    """Zeros for a state: on the module's device, in float32 or the wider type of its parameters.

    Never like a parameter itself: a sharded parameter would make a sharded state.
    """
    weight = next(chain(module.parameters(), module.buffers()), torch.empty(0))
    wide = torch.promote_types(weight.dtype, torch.float32)
    return torch.zeros(shape, dtype=dtype or wide, device=weight.device)


@dataclass(frozen=True)
class AttentionHeads:
    """A layer's attention over the window before W_o, for a memory that takes part in it.

    hidden: [b n d], what the heads were made of; queries, keys, values: [b h n k] of the new tokens,
    without positions; attended: [b h n k], the window's attention with the share of memories before this
    one; logsumexp: [b h n], of each query's scores in the window, None unless a memory of the layer
    `uses_logsumexp`; project(tokens [b m d]) -> keys and values [b h m k] of other tokens, by the layer's own
    projections.
    """

    hidden: Tensor
    queries: Tensor
    keys: Tensor
    values: Tensor
    attended: Tensor
    logsumexp: Tensor | None
    project: Callable[[Tensor], tuple[Tensor, Tensor]]


class Memory(nn.Module, ABC):
    """Something a layer can read and a finished segment is written to; built as Kind(config, hidden_dim).

    The laws every memory obeys (tests/laws holds each registered memory to them): `read` depends on a
    token's own past only, rows of the batch never mix, and `write` becomes visible from the next
    segment on. Without `shares_state` each layer has its own state also where layers share.
    """

    parameter_group = "memory"
    shares_state = True
    uses_ids = False
    uses_heads = False
    uses_logsumexp = False
    starts_silent = False
    batch_sum: BatchSum = staticmethod(own_rows)

    def __init__(self, config: MemoryOptions, hidden_dim: int) -> None:
        super().__init__()
        self.config, self.hidden_dim = config, hidden_dim
        self._layout: Layout | None = None

    @property
    def in_attention(self) -> bool:
        """Whether it takes part in its layer's attention by `mix`; its options decide."""
        return self.config.in_attention

    @property
    def adds_losses(self) -> bool:
        """Whether `losses` adds anything in training; its options decide."""
        return False

    @abstractmethod
    def init_state(self, batch_size: int) -> State:
        """The state of streams that have seen nothing."""

    def read(self, hidden: Tensor, state: Any) -> Tensor:
        """What each token takes from the memory; hidden: [b n d] -> [b n d]."""
        raise NotImplementedError(f"{type(self).__name__} is mixed into the attention, not read")

    @abstractmethod
    def write(self, hidden: Tensor, state: Any, mask: Tensor) -> State:
        """The state after a segment; hidden: [b n d], mask: [b n], true for real tokens."""

    def with_open_segment(self, state: Any, hidden: Tensor, mask: Tensor) -> State:
        """State visible to the next tokens of the open segment; unchanged by default.

        hidden: [b p d], the segment's tokens so far; mask: [b p+n], real tokens among these and the next n.
        """
        return state

    def losses(self, hidden: Tensor, state: Any, mask: Tensor) -> dict[str, Tensor]:
        """What a complete segment adds to the training loss, by name, before it is written.

        Of the whole batch: sums over rows go through `batch_sum`.
        """
        return {}

    def share(self, first: Memory) -> None:
        """Take what layers of one group learn together from the group's first layer; by default nothing."""

    def mix(self, heads: AttentionHeads, state: Any) -> Tensor:
        """The heads' attention with the memory's share in it: [b h n k]."""
        raise NotImplementedError(f"{type(self).__name__} is read, not mixed into the attention")

    def close(self) -> None:
        """Shut the memory out of the attention for good (law L5)."""
        raise NotImplementedError(f"{type(self).__name__} is shut by the block's fusion")

    def check_state(self, state: object, name: str) -> None:
        """Raise ValueError unless a state is of this kind and of these sizes."""
        if self._layout is None:
            self._layout = self.init_state(1).layout
        self._layout.check(state, name)
