"""The long-term memory's equations: compress a segment, then update slots that are fixed or adaptive."""

from __future__ import annotations

from math import ceil
from typing import Any

import torch
from torch import Tensor

from .base import Reference, Row, linear, number, sigmoid, softmax, unit, with_before
from .keys import attended, key_of, query_of, score_of

SLOPE = 0.25  # of sigma at 0

# Where the memory differs from its equations today. The reference imitates each difference, so that all
# the rest is compared. When the memory is corrected, set the value after the semicolon.
DROPPED_COME_LAST = True  # dropped tokens stand behind the survivors, not in their own place; False
DROPPED_COUNT_IN_USE = False  # rows with padding give some dropped tokens a gradient out of training; False
TAKEN_KEEPS = 0.0  # what is left of what a taken slot said before: it should be empty; 0.0


class LtmReference(Reference):
    variants = (
        {"memory_compression_ratio": 1.0, "match_threshold": 0.2, "slots": "adaptive"},
        {"memory_compression_ratio": 0.8, "prune_below": 0.4, "reclaim_after": 3, "slots": "adaptive"},
    )

    def init_row(self, memory: Any) -> Row:
        width, adaptive = self.config.slot_dim // 2, self.config.slots == "adaptive"
        return {
            "keys": [slot[:width] for slot in memory.start],
            "values": [slot[width:] for slot in memory.start],
            "age": [self.config.reclaim_after if adaptive else 0] * self.config.num_slots,
            "segments": 0,
        }

    def in_use(self, age: int) -> bool:
        """Whether a slot is read: fixed slots always, adaptive ones unless free."""
        return self.config.slots == "fixed" or age < self.config.reclaim_after

    def read_row(self, memory: Any, hidden: Tensor, row: Row) -> Tensor:
        """y = softmax over the slots in use, dense or the top_k best, of their values, W_o."""
        said = []
        for x in hidden:
            query = query_of(memory.key, x)
            used = [s for s, age in enumerate(row["age"]) if self.in_use(age)]
            scores = {s: score_of(memory.reader.attention, query, row["keys"][s]) for s in used}
            if self.config.attention == "sparse":
                used = sorted(used, key=lambda s: -number(scores[s]))[: self.config.top_k]
            nothing = torch.zeros_like(row["values"][0])
            read = attended([scores[s] for s in used], [row["values"][s] for s in used], nothing)
            said.append(linear(memory.reader.o_proj, read))
        return torch.stack(said)

    def write_row(self, memory: Any, hidden: Tensor, row: Row, mask: Tensor) -> Row:
        tokens = self.compress(memory, hidden, mask, row["segments"])
        if self.config.slots == "fixed":
            keys, values = self.spread(memory, tokens, row["keys"], row["values"])
            return {"keys": keys, "values": values, "age": row["age"], "segments": row["segments"] + 1}
        asking = [query_of(memory.key, x) for x, counts in zip(hidden, mask, strict=True) if counts]
        keys, values, age = self.adapt(asking, tokens, row["keys"], row["values"], row["age"])
        return {"keys": keys, "values": values, "age": age, "segments": row["segments"] + 1}

    def compress(self, memory: Any, hidden: Tensor, mask: Tensor, segments: int) -> list[tuple[Any, ...]]:
        """(key, value, strength, kept) of each token: key_t, tanh(x_t W_v), its importance if it survives.

        In training a token that does not survive has strength zero, with the gradient of a little of it.
        """
        tokens, order = {}, {}
        places = [t for t, counts in enumerate(mask) if counts]
        for nth, (t, pair) in enumerate(zip(places, with_before(hidden, mask), strict=True), 1):
            key = key_of(memory.key, *pair)
            value = torch.tanh(linear(memory.writer.v_proj, pair[0]))
            logit = linear(memory.writer.importance_gate, torch.cat((key, value))).sum()
            tokens[t] = key, value, logit
            order[t] = number(logit) if self.config.keep == "learned" else lot(nth, segments)
        count = ceil(self.config.memory_compression_ratio * len(places))
        best = sorted(places, key=lambda t: -order[t])[:count]
        carried = self.carried(best, len(hidden), memory.training)
        found = []
        for t in places:
            key, value, logit = tokens[t]
            if t in best:
                found.append((key, value, sigmoid(logit), True))
            elif t in carried:
                found.append((key, value, SLOPE * (logit - logit.detach()), False))
        return sorted(found, key=lambda token: not token[-1]) if DROPPED_COME_LAST else found

    def carried(self, best: list[int], n: int, training: bool) -> list[int]:
        """The dropped tokens that have a gradient: all in training, else none."""
        dropped = [t for t in range(n) if t not in best]
        if training:
            return dropped
        free = ceil(self.config.memory_compression_ratio * n) - len(best)
        return dropped[:free] if DROPPED_COUNT_IN_USE else []

    def spread(self, memory: Any, tokens: list[Any], keys: list[Tensor], values: list[Tensor]) -> Any:
        """M_s <- (1 - a_ts g_t) M_s + a_ts g_t new_t, a_t over the slots as they were before the segment."""
        before = list(keys)
        for key, value, g, _ in tokens:
            address = softmax([score_of(memory.reader.attention, key, slot) for slot in before])
            keys = [(1 - a * g) * slot + a * g * key for a, slot in zip(address, keys, strict=True)]
            values = [(1 - a * g) * slot + a * g * value for a, slot in zip(address, values, strict=True)]
        return keys, values

    def adapt(
        self, asking: list[Tensor], tokens: list[Any], keys: list[Any], values: list[Any], age: list[int]
    ) -> Any:
        """Each token goes to the slot in use that is most like it, or takes the one unused for longest."""
        keys, values, age, free = list(keys), list(values), list(age), self.config.reclaim_after
        for s, slot in enumerate(keys):
            asked = any(number(query @ unit(slot)) >= self.config.match_threshold for query in asking)
            if asked and age[s] < free:
                age[s] = -1
        for key, value, g, kept in tokens:
            alike = {s: number(key @ unit(slot)) for s, slot in enumerate(keys) if age[s] < free}
            best = max(alike, key=lambda s: alike[s], default=None)
            if best is not None and alike[best] >= self.config.match_threshold:
                keys[best] = (1 - g) * keys[best] + g * key
                values[best] = (1 - g) * values[best] + g * value
            elif kept:
                best = max(range(len(keys)), key=lambda s: (age[s], -s))
                keys[best] = TAKEN_KEEPS * keys[best] + key  # it was emptied and given the token's key
                values[best] = TAKEN_KEEPS * values[best] + g * value
            if kept:
                age[best] = -1
        for s in range(len(keys)):
            age[s] = min(age[s] + 1, free)
            if number(torch.sqrt((values[s] ** 2).sum())) < self.config.prune_below:
                age[s] = free
            if age[s] == free:
                keys[s], values[s] = keys[s] * 0, values[s] * 0
        return keys, values, age

    def named(self, memory: Any, row: Row) -> dict[str, Any]:
        slots = [torch.cat(pair) for pair in zip(row["keys"], row["values"], strict=True)]
        return {"slots": torch.stack(slots), "age": row["age"], "segments": row["segments"]}

    def theirs(self, memory: Any, state: Any, b: int) -> dict[str, Any]:
        return {"slots": state.slots[b], "age": state.age[b].tolist(), "segments": state.segments[b]}


def lot(number: int, segments: int) -> int:
    """The control's order: a hash of which token of which segment it is."""
    mixed = (number + 1000 * (segments % 1000)) * 2654435761 % 2**32
    mixed = (mixed ^ (mixed >> 15)) * 2246822519 % 2**32
    return (mixed ^ (mixed >> 13)) % 2**20
