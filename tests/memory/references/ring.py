"""The prototype: a ring of the newest tokens, and a store that evicts what was not used for longest."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from .base import Reference, Row, linear, number, sigmoid, softmax, with_before
from .keys import attended, key_of, query_of, score_of

Item = tuple[Tensor, Tensor, Tensor]  # key, value, log importance


class RingReference(Reference):
    variants = (
        {"admit": 0.0, "retrieved_above": 0.2, "short_slots": 2},
        {"retrieved_above": 1.0, "long_slots": 2, "short_slots": 1},
    )

    def init_row(self, memory: Any) -> Row:
        """ring: items, oldest first; store: items by place; used: when each place was last used."""
        return {"ring": [], "store": {}, "used": {}, "count": 0, "tick": 0}

    def read_row(self, memory: Any, hidden: Tensor, row: Row) -> Tensor:
        """y = softmax over ring and store of their values, W_o; the store by importance too."""
        items = [*row["ring"], *row["store"].values()]
        nothing = torch.zeros(self.config.slot_dim // 2, dtype=hidden.dtype)
        said = []
        for x in hidden:
            scores = self.scores(memory, x, row)
            read = attended(scores, [value for _, value, _ in items], nothing)
            said.append(linear(memory.o_proj, read))
        return torch.stack(said)

    def scores(self, memory: Any, x: Tensor, row: Row) -> list[Tensor]:
        """Of the ring's items, then of the store's."""
        query = query_of(memory.key, x)
        short = [score_of(memory.reader, query, key) for key, _, _ in row["ring"]]
        long = [score_of(memory.reader, query, key) + more for key, _, more in row["store"].values()]
        return [*short, *long]

    def write_row(self, memory: Any, hidden: Tensor, row: Row, mask: Tensor) -> Row:
        ring, store, used = list(row["ring"]), dict(row["store"]), dict(row["used"])
        count, tick = row["count"], row["tick"]
        for place in sorted(self.retrieved(memory, hidden, row, mask)):
            tick += 1
            used[place] = tick
        for x, before in with_before(hidden, mask):
            if len(ring) == self.config.short_slots:
                oldest = ring.pop(0)
                if number(oldest[2]) >= math.log(max(self.config.admit, 1e-30)):
                    place = min(range(self.config.long_slots), key=lambda p: (used.get(p, 0), p))
                    tick += 1
                    store[place], used[place] = oldest, tick
            ring.append(self.item(memory, x, before))
            count += 1
        return {"ring": ring, "store": store, "used": used, "count": count, "tick": tick}

    def retrieved(self, memory: Any, hidden: Tensor, row: Row, mask: Tensor) -> set[int]:
        """Places of the store to which some token of the segment gave more than `retrieved_above`."""
        found = set()
        for x, counts in zip(hidden, mask, strict=True):
            if counts:
                weights = softmax(self.scores(memory, x, row))[len(row["ring"]) :]
                pairs = zip(row["store"], weights, strict=True)
                found |= {place for place, weight in pairs if number(weight) > self.config.retrieved_above}
        return found

    def item(self, memory: Any, x: Tensor, before: Tensor) -> Item:
        """(key_t, x_t W_v, log sigma([key_t, x_t W_v] W_g + b))."""
        key, value = key_of(memory.key, x, before), linear(memory.writer.v_proj, x)
        score = linear(memory.writer.importance_gate, torch.cat((key, value))).sum()
        return key, value, torch.log(sigmoid(score))

    def named(self, memory: Any, row: Row) -> dict[str, Any]:
        places = sorted(row["store"])
        return {
            "ring": [part for item in row["ring"] for part in item],
            "places": places,
            "store": [part for place in places for part in row["store"][place]],
            "used": [row["used"][place] for place in places],
            "count": row["count"],
            "tick": row["tick"],
        }

    def theirs(self, memory: Any, state: Any, b: int) -> dict[str, Any]:
        ring, store = state.ring, state.store
        count, places = int(ring.count[b]), [p for p, tick in enumerate(store.used[b].tolist()) if tick]
        oldest = max(0, count - self.config.short_slots)
        order = [number % self.config.short_slots for number in range(oldest, count)]
        return {
            "ring": parts(ring.items, b, order),
            "places": places,
            "store": parts(store.items, b, places),
            "used": store.used[b][places].tolist(),
            "count": count,
            "tick": store.tick[b],
        }


def parts(items: Any, b: int, places: list[int]) -> list[Tensor]:
    """Key, value and importance of the memory's items at some places, one after another."""
    return [part[b, p] for p in places for part in (items.keys, items.values, items.importance)]
