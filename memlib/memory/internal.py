"""LM2's internal memory: slots with an input, a forget and an output gate.

Axes: b batch, n tokens of a segment, s slots, d hidden, e slot width, h heads, k head width.

Where the paper (Kang et al. 2025, arXiv 2502.06049) is ambiguous or its released code contradicts it:

- The paper multiplies a [tokens, d] gate with a [slots, d] memory, which only closes when there are as
  many slots as tokens. Here the output gate scales what a token *read*, so all sizes are free.
- The paper's update uses the segment's own tokens before the segment's logits are out, and its code
  pools gates over the whole segment: the last token changes the outputs of the first. Here a segment
  is written after its logits are computed and is visible from the next segment on (law L1).
- The code keeps one bank on the module and never resets it. Here state goes in and comes out (L2).
- The code has no output gate; the paper does, and so do we.
- Slots start as the identity; `identity_slots` extends that to any number of slots and any width.
- `write: attention` is the paper's cross-attention write in the form its code derives from (relational
  memory core). It is faithful and learns slowly. `write: addressed` is ours: docs/diary.md has the
  measurements that led to it.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import cast

import torch
from einops import rearrange, reduce, repeat
from torch import Tensor, nn
from torch.nn import functional as F

from memlib.config import InternalMemoryConfig
from memlib.memory.address import SlotAddress, identity_slots
from memlib.memory.base import Memory, State, axes, zeros
from memlib.memory.gates import Gate, gates_of_pairs
from memlib.nn.hook_point import HookPoint
from memlib.nn.linear import Linear
from memlib.nn.norm import RMSNorm
from memlib.ops import gated_write, memory_attention, memory_attention_weights, read_at, token_shift


@dataclass(frozen=True)
class SlotState(State):
    """slots: [b s e]."""

    slots: Tensor = axes("batch slot feature")


class InternalMemory(Memory):
    """Persistent slots, read by cross-attention, written through gates (Kang et al. 2025, arXiv
    2502.06049).
    """

    start: Tensor

    def __init__(self, config: InternalMemoryConfig, hidden_dim: int) -> None:
        super().__init__(config, hidden_dim)
        slot_dim = config.slot_dim or hidden_dim
        self.register_buffer("start", torch.empty(config.num_slots, slot_dim), persistent=False)
        if config.write == "addressed":
            address = SlotAddress(
                hidden_dim, config.num_slots, config.num_heads, slot_dim, config.address_sharpness
            )
            self.reader: nn.Module = AddressedRead(config, hidden_dim, slot_dim, address)
            self.writer: nn.Module = AddressedWrite(config, hidden_dim, slot_dim, address)
        else:
            self.reader = AttentionRead(config, hidden_dim, slot_dim)
            self.writer = AttentionWrite(config, hidden_dim, slot_dim)
        self.before_point = HookPoint("before", "batch slot feature")
        self.after_point = HookPoint("after", "batch slot feature")
        self.reset_parameters()

    def reset_parameters(self) -> None:
        self.start.copy_(identity_slots(*self.start.shape))

    def init_state(self, batch_size: int) -> SlotState:
        return SlotState(zeros(self, batch_size, *self.start.shape) + self.start)

    def read(self, hidden: Tensor, state: SlotState) -> Tensor:
        return self.reader(hidden, state.slots)

    def write(self, hidden: Tensor, state: SlotState, mask: Tensor) -> SlotState:
        self.before_point(state.slots)
        slots = self.writer(hidden, state.slots, mask)
        self.after_point(slots)
        return SlotState(slots)


class OutputGate(nn.Module):
    """y = sigma(read W_g + b) * read: the paper's output gate on a read; [b n d] -> [b n d]."""

    def __init__(self, hidden_dim: int) -> None:
        super().__init__()
        self.gate = Gate(hidden_dim, hidden_dim)
        self.gate_point = HookPoint("reader.output_gate", "batch token feature")

    def forward(self, read: Tensor) -> Tensor:
        gate = torch.sigmoid(self.gate(read))
        self.gate_point(gate)
        return gate * read


class AddressedRead(nn.Module):
    """y = g_out * ((a_t M / h) W_o), with the token's own address a_t.  hidden: [b n d] -> [b n d]."""

    def __init__(
        self, config: InternalMemoryConfig, hidden_dim: int, slot_dim: int, address: SlotAddress
    ) -> None:
        super().__init__()
        self.address = address
        self.o_proj = Linear(slot_dim, hidden_dim)
        self.output_gate = OutputGate(hidden_dim) if config.output_gate else nn.Identity()
        self.weight_point = HookPoint("reader.weight", "batch token slot")

    def forward(self, hidden: Tensor, slots: Tensor) -> Tensor:
        address, h = self.address(hidden), self.address.num_heads
        self.weight_point(lambda: address / h)
        by_book = rearrange(address, "b n (h s) -> b n h s", h=h)
        read = read_at(by_book, rearrange(slots, "b (h s) e -> b h s e", h=h))
        return self.output_gate(self.o_proj(read))


class AddressedWrite(nn.Module):
    """Each token writes to the slots that its key addresses, one token after another:

        a_t = address(key_t)                            weights over slots
        i_t = sigma(c_t W_i),  f_t = sigma(c_t W_f)     input gate; share of old content that stays
        M_s <- (1 - a_ts i_t (1 - f_t)) M_s + a_ts i_t tanh(x_t W_v)

    key = x_{t-1} at the start, a learned mixture of x_{t-1} and x_t later (a token shift): the key of a
    value is the token before it. c = [x_t, x_{t-1}]. A token with a closed input gate leaves every slot
    exactly as it was, so that noise does not wear the memory down.
    """

    def __init__(
        self, config: InternalMemoryConfig, hidden_dim: int, slot_dim: int, address: SlotAddress
    ) -> None:
        super().__init__()
        self.address = address
        self.shift, self.shift_init = nn.Parameter(torch.empty(hidden_dim)), config.shift_init
        self.v_proj = Linear(hidden_dim, slot_dim)
        self.input_gate = Gate(2 * hidden_dim, 1, config.input_bias)
        self.forget_gate = Gate(2 * hidden_dim, 1, config.forget_bias)
        self.weight_point = HookPoint("writer.weight", "batch token slot")
        self.input_point = HookPoint("writer.input", "batch token")
        self.forget_point = HookPoint("writer.forget", "batch token")
        self.reset_parameters()

    def reset_parameters(self) -> None:
        nn.init.constant_(self.shift, self.shift_init)

    def forward(self, hidden: Tensor, slots: Tensor, mask: Tensor) -> Tensor:
        hidden = hidden * rearrange(mask, "b n -> b n 1")
        address = self.address(token_shift(hidden, self.shift))
        logits = gates_of_pairs(hidden, (self.input_gate, self.forget_gate))
        opened, kept = (rearrange(torch.sigmoid(logit), "b n 1 -> b n") for logit in logits)
        self.weight_point(address)
        self.input_point(opened)
        self.forget_point(kept)
        strength = address * rearrange(opened * mask, "b n -> b n 1")
        erase = strength * rearrange(1 - kept, "b n -> b n 1")
        return gated_write(slots, strength, erase, torch.tanh(self.v_proj(hidden)))


class AttentionRead(nn.Module):
    """y = g_out * (softmax(Q K^T / sqrt(k)) V W_o): the paper's read, by content.

    Q = hidden W_q, K = slots W_k, V = slots W_v.  hidden: [b n d], slots: [b s e] -> [b n d].
    """

    def __init__(self, config: InternalMemoryConfig, hidden_dim: int, slot_dim: int) -> None:
        super().__init__()
        self.num_heads = config.num_heads
        self.q_proj = Linear(hidden_dim, slot_dim)
        self.k_proj = Linear(slot_dim, slot_dim)
        self.v_proj = Linear(slot_dim, slot_dim)
        self.o_proj = Linear(slot_dim, hidden_dim)
        self.output_gate = OutputGate(hidden_dim) if config.output_gate else nn.Identity()
        self.weight_point = HookPoint("reader.weight", "batch head token slot")

    def forward(self, hidden: Tensor, slots: Tensor) -> Tensor:
        q = rearrange(self.q_proj(hidden), "b n (h k) -> b h n k", h=self.num_heads)
        k = rearrange(self.k_proj(slots), "b s (h k) -> b h s k", h=self.num_heads)
        v = rearrange(self.v_proj(slots), "b s (h k) -> b h s k", h=self.num_heads)
        self.weight_point(lambda: memory_attention_weights(q, k))
        read = cast(Tensor, memory_attention(q, k, v))
        return self.output_gate(self.o_proj(rearrange(read, "b h n k -> b n (h k)")))


class AttentionWrite(nn.Module):
    """The paper's write, made causal: slots attend to [slots; segment] after the segment is complete.

        U  = Attn(slots W_q, [slots; x] W_k, [slots; x] W_v),  U <- norm(slots + U), U <- norm(U + mlp(U))
        i, f = sigma(mean(x) W_x + tanh(slots) W_m + b),  b_i = 0, b_f = 1
        M' = f * M + i * tanh(U)

    with x = hidden W_in at the slots' width. The pooled mean is over the finished segment only.
    """

    def __init__(self, config: InternalMemoryConfig, hidden_dim: int, slot_dim: int) -> None:
        super().__init__()
        self.num_heads = config.num_heads
        self.in_proj = Linear(hidden_dim, slot_dim)
        self.q_proj = Linear(slot_dim, slot_dim)
        self.k_proj = Linear(slot_dim, slot_dim)
        self.v_proj = Linear(slot_dim, slot_dim)
        self.mlp = nn.Sequential(
            Linear(slot_dim, slot_dim, bias=True), nn.ReLU(), Linear(slot_dim, slot_dim, bias=True)
        )
        self.attended_norm, self.mlp_norm = RMSNorm(slot_dim), RMSNorm(slot_dim)
        self.input_gate = Gate(2 * slot_dim, slot_dim, config.input_bias)
        self.forget_gate = Gate(2 * slot_dim, slot_dim, config.forget_bias)
        self.weight_point = HookPoint("writer.weight", "batch head slot source")
        self.input_point = HookPoint("writer.input", "batch slot feature")
        self.forget_point = HookPoint("writer.forget", "batch slot feature")

    def forward(self, hidden: Tensor, before: Tensor, mask: Tensor) -> Tensor:
        slots = before.to(hidden.dtype)
        x = self.in_proj(hidden) * rearrange(mask, "b n -> b n 1")
        update = self.attended_norm(slots + self.attend(slots, x, mask))
        update = torch.tanh(self.mlp_norm(update + self.mlp(update)))
        count = rearrange(mask.sum(1).clamp(min=1), "b -> b 1").to(x.dtype)
        pooled = reduce(x, "b n e -> b e", "sum") / count
        context = torch.cat((repeat(pooled, "b e -> b s e", s=slots.shape[1]), torch.tanh(slots)), -1)
        opened = torch.sigmoid(self.input_gate(context))
        kept = torch.sigmoid(self.forget_gate(context))
        self.input_point(opened)
        self.forget_point(kept)
        return kept * before + opened * update

    def attend(self, slots: Tensor, x: Tensor, mask: Tensor) -> Tensor:
        source = torch.cat((slots, x), 1)
        allowed = F.pad(mask, (slots.shape[1], 0), value=True)

        def heads(tensor: Tensor) -> Tensor:
            return rearrange(tensor, "b j (h k) -> b h j k", h=self.num_heads)

        q, k, v = heads(self.q_proj(slots)), heads(self.k_proj(source)), heads(self.v_proj(source))
        bias = torch.zeros_like(allowed, dtype=q.dtype).masked_fill(~allowed, -torch.inf)
        self.weight_point(lambda: memory_attention_weights(q, k, bias=bias))
        read = cast(Tensor, memory_attention(q, k, v, bias=bias))
        return rearrange(read, "b h s k -> b s (h k)")
