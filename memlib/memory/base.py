"""The one contract of everything that remembers.

A memory is three functions. What it remembers is a `State` that goes in and comes out; the module
itself holds parameters only. So detaching, resetting some rows, moving, saving and counting bytes are
written once, here, for every memory.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, fields, replace
from typing import Any, Self

import torch
from einops import rearrange
from torch import Tensor, nn


@dataclass(frozen=True)
class State:
    """Frozen tensors whose first axis is the batch; a field is a Tensor, a State or a tuple of them.

    A subclass only declares its fields. Nothing is changed in place: every method returns a new State.
    """

    def map(self, change: Callable[[Tensor], Tensor]) -> Self:
        """The same structure with `change` applied to every tensor."""
        return replace(self, **{f.name: _map(getattr(self, f.name), change) for f in fields(self)})

    def zip(self, other: Self, change: Callable[[Tensor, Tensor], Tensor]) -> Self:
        """The same structure with `change` applied to every pair of tensors of the two states."""
        pairs = iter(dict(other.named_tensors()).values())
        return self.map(lambda tensor: change(tensor, next(pairs)))

    def named_tensors(self, prefix: str = "") -> Iterator[tuple[str, Tensor]]:
        """(dotted name, tensor) of every tensor, in a fixed order."""
        for f in fields(self):
            yield from _named(getattr(self, f.name), f"{prefix}{f.name}")

    def detach(self) -> Self:
        """The same values, cut off from the graph: where truncated backpropagation ends."""
        return self.map(Tensor.detach)

    def to(self, *args: Any, **kwargs: Any) -> Self:
        """`Tensor.to` for every tensor."""
        return self.map(lambda tensor: tensor.to(*args, **kwargs))

    def clone(self) -> Self:
        return self.map(Tensor.clone)

    def rows(self, index: Tensor) -> Self:
        """The given rows of the batch, in that order; index: [r] integers."""
        return self.map(lambda tensor: tensor.index_select(0, index))

    def join(self, *others: Self) -> Self:
        """One batch of this state's rows and then the others', in that order."""
        named = iter(zip(*(state.named_tensors() for state in (self, *others)), strict=True))
        return self.map(lambda _: torch.cat([tensor for _, tensor in next(named)]))

    def where(self, rows: Tensor, other: Self) -> Self:
        """This state where rows: [b] is true, the other elsewhere."""

        def choose(mine: Tensor, theirs: Tensor) -> Tensor:
            pattern = "b -> b " + "1 " * (mine.ndim - 1)
            return torch.where(rearrange(rows, pattern), mine, theirs)

        return self.zip(other, choose)

    def load(self, tensors: Mapping[str, Tensor]) -> Self:
        """This structure with the named tensors' values, as `named_tensors` names them."""
        names = [name for name, _ in self.named_tensors()]
        if missing := [name for name in names if name not in tensors]:
            raise KeyError(
                f"memory state lacks {missing[0]!r} ({len(missing)} of {len(names)} tensors missing); "
                "it was saved by a model with another configuration"
            )
        values = iter(names)
        return self.map(lambda _: tensors[next(values)])

    @property
    def nbytes(self) -> int:
        return sum(tensor.numel() * tensor.element_size() for _, tensor in self.named_tensors())


def _map(value: Any, change: Callable[[Tensor], Tensor]) -> Any:
    if isinstance(value, Tensor):
        return change(value)
    if isinstance(value, tuple):
        return tuple(_map(v, change) for v in value)
    return value.map(change)


def _named(value: Any, name: str) -> Iterator[tuple[str, Tensor]]:
    if isinstance(value, Tensor):
        yield name, value
    elif isinstance(value, tuple):
        for i, v in enumerate(value):
            yield from _named(v, f"{name}.{i}")
    else:
        yield from value.named_tensors(f"{name}.")


class Memory(nn.Module, ABC):
    """Something a block can read and a finished segment is written to.

    The laws every memory obeys (tests/laws holds each registered memory to them): `read` depends on a
    token's own past only, rows of the batch never mix, and `write` becomes visible from the next
    segment on. A subclass is built as `Kind(config, hidden_dim)` from its own config dataclass.

    A memory with `in_attention` set takes part in its layer's attention by `mix` and is shut by `close`;
    `read` and the block's fusion are then not used. Without `shares_state` each layer has its own state
    also where layers share a bank.
    """

    in_attention = False
    shares_state = True

    @abstractmethod
    def init_state(self, batch_size: int) -> State:
        """The state of streams that have seen nothing."""

    @abstractmethod
    def read(self, hidden: Tensor, state: Any) -> Tensor:
        """What the memory has to say to each token; hidden: [b n d] -> [b n d]."""

    @abstractmethod
    def write(self, hidden: Tensor, state: Any, mask: Tensor) -> State:
        """The state after a segment; hidden: [b n d], mask: [b n], true for tokens that count."""

    def opened(self, state: Any, hidden: Tensor, mask: Tensor) -> State:
        """The state as the open segment's next tokens may see it; by default as it is.

        hidden: [b p d], the segment's tokens so far; mask: [b p+n], which of these and the next n count.
        """
        return state

    def losses(self, hidden: Tensor, state: Any, mask: Tensor) -> dict[str, Tensor]:
        """What training adds to the loss for a segment that is about to be written, by name."""
        return {}

    def share(self, first: Memory) -> None:
        """Take what layers of one bank learn together from the bank's first layer; by default nothing."""

    def mix(self, hidden: Tensor, attended: Tensor, logsumexp: Callable[[], Tensor], state: Any) -> Tensor:
        """The heads' attention with the memory's share in it; attended: [b h n k] -> [b h n k].

        logsumexp() is the log of the sum of each query's exponentials in the window: [b h n].
        """
        raise NotImplementedError(f"{type(self).__name__} is read, not mixed into the attention")

    def close(self) -> None:
        """Shut the memory out of the attention for good (law L5)."""
        raise NotImplementedError(f"{type(self).__name__} is shut by the block's fusion")
