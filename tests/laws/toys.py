"""Memories the package does not have, to show that the laws cover what they have never seen."""

from __future__ import annotations

from dataclasses import dataclass, make_dataclass
from typing import Any

import torch
from einops import einsum, rearrange, reduce
from torch import Tensor, nn
from torch.nn import functional as F

from memlib import config as configuration
from memlib.config import config as whole
from memlib.config.fields import option
from memlib.config.memory import MemoryOptions
from memlib.memory import MEMORIES, Memory, State, axes


def register(monkeypatch: Any, **memories: tuple[type[Memory], type]) -> None:
    """Add memories, each with its options, for a test: what a person would write into the package's files."""
    fields = [(kind, options, option(options, "of a test")) for kind, (_, options) in memories.items()]
    extended = make_dataclass("MemoryConfig", fields, bases=(configuration.MemoryConfig,), kw_only=True)
    for module in (configuration, whole):
        monkeypatch.setattr(module, "MemoryConfig", extended)
    for kind, (memory, _) in memories.items():
        monkeypatch.setitem(MEMORIES, kind, memory)


@dataclass(kw_only=True)
class RingConfig(MemoryOptions):
    """The newest tokens, as keys and values."""

    capacity: int = option(10, "items kept; at least a segment", 1, small=6)
    sharpness: float = option(4.0, "scale of the scores", 0.0)


@dataclass(frozen=True)
class RingState(State):
    """keys, values: [b c d]; count: [b] items ever written."""

    keys: Tensor = axes("batch slot feature")
    values: Tensor = axes("batch slot feature")
    count: Tensor = axes("batch")


class RingMemory(Memory):
    """Item i of a row stands in place i mod capacity; read by attention over what stands there."""

    start: Tensor

    def __init__(self, config: RingConfig, hidden_dim: int) -> None:
        super().__init__(config, hidden_dim)
        self.v_proj = nn.Linear(hidden_dim, hidden_dim, bias=False)
        self.register_buffer("start", torch.zeros(config.capacity, hidden_dim), persistent=False)

    def init_state(self, batch_size: int) -> RingState:
        empty = self.start.expand(batch_size, -1, -1)
        return RingState(empty.clone(), empty.clone(), torch.zeros(batch_size, dtype=torch.int64))

    def read(self, hidden: Tensor, state: RingState) -> Tensor:
        score = self.config.sharpness * einsum(hidden, state.keys, "b n d, b c d -> b n c")
        free = torch.arange(self.config.capacity) >= rearrange(state.count, "b -> b 1 1")
        nothing = torch.zeros_like(score[..., :1])
        weight = torch.softmax(torch.cat((nothing, score.masked_fill(free, -torch.inf)), -1), -1)
        return einsum(weight[..., 1:], state.values, "b n c, b c d -> b n d")

    def write(self, hidden: Tensor, state: RingState, mask: Tensor) -> RingState:
        number = rearrange(state.count, "b -> b 1") + mask.cumsum(1) - 1
        return RingState(
            keys=self.put(hidden, number, mask, state.keys),
            values=self.put(self.v_proj(hidden), number, mask, state.values),
            count=state.count + mask.sum(1),
        )

    def put(self, items: Tensor, number: Tensor, mask: Tensor, into: Tensor) -> Tensor:
        place = F.one_hot(number % self.config.capacity, self.config.capacity).to(items.dtype)
        place = place * rearrange(mask, "b n -> b n 1")
        kept = 1 - reduce(place, "b n c -> b c 1", "sum")
        return kept * into + einsum(place, items, "b n c, b n d -> b c d")
