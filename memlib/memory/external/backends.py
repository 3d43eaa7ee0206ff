"""Where an external memory keeps its key-value pairs: in tensors that are its state, or in a store.

Axes: b batch, h heads, n tokens, c places, j hits, k head width, d hidden.

A backend searches and appends; what keys, values and queries are is the memory's business (memory.py).
`StateBackend` is a bounded value, differentiable and exact: for training. `StoreBackend` is a cursor into a
`Store`: for streams of any length, FAISS indexes and disk; nothing in a store has a gradient.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any, Protocol, cast

import torch
from einops import einsum, rearrange
from torch import Tensor, nn

from memlib.config import ExternalMemoryConfig
from memlib.memory.base import zeros
from memlib.memory.external.store import Store
from memlib.memory.state import State, axes
from memlib.ops import nearest, put_rows, selected_scores, selected_sum


@dataclass(frozen=True)
class Hits:
    """The nearest pairs of each query, best first: score, serial, index: [b h n j].

    serial: which token of its stream a hit is, -1 for a missing hit (an empty memory, a skipped search);
    score: the cosine of query and key, scaled by the memory later; index: the place of a hit. table: the
    values of all places, [b h c k], or those of the hits, [b h n j k].
    """

    score: Tensor
    serial: Tensor
    table: Tensor
    index: Tensor

    @property
    def exist(self) -> Tensor:
        """Which hits there are: [b h n j]."""
        return self.serial >= 0

    @property
    def weight(self) -> Tensor:
        """softmax of the scores over the hits; zero, not uniform, where there are none: [b h n j]."""
        return torch.softmax(self.score, -1) * self.exist

    @property
    def mean(self) -> Tensor:
        """The hits' values by their weights: [b h n k]."""
        if self.table.ndim == 4:
            return selected_sum(self.weight, self.table, self.index)
        return einsum(self.weight, self.table, "b h n j, b h n j k -> b h n k")

    @classmethod
    def nothing(cls, like: Tensor, top_k: int) -> Hits:
        """Empty result for skipped searches; like: a value for each token, [b h n k]."""
        none = torch.full((*like.shape[:3], top_k), -1, device=like.device)
        score = torch.zeros_like(none, dtype=like.dtype)
        return cls(score, none, torch.zeros_like(like[:, :, :1]), torch.zeros_like(none))

    def spread(self, searched: Tensor) -> Hits:
        """The hits of the tokens that triggered a search, at their own places; none for the others.

        searched: [b n]; hit i of a row belongs to its i-th token that triggered one.
        """
        number = (searched.cumsum(1) - 1).clamp(0, self.serial.shape[2] - 1)
        at = rearrange(number, "b n -> b 1 n 1")
        table = self.table
        if table.ndim == 5:
            table = table.take_along_dim(rearrange(at, "b 1 n 1 -> b 1 n 1 1"), 2)
        return Hits(
            score=self.score.take_along_dim(at, 2),
            serial=self.serial.take_along_dim(at, 2).masked_fill(~rearrange(searched, "b n -> b 1 n 1"), -1),
            table=table,
            index=self.index.take_along_dim(at, 2),
        )


@dataclass(frozen=True)
class NewPairs:
    """New pairs of a segment, valid tokens first: keys, values: [b h n k]; valid: [b n];
    last: [b d], the newest token."""

    keys: Tensor
    values: Tensor
    valid: Tensor
    last: Tensor


class KVBackend(Protocol):
    """Searches the nearest pairs and appends new ones; `state` is the class of its states.

    `last` of a state is the newest token appended: [b d]. `owner` is the memory, for device and type.
    """

    state: type[State]

    def init_state(self, owner: nn.Module, batch_size: int, hidden_dim: int) -> Any: ...

    def search(self, query: Tensor, state: Any) -> Hits: ...

    def append(self, new: NewPairs, state: Any, retrieved: Callable[[], tuple[Hits, Tensor]]) -> Any: ...


@dataclass(frozen=True)
class ExternalState(State):
    """The stored pairs of one layer, up to `capacity` tokens of each stream.

    keys, values: [b h c k]; serial: [b c], which token of its stream a place holds, -1 if empty;
    retrieved: [b c], the sum of the weights it was retrieved with, kept where eviction needs it;
    count: [b] tokens ever stored; last: [b d], the newest of them, which makes the next one's key.
    """

    keys: Tensor = axes("batch head slot feature")
    values: Tensor = axes("batch head slot feature")
    serial: Tensor = axes("batch slot")
    retrieved: Tensor = axes("batch slot")
    count: Tensor = axes("batch")
    last: Tensor = axes("batch feature")


class StateBackend:
    """Pairs as tensors of a fixed size, searched by comparing all."""

    state: type[State] = ExternalState

    def __init__(self, config: ExternalMemoryConfig) -> None:
        self.config = config

    def init_state(self, owner: nn.Module, batch_size: int, hidden_dim: int) -> ExternalState:
        c, h, new = self.config.capacity, self.config.num_heads, partial(zeros, owner, batch_size)
        return ExternalState(
            keys=new(h, c, hidden_dim // h),
            values=new(h, c, hidden_dim // h),
            serial=new(c, dtype=torch.int64) - 1,
            retrieved=new(c),
            count=new(dtype=torch.int64),
            last=new(hidden_dim),
        )

    def search(self, query: Tensor, state: ExternalState) -> Hits:
        used = self.used_slots(state)
        keys, values, serial = state.keys[:, :, :used], state.values[:, :, :used], state.serial[:, :used]
        place = nearest(query.detach(), keys.detach(), serial, self.config.top_k, self.config.chunk)
        none, place = place < 0, place.clamp(min=0)
        found = serial.gather(1, rearrange(place, "b h n j -> b (h n j)")).view_as(place)
        return Hits(selected_scores(query, keys, place), found.masked_fill(none, -1), values, place)

    def used_slots(self, state: ExternalState) -> int:
        """How many slots from the first on can hold a pair: slots fill in order.

        Where nothing may depend on values, in a graph that is compiled, all of them: the hits are the same.
        """
        if torch.compiler.is_compiling():
            return self.config.capacity
        chunk, used = self.config.chunk, int((state.serial >= 0).sum(1).max())
        return -(-max(used, self.config.top_k) // chunk) * chunk

    def append(
        self, new: NewPairs, state: ExternalState, retrieved: Callable[[], tuple[Hits, Tensor]]
    ) -> ExternalState:
        n = new.valid.shape[1]
        serial = rearrange(state.count, "b -> b 1") + torch.arange(n, device=new.valid.device)
        weights = state.retrieved
        if self.config.eviction == "least_retrieved":
            hits, weight = retrieved()
            place, weight = (rearrange(t, "b h n j -> b (h n j)") for t in (hits.index, weight))
            weights = weights.scatter_add(1, place, weight.to(weights.dtype))
            place = least_retrieved(state.serial, weights, n)
            weights = put(torch.zeros_like(place, dtype=weights.dtype), place, new.valid, weights)
        else:
            place = serial % self.config.capacity
        return ExternalState(
            keys=put_rows(state.keys, new.keys, place, new.valid),
            values=put_rows(state.values, new.values, place, new.valid),
            serial=put(serial, place, new.valid, state.serial),
            retrieved=weights,
            count=state.count + new.valid.sum(1),
            last=new.last.to(state.last.dtype),
        )


def put(new: Tensor, place: Tensor, valid: Tensor, into: Tensor) -> Tensor:
    """A copy of `into` with the valid new numbers at their places.

    new: [b n] into [b c]; place, valid: [b n], the places distinct by row.
    """
    return into.scatter(1, place, torch.where(valid, new.to(into.dtype), into.gather(1, place)))


def least_retrieved(serial: Tensor, retrieved: Tensor, n: int) -> Tensor:
    """The n places to evict: empty ones first, then the least retrieved, ties to the oldest.

    serial, retrieved: [b c] -> [b n].
    """
    free = serial < 0
    by_age = torch.argsort(serial, dim=1, stable=True)
    weight = retrieved.masked_fill(free, -1.0).gather(1, by_age)
    return by_age.gather(1, torch.argsort(weight, dim=1, stable=True))[:, :n]


@dataclass(frozen=True)
class StoredState(State):
    """Where each row stands in the store: stream, cursor: [b]; last: [b d]."""

    stream: Tensor = axes("batch")
    cursor: Tensor = axes("batch")
    last: Tensor = axes("batch feature")


class StoreBackend:
    """Pairs in a store: a state is a place in it, and stays readable while others write on.

    The weights with which a stream's rows were retrieved are counted in the store, not in the state: with
    eviction: least_retrieved, two states that go on from one may see each other's counts.
    """

    state: type[State] = StoredState

    def __init__(self, config: ExternalMemoryConfig, store: Store) -> None:
        self.config, self.store = config, store

    def init_state(self, owner: nn.Module, batch_size: int, hidden_dim: int) -> StoredState:
        streams = [self.store.new_stream() for _ in range(batch_size)]
        last = zeros(owner, batch_size, hidden_dim)
        return StoredState(
            stream=torch.tensor(streams, device=last.device),
            cursor=zeros(owner, batch_size, dtype=torch.int64),
            last=last,
        )

    def search(self, query: Tensor, state: StoredState) -> Hits:
        # The search's own scores will do, but for a gradient or another precision than theirs.
        theirs = not query.requires_grad and query.dtype == self.store.dtype == torch.float32
        rows = [
            self.store.search(stream, cursor, asked, self.config.top_k, keys=not theirs)
            for stream, cursor, asked in zip(
                state.stream.tolist(), state.cursor.tolist(), query.detach().cpu(), strict=True
            )
        ]
        serial = torch.stack([hits.serial for hits in rows]).to(query.device)
        values = torch.stack([hits.values for hits in rows]).to(query)
        if theirs:
            cosine = torch.stack([hits.score for hits in rows]).to(query)
        else:
            keys = torch.stack([cast(Tensor, hits.keys) for hits in rows]).to(query)
            cosine = einsum(query, keys, "b h n k, b h n j k -> b h n j")
        return Hits(cosine, serial, values, serial)

    def append(
        self, new: NewPairs, state: StoredState, retrieved: Callable[[], tuple[Hits, Tensor]]
    ) -> StoredState:
        weights: list[Tensor | None] = [None] * len(state.stream)
        if self.config.eviction == "least_retrieved":
            hits, weight = retrieved()
            weights = [
                self.store.weights(stream, cursor, serial, w)
                for stream, cursor, serial, w in zip(
                    state.stream.tolist(),
                    state.cursor.tolist(),
                    hits.serial.cpu(),
                    weight.cpu(),
                    strict=True,
                )
            ]
        places = [
            self.store.append(
                int(state.stream[b]),
                int(state.cursor[b]),
                new.keys[b, :, :m],
                new.values[b, :, :m],
                weights[b],
            )
            for b, m in enumerate(new.valid.sum(1).tolist())
        ]
        stream, cursor = (torch.tensor(part).to(state.stream) for part in zip(*places, strict=True))
        return StoredState(stream, cursor, new.last.to(state.last.dtype))
