"""The hierarchy's equations: a token, blocks, a summary and banks that decay."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from .addresses import books
from .base import Reference, Row, linear, shifted, sigmoid, softmax, with_before


class HdsReference(Reference):
    variants = ({"num_memories": 3, "num_blocks": 1, "chunk_size": 2, "num_slots": 5},)

    def init_row(self, memory: Any) -> Row:
        config, zero = self.config, memory.blocks.empty_key.detach() * 0
        empty = memory.banks.v_proj.weight.new_zeros(config.mem_dim)
        return {
            "blocks": [],  # means of the newest complete blocks, oldest first
            "open": [],  # tokens of the block under way
            "mean": zero,
            "count": 0,
            "banks": [[empty] * config.num_slots for _ in range(config.num_memories)],
        }

    def read_row(self, memory: Any, hidden: Tensor, row: Row) -> Tensor:
        """y_t = sum_l g_tl level_l(x_t),  g_t = softmax(x_t W + b)."""
        said = []
        for x in hidden:
            levels = [
                linear(memory.token, x),
                self.read_blocks(memory.blocks, x, row["blocks"]),
                linear(memory.summary.v_proj, row["mean"]),
                self.read_banks(memory.banks, x, row["banks"]),
            ]
            gate = softmax(list(linear(memory.gate, x)))
            said.append(sum(g * level for g, level in zip(gate, levels, strict=True)))
        return torch.stack(said)

    def read_blocks(self, level: Any, x: Tensor, blocks: list[Tensor]) -> Tensor:
        """Attention over the blocks and an empty one, which has a key and no value."""
        query, scale = linear(level.q_proj, x), len(x) ** 0.5
        keys = [level.empty_key, *(linear(level.k_proj, block) for block in blocks)]
        values = [torch.zeros_like(x), *(linear(level.v_proj, block) for block in blocks)]
        weights = softmax([query @ key / scale for key in keys])
        return sum(weight * value for weight, value in zip(weights, values, strict=True))

    def read_banks(self, level: Any, x: Tensor, banks: list[list[Tensor]]) -> Tensor:
        """(sum_k r_k sum_s a_ks M_ks) W_o,  r = softmax(x W_r + b)."""
        share, address = softmax(list(linear(level.read_gate, x))), books(level.address, x)
        total = 0
        for k, bank in enumerate(banks):
            for s, slot in enumerate(bank):
                total = total + share[k] * address[k][s] * slot
        return linear(level.o_proj, total)

    def write_row(self, memory: Any, hidden: Tensor, row: Row, mask: Tensor) -> Row:
        blocks, open_, mean, count = list(row["blocks"]), list(row["open"]), row["mean"], row["count"]
        for x, counts in zip(hidden, mask, strict=True):
            if not counts:
                continue
            open_.append(x)
            if len(open_) == self.config.chunk_size:
                blocks.append(sum(open_) / len(open_))
                open_ = []
            mean, count = (mean * count + x) / (count + 1), count + 1
        banks = row["banks"]
        for x, before in with_before(hidden, mask):
            banks = self.write_token(memory.banks, x, before, banks, len(hidden))
        return {
            "blocks": blocks[-self.config.num_blocks :],
            "open": open_,
            "mean": mean,
            "count": count,
            "banks": banks,
        }

    def write_token(
        self, level: Any, x: Tensor, before: Tensor, banks: list[list[Tensor]], n: int
    ) -> list[list[Tensor]]:
        """M_ks <- 2^(-u_k / (H_k n)) M_ks + i p_k a_ks v,  u_k = 2 sigma(c W_u + b), 1 for a fixed pace."""
        context = torch.cat((x, before))
        i = sigmoid(linear(level.input_gate, context))
        p = softmax(list(linear(level.write_gate, context)))
        address = books(level.address, shifted(level.shift, x, before))
        value = torch.tanh(linear(level.v_proj, x))
        after = []
        for k, bank in enumerate(banks):
            pace = 1.0
            if self.config.decay == "trained":
                pace = 2 * sigmoid(linear(level.pace_gate, context)[k])
            half_life = torch.exp(level.log_half_life[k] * math.log(2))
            decay = torch.exp(-math.log(2) * pace / (half_life * n))
            after.append([decay * slot + i * p[k] * address[k][s] * value for s, slot in enumerate(bank)])
        return after

    def named(self, memory: Any, row: Row) -> dict[str, Any]:
        return {
            "blocks": row["blocks"],
            "open": sum(row["open"], torch.zeros_like(row["mean"])),
            "filled": len(row["open"]),
            "mean": row["mean"],
            "count": row["count"],
            "banks": torch.stack([torch.stack(bank) for bank in row["banks"]]),
        }

    def theirs(self, memory: Any, state: Any, b: int) -> dict[str, Any]:
        blocks = state.level_1
        return {
            "blocks": list(blocks.blocks[b][blocks.complete[b]]),
            "open": blocks.open[b],
            "filled": blocks.filled[b],
            "mean": state.level_2.mean[b],
            "count": state.level_2.count[b],
            "banks": state.banks[b],
        }
