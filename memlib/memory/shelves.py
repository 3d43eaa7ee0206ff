"""Where an external memory keeps its key-value pairs: in tensors that are its state, or in a store.

Axes: b batch, h heads, n tokens, c places, j hits, k head width, d hidden.

A shelf finds and files; what keys, values and queries are is the memory's business (external.py).
`TensorShelf` is a bounded value, differentiable and exact: for training. `StoreShelf` is a cursor into a
`Store`: for streams of any length, FAISS indexes and disk; nothing that was filed has a gradient.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Protocol, cast

import torch
from einops import einsum, rearrange, repeat
from torch import Tensor

from memlib.config import ExternalMemoryConfig
from memlib.memory.base import State
from memlib.memory.search import exact_search
from memlib.memory.store import Store


@dataclass(frozen=True)
class Found:
    """What came back for each query, best first: cosine, serial: [b h n j], values: [b h n j k].

    serial says which token of its stream a hit is, -1 where there was none; place: where it stands.
    """

    cosine: Tensor
    serial: Tensor
    values: Tensor
    place: Tensor

    @classmethod
    def nothing(cls, like: Tensor, top_k: int) -> Found:
        """What a search that was not made brings back; like: a value for each token, [b h n k]."""
        values = repeat(torch.zeros_like(like), "b h n k -> b h n j k", j=top_k)
        none = torch.full(values.shape[:-1], -1, device=like.device)
        return cls(values[..., 0], none, values, none.clamp(min=0))

    def spread(self, asked: Tensor) -> Found:
        """The hits of those that asked, at their own tokens; the others found nothing.

        asked: [b n]; token i of a row stands here at its number among those that asked.
        """
        number = (asked.cumsum(1) - 1).clamp(0, self.serial.shape[2] - 1)
        at = rearrange(number, "b n -> b 1 n 1")
        silent = ~rearrange(asked, "b n -> b 1 n 1")
        return Found(
            cosine=self.cosine.take_along_dim(at, 2),
            serial=self.serial.take_along_dim(at, 2).masked_fill(silent, -1),
            values=self.values.take_along_dim(rearrange(at, "b 1 n 1 -> b 1 n 1 1"), 2),
            place=self.place.take_along_dim(at, 2),
        )


@dataclass(frozen=True)
class Filing:
    """What a segment brings, its tokens that count first: keys, values: [b h n k]; valid: [b n];
    last: [b d], the newest token."""

    keys: Tensor
    values: Tensor
    valid: Tensor
    last: Tensor


class Shelf(Protocol):
    """Finds the nearest pairs and files new ones; `state` is what it takes and gives.

    `last` of a state is the newest token filed: [b d].
    """

    state: type[State]

    def init_state(self, batch_size: int, like: Tensor) -> Any: ...

    def find(self, query: Tensor, state: Any) -> Found: ...

    def file(self, new: Filing, state: Any, came_back: Callable[[], tuple[Found, Tensor]]) -> Any: ...


@dataclass(frozen=True)
class ExternalState(State):
    """What one layer has filed of its streams, up to `capacity` tokens.

    keys, values: [b h c k]; serial: [b c], which token of its stream stands in a place, -1 where none;
    retrieved: [b c], the weight with which it has come back so far, kept where eviction needs it;
    count: [b] tokens ever filed; last: [b d], the newest of them, whose key the next one is filed under.
    """

    keys: Tensor
    values: Tensor
    serial: Tensor
    retrieved: Tensor
    count: Tensor
    last: Tensor


class TensorShelf:
    """Pairs as tensors of a fixed size, searched by comparing all."""

    state: type[State] = ExternalState

    def __init__(self, config: ExternalMemoryConfig) -> None:
        self.config = config

    def init_state(self, batch_size: int, like: Tensor) -> ExternalState:
        """like: a weight [d d], for width, type and device."""
        b, c, h, d = batch_size, self.config.capacity, self.config.num_heads, like.shape[0]
        return ExternalState(
            keys=like.new_zeros(b, h, c, d // h),
            values=like.new_zeros(b, h, c, d // h),
            serial=torch.full((b, c), -1, device=like.device),
            retrieved=like.new_zeros(b, c),
            count=torch.zeros(b, dtype=torch.int64, device=like.device),
            last=like.new_zeros(b, d),
        )

    def find(self, query: Tensor, state: ExternalState) -> Found:
        chunk, top_k, n = self.config.chunk, self.config.top_k, query.shape[2]
        # Places are taken up in order, so those beyond the fullest row are empty and not worth a look.
        used = max(int((state.serial >= 0).sum(1).max()), top_k)
        used = -(-used // chunk) * chunk
        cosine = einsum(query, state.keys[:, :, :used], "b h n k, b h c k -> b h n c")
        place = exact_search(cosine.detach(), state.serial[:, :used], top_k, chunk)
        none, place = place < 0, place.clamp(min=0)
        serial = state.serial.gather(1, rearrange(place, "b h n j -> b (h n j)"))
        serial = rearrange(serial, "b (h n j) -> b h n j", h=query.shape[1], n=n)
        index = repeat(place, "b h n j -> b h (n j) k", k=state.values.shape[-1])
        return Found(
            cosine=cosine.gather(-1, place),
            serial=serial.masked_fill(none, -1),
            values=rearrange(state.values.gather(2, index), "b h (n j) k -> b h n j k", n=n),
            place=place,
        )

    def file(
        self, new: Filing, state: ExternalState, came_back: Callable[[], tuple[Found, Tensor]]
    ) -> ExternalState:
        n = new.valid.shape[1]
        serial = rearrange(state.count, "b -> b 1") + torch.arange(n, device=new.valid.device)
        retrieved = state.retrieved
        if self.config.eviction == "least_retrieved":
            found, weight = came_back()
            place, weight = (rearrange(t, "b h n j -> b (h n j)") for t in (found.place, weight))
            retrieved = retrieved.scatter_add(1, place, weight.to(retrieved.dtype))
            place = least_retrieved(state.serial, retrieved, n)
        else:
            place = serial % self.config.capacity
        return ExternalState(
            keys=put(new.keys, place, new.valid, state.keys),
            values=put(new.values, place, new.valid, state.values),
            serial=put(serial, place, new.valid, state.serial),
            retrieved=put(torch.zeros_like(place, dtype=retrieved.dtype), place, new.valid, retrieved),
            count=state.count + new.valid.sum(1),
            last=new.last,
        )


def put(new: Tensor, place: Tensor, valid: Tensor, into: Tensor) -> Tensor:
    """A copy of `into` with the valid new items at their places.

    new: [b h n k] into [b h c k], or [b n] into [b c]; place, valid: [b n], the places distinct by row.
    """
    axis = into.ndim // 2
    if into.ndim == 4:
        h, k = into.shape[1], into.shape[3]
        place, valid = (repeat(t, "b n -> b h n k", h=h, k=k) for t in (place, valid))
    kept = torch.where(valid, new.to(into.dtype), into.gather(axis, place))
    return into.scatter(axis, place, kept)


def least_retrieved(serial: Tensor, retrieved: Tensor, n: int) -> Tensor:
    """The n places to give up: free ones first, then those that came back least, of equals the oldest.

    serial, retrieved: [b c] -> [b n].
    """
    free = serial < 0
    by_age = torch.argsort(serial, dim=1, stable=True)
    weight = retrieved.masked_fill(free, -1.0).gather(1, by_age)
    return by_age.gather(1, torch.argsort(weight, dim=1, stable=True))[:, :n]


@dataclass(frozen=True)
class StoredState(State):
    """Where each row stands in the store: stream, cursor: [b]; last: [b d]."""

    stream: Tensor
    cursor: Tensor
    last: Tensor


class StoreShelf:
    """Pairs in a store: a state is a place in it, and stays readable while others write on.

    The weights with which a stream's rows came back are counted in the store, not in the state: with
    eviction: least_retrieved, two states that go on from one may see each other's counts.
    """

    state: type[State] = StoredState

    def __init__(self, config: ExternalMemoryConfig, store: Store) -> None:
        self.config, self.store = config, store

    def init_state(self, batch_size: int, like: Tensor) -> StoredState:
        streams = [self.store.new_stream() for _ in range(batch_size)]
        return StoredState(
            stream=torch.tensor(streams, device=like.device),
            cursor=torch.zeros(batch_size, dtype=torch.int64, device=like.device),
            last=like.new_zeros(batch_size, like.shape[0]),
        )

    def find(self, query: Tensor, state: StoredState) -> Found:
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
        return Found(cosine, serial, values, serial)

    def file(
        self, new: Filing, state: StoredState, came_back: Callable[[], tuple[Found, Tensor]]
    ) -> StoredState:
        retrieved: list[Tensor | None] = [None] * len(state.stream)
        if self.config.eviction == "least_retrieved":
            found, weight = came_back()
            retrieved = [
                self.store.weights(stream, cursor, serial, w)
                for stream, cursor, serial, w in zip(
                    state.stream.tolist(),
                    state.cursor.tolist(),
                    found.serial.cpu(),
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
                retrieved[b],
            )
            for b, m in enumerate(new.valid.sum(1).tolist())
        ]
        stream, cursor = (torch.tensor(part).to(state.stream) for part in zip(*places, strict=True))
        return StoredState(stream, cursor, new.last)
