"""The external memory's equations: pairs of past tokens, and attention over each query's nearest."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from .base import Reference, Row, heads_of, linear, number, shifted, sigmoid, softmax, unit

TIE = 1e-4  # of two cosines that differ by less, the newer token comes first

Item = dict[str, Any]  # serial: which token of the stream; keys, values: of each head; retrieved: a number


class ExternalReference(Reference):
    variants = (
        {"chunk": 2, "top_k": 4},
        {"chunk": 2, "top_k": 2, "join": "joint", "retrieval_gate": "query"},
        {"newest_within": 2.0},
        {"newest_within": 3.0, "join": "joint", "eviction": "least_retrieved"},
        {"shared_address": False, "retrieval_gate": "query", "retrieval_weighted": False},
        {"retrieval_gate": "layer", "retrieval_gate_init": -5.0, "eviction": "least_retrieved"},
        {"top_k": 6, "num_heads": 4},
    )

    def init_row(self, memory: Any) -> Row:
        return {"items": [], "count": 0, "last": memory.v_proj.weight.new_zeros(memory.v_proj.in_features)}

    def address(self, proj: Any, x: Tensor) -> list[Tensor]:
        """A unit vector for each head."""
        return [unit(part) for part in heads_of(linear(proj, x), self.config.num_heads)]

    def hits(self, memory: Any, h: int, query: Tensor, items: list[Item]) -> list[tuple[Item, Tensor]]:
        """The top_k items nearest to one head's query, in whole chunks, with sharpness_h cos(query, key)."""
        c, newest = self.config.chunk, max((item["serial"] for item in items), default=0)
        chunks: dict[int, list[Item]] = {}
        for item in items:
            chunks.setdefault(item["serial"] // c, []).append(item)
        whole = [chunk for chunk in chunks.values() if len(chunk) == c]

        def nearness(chunk: list[Item]) -> float:
            cosine = sum(number(query @ item["keys"][h]) for item in chunk) / c
            newness = sum((item["serial"] + 1) / (newest + 1) for item in chunk) / c
            return cosine + TIE * newness

        best = sorted(whole, key=nearness, reverse=True)[: self.config.top_k // c]
        found = [(item, memory.sharpness[h] * (query @ item["keys"][h])) for chunk in best for item in chunk]
        if self.config.newest_within is None or not found:
            return found
        line = max(number(score) for _, score in found) - self.config.newest_within
        newest = max(item["serial"] for item, score in found if number(score) >= line)
        return [(i, score) for i, score in found if number(score) < line or i["serial"] == newest]

    def retrieve(self, memory: Any, x: Tensor, row: Row) -> list[list[tuple[Item, Tensor]]]:
        """Each head's hits for one token; none for a token that is not searched for."""
        if not self.share(memory, x)[0]:
            return [[] for _ in range(self.config.num_heads)]
        queries = self.address(memory.query_address, x)
        return [self.hits(memory, h, query, row["items"]) for h, query in enumerate(queries)]

    def share(self, memory: Any, x: Tensor) -> tuple[bool, Any]:
        """Whether a token is searched for, and how much it takes of what is retrieved."""
        if self.config.retrieval_gate == "none":
            return True, 1.0
        if self.config.retrieval_gate == "layer":
            gate = sigmoid(memory.retrieval.layer.bias.sum())
        else:
            gate = sigmoid(linear(memory.retrieval.query, x).sum())
        if memory.training:
            return True, gate
        if number(gate) <= self.config.retrieval_threshold:
            return False, 0.0
        return True, gate if self.config.retrieval_weighted else 1.0

    def mean(self, found: list[tuple[Item, Tensor]], h: int, width: int) -> Tensor:
        """sum_j softmax(score)_j v_j of one head; zero without a hit."""
        weights = softmax([score for _, score in found])
        total = torch.zeros(width, dtype=torch.float64)
        for weight, (item, _) in zip(weights, found, strict=True):
            total = total + weight * item["values"][h]
        return total

    def read_row(self, memory: Any, hidden: Tensor, row: Row) -> Tensor:
        """join: fusion. y = share (softmax(score) V) W_o, the heads side by side."""
        width, said = hidden.shape[-1] // self.config.num_heads, []
        for x in hidden:
            heads = [self.mean(found, h, width) for h, found in enumerate(self.retrieve(memory, x, row))]
            said.append(self.share(memory, x)[1] * linear(memory.o_proj, torch.cat(heads)))
        return torch.stack(said)

    def mix_row(self, memory: Any, hidden: Tensor, attended: Tensor, logsumexp: Tensor, row: Row) -> Tensor:
        """(1 - w) A + w M.  heads: w = sigma(b_h);  joint: M's share of one softmax; times the share."""
        mixed = []
        for t, x in enumerate(hidden):
            share = self.share(memory, x)[1]
            for h, found in enumerate(self.retrieve(memory, x, row)):
                here, w = attended[h, t], 0.0
                if found and self.config.join == "heads":
                    w = share * sigmoid(memory.gate.bias[h])
                elif found:
                    theirs = sum(torch.exp(score + memory.gate.bias[h]) for _, score in found)
                    w = share * theirs / (theirs + torch.exp(logsumexp[h, t]))
                mixed.append((1 - w) * here + w * self.mean(found, h, attended.shape[-1]))
        return torch.stack(mixed).reshape(len(hidden), len(attended), -1).transpose(0, 1)

    def write_row(self, memory: Any, hidden: Tensor, row: Row, mask: Tensor) -> Row:
        tokens = [x for x, counts in zip(hidden, mask, strict=True) if counts]
        items, last, count = [dict(item) for item in row["items"]], row["last"], row["count"]
        if self.config.eviction == "least_retrieved":
            self.note(memory, tokens, row, items)
        full = len(items) + len(tokens) - self.config.capacity
        items = sorted(items, key=self.worth)[max(full, 0) :]
        for x in tokens:
            key = shifted(memory.shift, x, last)
            items.append(
                {
                    "serial": count,
                    "keys": self.address(memory.key_address, key),
                    "values": heads_of(linear(memory.v_proj, x), self.config.num_heads),
                    "retrieved": 0.0,
                }
            )
            last, count = x, count + 1
        return {"items": items, "count": count, "last": last}

    def note(self, memory: Any, tokens: list[Tensor], row: Row, items: list[Item]) -> None:
        """Add up with which weight each item came back for the segment's tokens."""
        numbered = {item["serial"]: item for item in items}
        for x in tokens:
            for found in self.retrieve(memory, x, row):
                weights = softmax([score for _, score in found])
                for weight, (item, _) in zip(weights, found, strict=True):
                    numbered[item["serial"]]["retrieved"] += number(weight)

    def worth(self, item: Item) -> tuple[float, int]:
        """What leaves first at capacity: the least retrieved, or the oldest."""
        kept = item["retrieved"] if self.config.eviction == "least_retrieved" else 0.0
        return kept, item["serial"]

    def named(self, memory: Any, row: Row) -> dict[str, Any]:
        items = sorted(row["items"], key=lambda item: item["serial"])
        return {
            "serial": [item["serial"] for item in items],
            "keys": [torch.stack(item["keys"]) for item in items],
            "values": [torch.stack(item["values"]) for item in items],
            "retrieved": [item["retrieved"] for item in items],
            "count": row["count"],
            "last": row["last"],
        }

    def theirs(self, memory: Any, state: Any, b: int) -> dict[str, Any]:
        serial = state.serial[b].tolist()
        places = sorted((p for p in range(len(serial)) if serial[p] >= 0), key=lambda p: serial[p])
        return {
            "serial": [serial[p] for p in places],
            "keys": [state.keys[b, :, p] for p in places],
            "values": [state.values[b, :, p] for p in places],
            "retrieved": state.retrieved[b][places].tolist(),
            "count": state.count[b],
            "last": state.last[b],
        }
