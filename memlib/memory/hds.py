"""Hierarchy of states (HDS): four levels, from the token itself to banks that outlive sequences.

    level 0   h_t, the token itself                                        [b n d]
    level 1   the newest complete blocks of chunk_size tokens              [b r d]
    level 2   the mean of all tokens since the last reset                  [b d]
    level 3   K banks of M slots, each with its own addresses and decay    [b k s e]

A token reads all levels; a learned gate mixes the results.

Axes: b batch, n tokens of a segment, r kept blocks, m blocks a segment can complete, k banks, s slots of
a bank, e slot width, d hidden, l levels.

Source: "MM-Rec Memory Architecture" (docs/coverage.md). From it:

- M <- M decay + new, never a plain overwrite: content is removed by decay only.
- Decay is per token and bank [b n k].

Choices of our own:

- A token multiplies a bank by 2^(-u_tk / (H_k n)): a segment of n neutral tokens (u = 1) halves a bank in
  H_k segments.
- Slots of a bank are selected by the addresses of internal memory (docs/diary.md), one address book per bank.
  Two gates select the banks that a token writes to and reads from.
- A block is visible from the segment after its completion on, like everything else; inside a segment there
  is attention. Blocks count real tokens only, and may cross segment borders.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import cast

import torch
from einops import einsum, rearrange, repeat
from torch import Tensor, nn
from torch.nn import functional as F

from memlib.config import HdsMemoryConfig
from memlib.memory.address import SlotAddress
from memlib.memory.base import Memory, State, axes, zeros
from memlib.memory.gates import Gate, gates_of_pairs
from memlib.nn.hook_point import HookPoint
from memlib.nn.linear import Linear
from memlib.ops import (
    decaying_write,
    memory_attention,
    memory_attention_weights,
    mix,
    read_at,
    token_shift,
)

LEVELS = 4


@dataclass(frozen=True)
class BlockState(State):
    """blocks: [b r d], oldest first; complete: [b r], which of them exist; open: [b d], the sum over the
    incomplete block; filled: [b], its tokens so far.
    """

    blocks: Tensor = axes("batch block feature")
    complete: Tensor = axes("batch block")
    open: Tensor = axes("batch feature")
    filled: Tensor = axes("batch")


@dataclass(frozen=True)
class SummaryState(State):
    """mean: [b d] over the count: [b] tokens since the last reset."""

    mean: Tensor = axes("batch feature")
    count: Tensor = axes("batch")


@dataclass(frozen=True)
class HdsState(State):
    """Levels 1 and 2, and the banks of level 3: [b k s e]."""

    level_1: BlockState
    level_2: SummaryState
    banks: Tensor = axes("batch bank slot feature")


class HdsMemory(Memory):
    """y_t = sum_l g_tl level_l(h_t),  g_t = softmax(h_t W + b): a gated mixture of the levels."""

    def __init__(self, config: HdsMemoryConfig, hidden_dim: int) -> None:
        super().__init__(config, hidden_dim)
        self.token = Linear(hidden_dim, hidden_dim)
        self.blocks = BlockLevel(config, hidden_dim)
        self.summary = SummaryLevel(hidden_dim)
        self.banks = BankLevel(config, hidden_dim)
        self.gate = Gate(hidden_dim, LEVELS)
        self.level_point = HookPoint("level", "batch token level")

    def init_state(self, batch_size: int) -> HdsState:
        return HdsState(
            self.blocks.init_state(batch_size),
            self.summary.init_state(batch_size),
            self.banks.init_state(batch_size),
        )

    def read(self, hidden: Tensor, state: HdsState) -> Tensor:
        levels = [
            self.token(hidden),
            self.blocks.read(hidden, state.level_1),
            self.summary.read(hidden, state.level_2),
            self.banks.read(hidden, state.banks),
        ]
        weight = torch.softmax(self.gate(hidden), -1)
        self.level_point(weight)
        return mix(weight, levels)

    def write(self, hidden: Tensor, state: HdsState, mask: Tensor) -> HdsState:
        return HdsState(
            self.blocks.write(hidden, state.level_1, mask),
            self.summary.write(hidden, state.level_2, mask),
            self.banks.write(hidden, state.banks, mask),
        )

    @property
    def half_lives(self) -> Tensor:
        """Segments in which each bank halves, for neutral tokens: [k], fastest first at the start."""
        return self.banks.half_lives


class BlockLevel(nn.Module):
    """Level 1: attention over the means of the newest complete blocks; hidden: [b n d] -> [b n d].

    An empty block with a learned key and no content is always present, for tokens that match no block.
    """

    def __init__(self, config: HdsMemoryConfig, hidden_dim: int) -> None:
        super().__init__()
        self.chunk_size, self.num_blocks, self.hidden_dim = config.chunk_size, config.num_blocks, hidden_dim
        self.q_proj = Linear(hidden_dim, hidden_dim)
        self.k_proj = Linear(hidden_dim, hidden_dim)
        self.v_proj = Linear(hidden_dim, hidden_dim)
        self.empty_key = nn.Parameter(torch.empty(hidden_dim))
        self.weight_point = HookPoint("blocks.weight", "batch token block")
        self.filled_point = HookPoint("blocks.filled", "batch token")
        self.reset_parameters()

    def reset_parameters(self) -> None:
        nn.init.zeros_(self.empty_key)

    def init_state(self, batch_size: int) -> BlockState:
        return BlockState(
            blocks=zeros(self, batch_size, self.num_blocks, self.hidden_dim),
            complete=zeros(self, batch_size, self.num_blocks, dtype=torch.bool),
            open=zeros(self, batch_size, self.hidden_dim),
            filled=zeros(self, batch_size, dtype=torch.int64),
        )

    def read(self, hidden: Tensor, state: BlockState) -> Tensor:
        empty = repeat(self.empty_key, "d -> b 1 d", b=len(hidden))
        keys = torch.cat((empty, self.k_proj(state.blocks)), 1)
        values = F.pad(self.v_proj(state.blocks), (0, 0, 1, 0))
        there = F.pad(state.complete, (1, 0), value=True)
        bias = torch.zeros_like(there, dtype=hidden.dtype).masked_fill(~there, -torch.inf)
        query = self.q_proj(hidden)
        self.weight_point(lambda: memory_attention_weights(query, keys, bias=bias))
        return cast(Tensor, memory_attention(query, keys, values, bias=bias))

    def write(self, hidden: Tensor, state: BlockState, mask: Tensor) -> BlockState:
        """Add the segment's tokens to blocks; completed blocks join the kept ones.

        With p = tokens of the open block before a token, the token belongs to block p // C of this segment's
        blocks (the open one is block 0). Rows with padding complete blocks at other tokens.
        """
        hidden = hidden.to(state.blocks.dtype)
        most = (self.chunk_size - 1 + hidden.shape[1]) // self.chunk_size  # blocks a segment can complete
        place = rearrange(state.filled, "b -> b 1") + torch.cumsum(mask, 1) - mask.long()
        self.filled_point(lambda: (place % self.chunk_size + 1) / self.chunk_size * mask)
        belongs = F.one_hot(place // self.chunk_size, most + 1).to(hidden) * rearrange(mask, "b n -> b n 1")
        sums = einsum(belongs, hidden, "b n m, b n d -> b m d")
        sums = torch.cat((rearrange(state.open + sums[:, 0], "b d -> b 1 d"), sums[:, 1:]), 1)
        total = state.filled + mask.sum(1)
        done = total // self.chunk_size  # [b], complete blocks

        # The newest r of [kept; completed now]: a window that starts `done` places further on.
        means = torch.cat((state.blocks, sums / self.chunk_size), 1)
        new = torch.arange(most + 1, device=hidden.device) < rearrange(done, "b -> b 1")
        exist = torch.cat((state.complete, new), 1)
        window = torch.arange(self.num_blocks, device=hidden.device) + rearrange(done, "b -> b 1")
        row = torch.arange(len(hidden), device=hidden.device)
        kept = means[rearrange(row, "b -> b 1"), window]
        return BlockState(kept, exist.gather(1, window), sums[row, done], total % self.chunk_size)


class SummaryLevel(nn.Module):
    """Level 2: the mean of all tokens since the last reset; hidden: [b n d] -> [b n d]."""

    def __init__(self, hidden_dim: int) -> None:
        super().__init__()
        self.v_proj = Linear(hidden_dim, hidden_dim)
        self.hidden_dim = hidden_dim

    def init_state(self, batch_size: int) -> SummaryState:
        return SummaryState(zeros(self, batch_size, self.hidden_dim), zeros(self, batch_size))

    def read(self, hidden: Tensor, state: SummaryState) -> Tensor:
        return repeat(self.v_proj(state.mean), "b d -> b n d", n=hidden.shape[1])

    def write(self, hidden: Tensor, state: SummaryState, mask: Tensor) -> SummaryState:
        """mean' = mean + (sum of the new tokens - their number * mean) / count'."""
        hidden = hidden.to(state.mean.dtype)
        number = mask.sum(1).to(hidden)
        count = state.count + number
        new = einsum(hidden, mask.to(hidden), "b n d, b n -> b d")
        change = new - state.mean * rearrange(number, "b -> b 1")
        return SummaryState(state.mean + change / rearrange(count.clamp(min=1), "b -> b 1"), count)


class BankLevel(nn.Module):
    """Level 3: K banks that accumulate and decay, each at its own rate.

        M_k <- M_k prod_t decay_tk + sum_t prod_{u>t} decay_uk  i_t p_tk a_tks v_t
        y_t  = (sum_k r_tk a_tk M_k) W_o

    a: address in each bank, of the previous token for writes (token shift) and of the token itself for
    reads; i: input gate; p, r: softmax over banks for writes and reads; v = tanh(x W_v).
    """

    def __init__(self, config: HdsMemoryConfig, hidden_dim: int) -> None:
        super().__init__()
        k, m, e = config.num_memories, config.num_slots, config.mem_dim
        self.num_memories, self.num_slots, self.mem_dim = k, m, e
        self.address = SlotAddress(hidden_dim, k * m, k, k * config.address_dim, config.address_sharpness)
        self.shift, self.shift_init = nn.Parameter(torch.empty(hidden_dim)), config.shift_init
        self.v_proj = Linear(hidden_dim, e)
        self.o_proj = Linear(e, hidden_dim)
        self.input_gate = Gate(2 * hidden_dim, 1, config.input_bias)
        self.write_gate, self.read_gate = Gate(2 * hidden_dim, k), Gate(hidden_dim, k)
        self.half_life_range = (config.half_life_min, config.half_life_max)
        self.log_half_life = nn.Parameter(torch.empty(k), requires_grad=config.decay == "trained")
        self.pace_gate = Gate(2 * hidden_dim, k) if config.decay == "trained" else None
        self.read_point = HookPoint("banks.reader.weight", "batch token slot")
        self.weight_point = HookPoint("banks.writer.weight", "batch token slot")
        self.input_point = HookPoint("banks.writer.input", "batch token")
        self.bank_point = HookPoint("banks.writer.bank", "batch token bank")
        self.decay_point = HookPoint("banks.writer.decay", "batch token bank")
        self.before_point = HookPoint("banks.before", "batch slot feature")
        self.after_point = HookPoint("banks.after", "batch slot feature")
        self.reset_parameters()

    @torch.no_grad()
    def reset_parameters(self) -> None:
        self.shift.fill_(self.shift_init)
        low, high = map(math.log2, self.half_life_range)
        spectrum = torch.linspace(low, high, self.num_memories) if self.num_memories > 1 else high
        self.log_half_life.copy_(torch.as_tensor(spectrum))

    @property
    def half_lives(self) -> Tensor:
        return torch.exp2(self.log_half_life)

    def init_state(self, batch_size: int) -> Tensor:
        return zeros(self, batch_size, self.num_memories, self.num_slots, self.mem_dim)

    def by_bank(self, address: Tensor) -> Tensor:
        return rearrange(address, "b n (k s) -> b n k s", k=self.num_memories)

    def read(self, hidden: Tensor, banks: Tensor) -> Tensor:
        share = torch.softmax(self.read_gate(hidden), -1)
        address = self.by_bank(self.address(hidden))
        self.read_point(
            lambda: rearrange(address * rearrange(share, "b n k -> b n k 1"), "b n k s -> b n (k s)")
        )
        return self.o_proj(read_at(address, banks, share))

    def write(self, hidden: Tensor, banks: Tensor, mask: Tensor) -> Tensor:
        self.before_point(lambda: rearrange(banks, "b k s e -> b (k s) e"))
        hidden = hidden * rearrange(mask, "b n -> b n 1")
        gates = (self.input_gate, self.write_gate, *([] if self.pace_gate is None else [self.pace_gate]))
        opened, share, *pace = gates_of_pairs(hidden, gates)
        opened, share = torch.sigmoid(opened), torch.softmax(share, -1)
        address = self.address(token_shift(hidden, self.shift))
        self.input_point(lambda: rearrange(opened, "b n 1 -> b n"))
        self.bank_point(share)
        self.weight_point(address)
        strength = share * (opened * rearrange(mask, "b n -> b n 1"))
        values = torch.tanh(self.v_proj(hidden))
        after = decaying_write(banks, self.by_bank(address), strength, self.log_decay(mask, *pace), values)
        self.after_point(lambda: rearrange(after, "b k s e -> b (k s) e"))
        return after

    def log_decay(self, mask: Tensor, logit: Tensor | None = None) -> Tensor:
        """Log of each token's decay factor per bank: [b n k]; 0 for padding.

        = -u ln 2 / (H n), with u = 2 sigma(logit), which is 1 at the start. logit: [b n k] of the pace gate,
        on a token and the one before it.
        """
        pace = rearrange(mask, "b n -> b n 1") / (self.half_lives * mask.shape[1])
        if logit is not None:
            pace = pace * 2 * torch.sigmoid(logit)
        decay = -math.log(2) * pace
        self.decay_point(decay.exp)
        return decay
