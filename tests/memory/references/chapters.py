"""The learnable memory's equations: tokens, whole or in the chapters that a router chooses."""

from __future__ import annotations

from math import ceil
from typing import Any

import torch
from torch import Tensor

from .base import Reference, Row, heads_of, linear, number, softmax

Q_MAX = {8: 127, 4: 7}


class ChaptersReference(Reference):
    variants = (
        {"use_low_rank_memory": False},
        {"use_low_rank_memory": False, "quantize_memory": True, "memory_dim": 7},
        {"quantize_memory": True, "memory_quant_bits": 4},
        {"quantize_memory": True, "low_rank_mode": "reduced_dim", "use_chapters": False},
        {"use_chapters": False, "use_flash_attention": False},
        {"use_low_rank_projections": True, "top_k_chapters": 1, "use_flash_attention": False},
        {"top_k_chapters": 1, "routing_strategy_inference": "hybrid", "routing_window_size": 2},
        {"routing_strategy_inference": "rolling", "gradient_checkpointing": True},
    )

    def strategy(self, memory: Any) -> str:
        config = self.config
        return config.routing_strategy_train if memory.training else config.routing_strategy_inference

    def window(self, memory: Any) -> int:
        """How many tokens are kept for a rolling mean."""
        return self.config.routing_window_size if self.strategy(memory) in ("rolling", "hybrid") else 0

    def init_row(self, memory: Any) -> Row:
        """summary: the mean of the segment before; recent: the newest tokens, of this segment too."""
        zero = torch.zeros(memory.hidden_dim, dtype=torch.float64)
        return {"summary": zero, "seen": False, "recent": [], "counts": None}

    def opened_row(self, memory: Any, row: Row, hidden: Tensor, mask: Tensor) -> Row:
        earlier = [x for x, counts in zip(hidden, mask, strict=False) if counts]
        return row | {"recent": [*row["recent"], *earlier], "counts": mask[len(hidden) :]}

    def read_row(self, memory: Any, hidden: Tensor, row: Row) -> Tensor:
        tokens = self.bank(memory)
        if not self.config.use_chapters:
            return torch.stack(
                [self.attend(memory.attention, x, tokens, [0.0] * len(tokens)) for x in hidden]
            )
        recent, said = list(row["recent"]), []
        for t, x in enumerate(hidden):
            if row["counts"] is not None and not row["counts"][t]:
                said.append(torch.zeros_like(x))  # padding has no output to compare
                continue
            recent.append(x)
            weights = self.choose(memory.router, self.summary(memory, x, row, recent))
            size = len(tokens) // self.config.num_chapters
            chosen = [token for c in weights for token in tokens[c * size : (c + 1) * size]]
            bias = [torch.log(weight) for weight in weights.values() for _ in range(size)]
            said.append(sum(weights.values()) * self.attend(memory.attention, x, chosen, bias))
        return torch.stack(said)

    def summary(self, memory: Any, x: Tensor, row: Row, recent: list[Tensor]) -> Tensor:
        """What a token's choice rests on."""
        newest = recent[-self.config.routing_window_size :]
        rolling = sum(newest) / len(newest)
        return {
            "sequence": row["summary"],
            "token": x,
            "rolling": rolling,
            "hybrid": (rolling + row["summary"]) / 2 if row["seen"] else rolling,
        }[self.strategy(memory)]

    def choose(self, router: Any, summary: Tensor) -> dict[int, Tensor]:
        """The k most probable chapters; their p_c, made to sum to 1 if there are several."""
        p = softmax(list(linear(router.proj, summary)))
        best = sorted(range(len(p)), key=lambda c: -number(p[c]))[: self.config.top_k_chapters]
        total = sum(p[c] for c in best) if len(best) > 1 else 1.0
        return {c: p[c] / total for c in best}

    def attend(self, attention: Any, x: Tensor, tokens: list[Tensor], bias: list[Any]) -> Tensor:
        """softmax(q . k_m / sqrt(k) + bias_m) v_m by head, W_o."""
        heads = self.config.num_heads
        queries = heads_of(linear(attention.q_proj, x), heads)
        keys = [heads_of(linear(attention.k_proj, token), heads) for token in tokens]
        values = [heads_of(linear(attention.v_proj, token), heads) for token in tokens]
        said = []
        for h, query in enumerate(queries):
            scores = [query @ key[h] / len(query) ** 0.5 + more for key, more in zip(keys, bias, strict=True)]
            weights = softmax(scores)
            said.append(sum(weight * value[h] for weight, value in zip(weights, values, strict=True)))
        return linear(attention.o_proj, torch.cat(said))

    def bank(self, memory: Any) -> list[Tensor]:
        """All tokens: rows of M, or of A B^T; where the bank is quantised, rows of what is rounded."""
        bank = memory.bank.bank if self.config.use_chapters else memory.bank
        bank = bank.bank if self.config.quantize_memory else bank
        if not self.config.use_low_rank_memory or self.config.low_rank_mode == "reduced_dim":
            return [self.rounded(row) for row in bank.tokens.weight]
        right = [self.rounded(row) for row in bank.right.weight]
        return [torch.stack([self.rounded(row) @ other for other in right]) for row in bank.left.weight]

    def rounded(self, row: Tensor) -> Tensor:
        """round(x / scale) scale, scale = max|x| / q_max in each group; the gradient as if of x."""
        if not self.config.quantize_memory:
            return row
        q_max = Q_MAX[self.config.memory_quant_bits]
        width = ceil(len(row) / ceil(len(row) / self.config.quant_group_size))
        found = []
        for start in range(0, len(row), width):
            group = row[start : start + width]
            scale = number(group.abs().max()) / q_max
            found += [x + (round(number(x) / scale) * scale - x).detach() for x in group]
        return torch.stack(found)

    def write_row(self, memory: Any, hidden: Tensor, row: Row, mask: Tensor) -> Row:
        tokens = [x for x, counts in zip(hidden, mask, strict=True) if counts]
        recent = [*row["recent"], *tokens]
        return {
            "summary": sum(tokens) / len(tokens),
            "seen": True,
            "recent": recent[max(0, len(recent) - self.window(memory)) :],
            "counts": None,
        }

    def named(self, memory: Any, row: Row) -> dict[str, Any]:
        if not self.config.use_chapters:
            return {}
        return {"summary": row["summary"], "seen": row["seen"], "recent": row["recent"]}

    def theirs(self, memory: Any, state: Any, b: int) -> dict[str, Any]:
        if not self.config.use_chapters:
            return {}
        recent = list(state.recent[b][state.mask[b]])
        return {"summary": state.summary[b], "seen": bool(state.seen[b]), "recent": recent}
