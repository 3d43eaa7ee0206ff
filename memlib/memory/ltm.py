"""Long-term memory (LTM): a bank of compressed tokens, read by attention, written through one gate.

Axes: b batch, n tokens of a segment, c tokens that survive compression, s slots, d hidden, e slot width,
k key width (half of e).

A slot is a row of the bank: its first half is the key it is found by, its second half what it says.
Slots start with fixed random keys and zero values. Source: "LTM Transformer Architecture" (docs/coverage.md).
Choices it leaves open:

- Its attention scores are linear (no softmax) over the very rows it returns; with one row for both, a
  slot can only answer with what it was asked. Hence the halves, and a softmax.
- Which slot a token updates is not said. Here it is the slot its key means: the same attention, asked
  with the key the token is filed under. So writing moves a slot's key to what is asked of it.
- `slots: fixed` spreads a write over the slots that its key attends to. `slots: adaptive` assigns one slot by
  content, allocates free slots when needed and reclaims unused ones: `adaptive_slots.py` has the rule.
- `attention: sparse` keeps each token's top_k slots. It still scores every slot; only the weighted sum of
  values is cheaper.
- "Selective update": of a segment's n tokens the ceil(ratio n) most important are written, the others
  are not. A token that is dropped early would never be tried again, and most of the loss of compression
  was that (docs/diary.md). So training draws the survivors (Gumbel top-k: the most important under
  noise), and tells the dropped what they would have been worth (a straight-through gradient).
"""

from __future__ import annotations

from dataclasses import dataclass
from math import ceil

import torch
from einops import einsum, rearrange
from torch import Tensor, nn
from torch.nn import functional as F

from memlib.config import LtmMemoryConfig
from memlib.memory.adaptive_slots import SlotRule
from memlib.memory.address import identity_slots
from memlib.memory.base import Memory, State, axes, zeros
from memlib.memory.gates import Gate
from memlib.memory.key_attention import MemoryAttention, TokenKey, in_time_order
from memlib.nn.hook_point import HookPoint
from memlib.nn.linear import Linear
from memlib.ops import gated_write, take_rows

SLOPE = 0.25  # of sigma at 0


@dataclass(frozen=True)
class LtmState(State):
    """slots: [b s e]; age: [b s], segments since last use (fixed slots: 0); segments: [b] written."""

    slots: Tensor = axes("batch slot feature")
    age: Tensor = axes("batch slot")
    segments: Tensor = axes("batch")


class LongTermMemory(Memory):
    """A bank of slots, written through a compression gate and read by attention."""

    start: Tensor

    def __init__(self, config: LtmMemoryConfig, hidden_dim: int) -> None:
        super().__init__(config, hidden_dim)
        key_dim = value_dim = config.slot_dim // 2
        self.rule: SlotRule | None = None
        if config.slots == "adaptive":
            self.rule = SlotRule(config.match_threshold, config.reclaim_after, config.prune_below)
        self.register_buffer("start", torch.empty(config.num_slots, config.slot_dim), persistent=False)
        self.key = TokenKey(hidden_dim, key_dim, config.shift_init)
        top_k = config.top_k if config.attention == "sparse" else None
        self.reader = BankRead(self.key, value_dim, hidden_dim, config.sharpness, top_k)
        self.writer = BankWrite(config, hidden_dim, self.key, self.reader.attention)
        self.before_point = HookPoint("before", "batch slot feature")
        self.after_point = HookPoint("after", "batch slot feature")
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Fixed slots start with random keys and zero values, adaptive slots free."""
        self.start.zero_()
        if self.rule is None:
            keys = self.start.shape[1] // 2
            self.start[:, :keys] = identity_slots(len(self.start), keys).to(self.start)

    def init_state(self, batch_size: int) -> LtmState:
        slots = zeros(self, batch_size, *self.start.shape) + self.start
        age = zeros(self, *slots.shape[:2], dtype=torch.int64)
        if self.rule:
            age = age + self.rule.reclaim_after
        return LtmState(slots, age, zeros(self, batch_size, dtype=torch.int64))

    def read(self, hidden: Tensor, state: LtmState) -> Tensor:
        return self.reader(hidden, state.slots, self.free(state.age))

    def free(self, age: Tensor) -> Tensor | None:
        """Free slots, which are not read: [b s]; None if there can be none."""
        return age >= self.rule.reclaim_after if self.rule else None

    def write(self, hidden: Tensor, state: LtmState, mask: Tensor) -> LtmState:
        slots = state.slots
        self.before_point(slots)
        tokens = self.writer.compress(hidden, mask, state.segments)
        if self.rule:
            query = self.key.query(hidden).to(slots.dtype)
            asked = self.rule.asked(query, mask, halves(slots)[0], state.age)
            slots, age = self.writer.take_slots(tokens, slots, state.age.masked_fill(asked, -1), self.rule)
            slots, age = self.rule.reclaim(slots, halves(slots)[1], age)
        else:
            slots, age = self.writer.spread(tokens, slots), state.age
        self.after_point(slots)
        return LtmState(slots, age, state.segments + 1)


class BankRead(nn.Module):
    """y = Attn(query, slots' keys, slots' values) W_o.  hidden: [b n d], slots: [b s e], free: [b s]."""

    def __init__(
        self, key: TokenKey, value_dim: int, hidden_dim: int, sharpness: float, top_k: int | None
    ) -> None:
        super().__init__()
        self.key = key
        self.attention = MemoryAttention(sharpness, "reader.attention.weight", top_k)
        self.o_proj = Linear(value_dim, hidden_dim)

    def forward(self, hidden: Tensor, slots: Tensor, free: Tensor | None) -> Tensor:
        keys, values = halves(slots)
        bias = None if free is None else slots.new_zeros(free.shape).masked_fill(free, -torch.inf)
        return self.o_proj(self.attention(self.key.query(hidden), keys, values, bias))


@dataclass(frozen=True)
class Survivors:
    """Tokens selected for writing. new: [b c e]; strength: [b c], zero where not kept: [b c]; index: [b c]
    in the segment; length: n.
    """

    new: Tensor
    strength: Tensor
    kept: Tensor
    index: Tensor
    length: int


class BankWrite(nn.Module):
    """Select tokens of a segment, then let each update the slots that match its key, one after another:

        new_t = [key_t, tanh(x_t W_v)]                   a token at the bank's width
        g_t = sigma(new_t W_g + b)                       its importance
        a_t = softmax_s(sharpness sqrt(k) key_t . M_s)   attention over the bank before the segment
        M_s <- (1 - a_ts g_t) M_s + a_ts g_t new_t       for the selected tokens t

    In training a dropped token takes part with strength zero: nothing is written, and the gradient of its
    importance is the effect that a small strength would have had, times sigma's slope at its start.
    """

    def __init__(
        self, config: LtmMemoryConfig, hidden_dim: int, key: TokenKey, attention: MemoryAttention
    ) -> None:
        super().__init__()
        self.key, self.attention = key, attention
        self.v_proj = Linear(hidden_dim, config.slot_dim // 2)
        self.importance_gate = Gate(config.slot_dim, 1, config.importance_bias)
        self.keep, self.ratio = config.keep, config.memory_compression_ratio
        self.exploration = config.exploration
        self.importance_point = HookPoint("writer.importance", "batch token")
        self.kept_point = HookPoint("writer.kept", "batch token")
        self.weight_point = HookPoint("writer.weight", "batch token slot")
        self.input_point = HookPoint("writer.input", "batch token")
        self.forget_point = HookPoint("writer.forget", "batch token")

    def compress(self, hidden: Tensor, mask: Tensor, segments: Tensor) -> Survivors:
        """The selected tokens of a segment, in time order; hidden: [b n d], mask: [b n], segments: [b]."""
        hidden, n = hidden * rearrange(mask, "b n -> b n 1"), mask.shape[1]
        new = torch.cat((self.key.key(hidden), torch.tanh(self.v_proj(hidden))), -1)
        logit = rearrange(self.importance_gate(new), "b n 1 -> b n")
        importance = torch.sigmoid(logit)
        order = self.explored(logit) if self.keep == "learned" else lottery(mask, segments)
        kept = survivors(order, mask, self.ratio)
        opened = importance * kept
        if self.training:  # the gradient of what a dropped token would have been worth; its value is zero
            opened = opened + SLOPE * (logit - logit.detach()) * (mask & ~kept)
        self.importance_point(importance)
        self.kept_point(kept)
        self.input_point(opened)
        self.forget_point(lambda: torch.zeros_like(opened))  # overwritten content is fully erased
        index = in_time_order(kept, n if self.training else ceil(self.ratio * n))
        new, opened, kept = (take_rows(tokens, index) for tokens in (new, opened, kept))
        return Survivors(new, opened, kept, index, n)

    def spread(self, tokens: Survivors, slots: Tensor) -> Tensor:
        """Fixed slots: every token updates the slots that match its key; slots: [b s e] -> [b s e]."""
        keys = halves(slots)[0].to(tokens.new.dtype)
        weight = self.attention.weights(halves(tokens.new)[0], keys)
        self.weight_point(lambda: in_segment(weight, tokens))
        strength = weight * rearrange(tokens.strength, "b c -> b c 1")
        return gated_write(slots, strength, strength, tokens.new)

    def take_slots(
        self, tokens: Survivors, slots: Tensor, age: Tensor, rule: SlotRule
    ) -> tuple[Tensor, Tensor]:
        """Adaptive slots: every token updates one slot or allocates one; slots: [b s e], age: [b s].

        A dropped token that would allocate a slot has no slot to be read from, hence no gradient of its
        importance.
        """
        key, value = halves(tokens.new.to(slots.dtype))
        strength = tokens.strength.to(slots.dtype)
        where, fresh, age = rule.choose(key, strength, tokens.kept, halves(slots)[0], age)
        weight = F.one_hot(where, slots.shape[1]).to(slots.dtype)
        self.weight_point(lambda: in_segment(weight, tokens))
        g = rearrange(strength, "b c -> b c 1")
        taken, kept = rearrange(fresh, "b c -> b c 1"), rearrange(tokens.kept, "b c -> b c 1")
        content = torch.cat((torch.where(taken, key, g * key), g * value), -1)
        erase = torch.where(taken, kept.to(g.dtype), g)
        return gated_write(slots, weight * (kept | ~taken), weight * erase, content), age

    def explored(self, logit: Tensor) -> Tensor:
        """Importance to select by: in training with Gumbel noise; [b n] -> [b n]."""
        if not self.training or not self.exploration:
            return logit
        return logit - self.exploration * torch.log(torch.empty_like(logit).exponential_())


def halves(slots: Tensor) -> tuple[Tensor, Tensor]:
    """Keys and values of slots: [… e] -> [… k], [… e-k]."""
    key, value = slots.chunk(2, -1)
    return key, value


def in_segment(weight: Tensor, tokens: Survivors) -> Tensor:
    """Weights of the selected tokens [b c s] at their own positions in the segment: [b n s]."""
    at = F.one_hot(tokens.index, tokens.length).to(weight.dtype)
    return einsum(at, weight, "b c n, b c s -> b n s")


@torch.no_grad()
def survivors(order: Tensor, mask: Tensor, ratio: float) -> Tensor:
    """The ceil(ratio n') real tokens of the highest order, of n' real tokens of a row: [b n] true.

    order, mask: [b n]. Values that differ by rounding only count as equal, and ties go to the earlier token:
    the result for repeated tokens must not depend on the summation order of a matrix product.
    """
    rounded = torch.round(order.double() * 2**20).masked_fill(~mask, -torch.inf)
    order = rounded.argsort(stable=True, dim=-1, descending=True)
    count = torch.ceil(ratio * mask.sum(-1, keepdim=True).double())
    first = torch.arange(mask.shape[-1], device=mask.device) < count
    return torch.zeros_like(mask).scatter(-1, order, first) & mask


@torch.no_grad()
def lottery(mask: Tensor, segments: Tensor) -> Tensor:
    """A pseudo-random order that does not depend on the tokens: by segment and place in it, [b n] in [0, 1).

    The control for learned importance. It uses the number of real tokens before each token, not its
    position, so that padding on the left changes nothing.
    """
    place = mask.cumsum(-1) + 1000 * (rearrange(segments, "b -> b 1") % 1000)
    mixed = (place * 2654435761) % 2**32
    mixed = ((mixed ^ (mixed >> 15)) * 2246822519) % 2**32
    return ((mixed ^ (mixed >> 13)) % 2**20).double() / 2**20
