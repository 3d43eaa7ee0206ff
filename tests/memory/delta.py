"""A memory the package does not have: a gated delta rule, in chunks.  With its reference.

    M <- a_t (I - b_t k_t k_t^T) M + b_t k_t v_t^T,   y_t = (q_t^T M) W_o

k, q: unit vectors; a, b: gates. In a chunk let A_t = a_1 … a_t, as a logarithm, for it may be 0. What token t
adds is k_t w_t^T with

    (I + L) W = B (V - A K M),   L_ur = b_u (A_u / A_r) (k_u . k_r)  for r < u

which is one triangular solve; M' = A_c M + sum_u (A_c / A_u) k_u w_u^T.
Source: Yang et al. 2024, arXiv 2412.06464 (Gated DeltaNet).

Axes: b batch, n tokens of a segment, c tokens of a chunk, d hidden, k key width, e value width.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from einops import einsum, rearrange, repeat
from torch import Tensor
from torch.nn import functional as F

from memlib.config.fields import option
from memlib.config.memory import MemoryOptions
from memlib.memory import Memory, State, axes
from memlib.memory.base import zeros
from memlib.memory.gates import Gate
from memlib.nn.linear import Linear

from .references.base import Reference, Row, linear, sigmoid, unit


@dataclass(kw_only=True)
class DeltaConfig(MemoryOptions):
    """The gated delta rule."""

    chunk: int = option(64, "tokens that are written in one solve", 1, small=2)
    key_dim: int = option(64, "width of a key", 1, small=3)
    value_dim: int = option(64, "width of a value", 1, small=6)


@dataclass(frozen=True)
class DeltaState(State):
    """matrix: [b k e]."""

    matrix: Tensor = axes("batch key value")


class DeltaMemory(Memory):
    """A matrix that a key reads and corrects."""

    def __init__(self, config: DeltaConfig, hidden_dim: int) -> None:
        super().__init__(config, hidden_dim)
        self.q_proj = Linear(hidden_dim, config.key_dim)
        self.k_proj = Linear(hidden_dim, config.key_dim)
        self.v_proj = Linear(hidden_dim, config.value_dim)
        self.o_proj = Linear(config.value_dim, hidden_dim)
        self.keep_gate, self.write_gate = Gate(hidden_dim, 1), Gate(hidden_dim, 1)

    def init_state(self, batch_size: int) -> DeltaState:
        return DeltaState(zeros(self, batch_size, self.config.key_dim, self.config.value_dim))

    def read(self, hidden: Tensor, state: DeltaState) -> Tensor:
        query = F.normalize(self.q_proj(hidden), dim=-1)
        return self.o_proj(einsum(query, state.matrix, "b n k, b k e -> b n e"))

    def write(self, hidden: Tensor, state: DeltaState, mask: Tensor) -> DeltaState:
        order = torch.argsort((~mask).byte(), dim=1, stable=True)  # tokens that count first
        hidden = hidden.gather(1, repeat(order, "b n -> b n d", d=hidden.shape[-1]))
        counts = rearrange(mask.gather(1, order), "b n -> b n 1")
        keys, values = F.normalize(self.k_proj(hidden), dim=-1), self.v_proj(hidden)
        log_keep = torch.where(counts, F.logsigmoid(self.keep_gate(hidden)), 0.0)
        strength = torch.where(counts, torch.sigmoid(self.write_gate(hidden)), 0.0)
        matrix, parts = state.matrix, (keys, values, log_keep, strength)
        for chunk in zip(*(part.split(self.config.chunk, 1) for part in parts), strict=True):
            matrix = self.write_chunk(matrix, *chunk)
        return DeltaState(matrix)

    def write_chunk(
        self, matrix: Tensor, keys: Tensor, values: Tensor, log_keep: Tensor, b: Tensor
    ) -> Tensor:
        """matrix: [b k e], keys: [b c k], values: [b c e], log_keep, b: [b c 1] -> [b k e]."""
        total = torch.cumsum(log_keep, 1)
        ratio = torch.exp((total - rearrange(total, "b c 1 -> b 1 c")).tril())
        lower = (b * ratio * einsum(keys, keys, "b c k, b r k -> b c r")).tril(-1)
        wanted = b * (values - torch.exp(total) * einsum(keys, matrix, "b c k, b k e -> b c e"))
        written = self.solve(lower, wanted)
        left = torch.exp(total[:, -1:] - total)
        return torch.exp(total[:, -1:]) * matrix + einsum(keys * left, written, "b c k, b c e -> b k e")

    def solve(self, lower: Tensor, wanted: Tensor) -> Tensor:
        """W of (I + L) W = wanted; lower: [b c c], wanted: [b c e]."""
        eye = torch.eye(lower.shape[-1], dtype=lower.dtype, device=lower.device)
        return torch.linalg.solve_triangular(eye + lower, wanted, upper=False, unitriangular=True)


class OnlyTheFirstChunk(DeltaMemory):
    """A write that stops after the first chunk of a segment."""

    def write(self, hidden: Tensor, state: DeltaState, mask: Tensor) -> DeltaState:
        return super().write(hidden, state, mask & (mask.cumsum(1) <= self.config.chunk))


class WithoutTheSolve(DeltaMemory):
    """A chunk whose tokens do not see what the earlier ones of the chunk wrote."""

    def solve(self, lower: Tensor, wanted: Tensor) -> Tensor:
        return wanted


class DeltaReference(Reference):
    variants = ({"chunk": 3},)

    def init_row(self, memory: Any) -> Row:
        config = self.config
        return {"matrix": torch.zeros(config.key_dim, config.value_dim, dtype=torch.float64)}

    def read_row(self, memory: Any, hidden: Tensor, row: Row) -> Tensor:
        """y_t = (q_t^T M) W_o."""
        return torch.stack(
            [linear(memory.o_proj, unit(linear(memory.q_proj, x)) @ row["matrix"]) for x in hidden]
        )

    def write_row(self, memory: Any, hidden: Tensor, row: Row, mask: Tensor) -> Row:
        """M <- a M - a b k (k^T M) + b k v^T, token after token."""
        matrix = row["matrix"]
        for x, counts in zip(hidden, mask, strict=True):
            if counts:
                k, v = unit(linear(memory.k_proj, x)), linear(memory.v_proj, x)
                a, b = sigmoid(linear(memory.keep_gate, x)), sigmoid(linear(memory.write_gate, x))
                matrix = a * matrix - a * b * torch.outer(k, k @ matrix) + b * torch.outer(k, v)
        return {"matrix": matrix}

    def named(self, memory: Any, row: Row) -> dict[str, Any]:
        return row

    def theirs(self, memory: Any, state: Any, b: int) -> dict[str, Any]:
        return {"matrix": state.matrix[b]}
