"""The internal memory's equations: slots that are addressed, or slots that attend."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from .addresses import books
from .base import Reference, Row, heads_of, linear, shifted, sigmoid, softmax, with_before


class InternalReference(Reference):
    variants = ({"output_gate": False, "num_slots": 6, "num_heads": 3},)

    def init_row(self, memory: Any) -> Row:
        return {"slots": list(memory.start)}

    def read_row(self, memory: Any, hidden: Tensor, row: Row) -> Tensor:
        say = self.addressed_read if self.config.write == "addressed" else self.attention_read
        return torch.stack([self.gated(memory.reader, say(memory.reader, x, row["slots"])) for x in hidden])

    def gated(self, reader: Any, read: Tensor) -> Tensor:
        """y = sigma(read W_g + b) read."""
        if not self.config.output_gate:
            return read
        return sigmoid(linear(reader.output_gate.gate, read)) * read

    def addressed_read(self, reader: Any, x: Tensor, slots: list[Tensor]) -> Tensor:
        """(1/h sum_s a_s M_s) W_o, with the token's own address."""
        weights = [weight for book in books(reader.address, x) for weight in book]
        total = sum(weight * slot for weight, slot in zip(weights, slots, strict=True))
        return linear(reader.o_proj, total / self.config.num_heads)

    def attention_read(self, reader: Any, x: Tensor, slots: list[Tensor]) -> Tensor:
        """softmax(Q K^T / sqrt(k)) V W_o, by head."""
        return linear(reader.o_proj, attend(reader, x, slots, self.config.num_heads))

    def write_row(self, memory: Any, hidden: Tensor, row: Row, mask: Tensor) -> Row:
        if self.config.write == "addressed":
            return {"slots": self.addressed_write(memory.writer, hidden, row["slots"], mask)}
        return {"slots": self.attention_write(memory.writer, hidden, row["slots"], mask)}

    def addressed_write(self, writer: Any, hidden: Tensor, slots: list[Tensor], mask: Tensor) -> list[Tensor]:
        """M_s <- (1 - a_ts i_t (1 - f_t)) M_s + a_ts i_t tanh(x_t W_v), token after token."""
        for x, before in with_before(hidden, mask):
            context = torch.cat((x, before))
            i = sigmoid(linear(writer.input_gate, context))
            f = sigmoid(linear(writer.forget_gate, context))
            value = torch.tanh(linear(writer.v_proj, x))
            key = shifted(writer.shift, x, before)
            address = [weight for book in books(writer.address, key) for weight in book]
            slots = [
                (1 - a * i * (1 - f)) * slot + a * i * value for a, slot in zip(address, slots, strict=True)
            ]
        return slots

    def attention_write(self, writer: Any, hidden: Tensor, slots: list[Tensor], mask: Tensor) -> list[Tensor]:
        """Each slot attends to all slots and to the segment, then to itself through an MLP:

        U = norm(M + Attn),  U <- norm(U + mlp(U)),  M' = f M + i tanh(U)
        """
        tokens = [linear(writer.in_proj, x) for x, counts in zip(hidden, mask, strict=True) if counts]
        mean = sum(tokens) / len(tokens)
        after = []
        for slot in slots:
            attended = attend(writer, slot, [*slots, *tokens], self.config.num_heads)
            update = norm(writer.attended_norm, slot + attended)
            first, _, second = writer.mlp
            inner = torch.clamp(linear(first, update), min=0)
            update = norm(writer.mlp_norm, update + linear(second, inner))
            context = torch.cat((mean, torch.tanh(slot)))
            i = sigmoid(linear(writer.input_gate, context))
            f = sigmoid(linear(writer.forget_gate, context))
            after.append(f * slot + i * torch.tanh(update))
        return after

    def named(self, memory: Any, row: Row) -> dict[str, Any]:
        return {"slots": torch.stack(row["slots"])}

    def theirs(self, memory: Any, state: Any, b: int) -> dict[str, Any]:
        return {"slots": state.slots[b]}


def attend(module: Any, asking: Tensor, sources: list[Tensor], heads: int) -> Tensor:
    """softmax_j(q . k_j / sqrt(k)) v_j, the heads side by side; q from `asking`, k and v from `sources`."""
    queries = heads_of(linear(module.q_proj, asking), heads)
    keys = [heads_of(linear(module.k_proj, source), heads) for source in sources]
    values = [heads_of(linear(module.v_proj, source), heads) for source in sources]
    said = []
    for h, query in enumerate(queries):
        weights = softmax([query @ key[h] / len(query) ** 0.5 for key in keys])
        said.append(sum(weight * value[h] for weight, value in zip(weights, values, strict=True)))
    return torch.cat(said)


def norm(module: Any, x: Tensor) -> Tensor:
    """x / sqrt(mean(x^2) + eps) w."""
    return x / torch.sqrt((x * x).mean() + module.eps) * module.weight
