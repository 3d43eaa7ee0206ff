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

import torch
from einops import einsum, rearrange, reduce, repeat
from torch import Tensor, nn
from torch.nn import functional as F

from memlib.config import InternalMemoryConfig
from memlib.memory.address import SlotAddress
from memlib.memory.base import Memory, State
from memlib.memory.gates import Gate, gated_write, identity_slots
from memlib.nn.norm import RMSNorm
from memlib.nn.probe import Probe


@dataclass(frozen=True)
class SlotState(State):
    """slots: [b s e]."""

    slots: Tensor


class InternalMemory(Memory):
    """Persistent slots, read by cross-attention, written through gates (spec A2)."""

    start: Tensor

    def __init__(self, config: InternalMemoryConfig, hidden_dim: int) -> None:
        super().__init__()
        slot_dim = config.slot_dim or hidden_dim
        self.register_buffer("start", identity_slots(config.num_slots, slot_dim), persistent=False)
        if config.write == "addressed":
            address = SlotAddress(
                hidden_dim, config.num_slots, config.num_heads, slot_dim, config.address_sharpness
            )
            self.reader: nn.Module = AddressedRead(config, hidden_dim, slot_dim, address)
            self.writer: nn.Module = AddressedWrite(config, hidden_dim, slot_dim, address)
        else:
            self.reader = AttentionRead(config, hidden_dim, slot_dim)
            self.writer = AttentionWrite(config, hidden_dim, slot_dim)
        self.before_probe = Probe("batch slot feature")
        self.after_probe = Probe("batch slot feature")

    def init_state(self, batch_size: int) -> SlotState:
        return SlotState(repeat(self.start, "s e -> b s e", b=batch_size))

    def read(self, hidden: Tensor, state: SlotState) -> Tensor:
        return self.reader(hidden, state.slots)

    def write(self, hidden: Tensor, state: SlotState, mask: Tensor) -> SlotState:
        slots = self.writer(hidden, self.before_probe(state.slots), mask)
        return SlotState(self.after_probe(slots))


class OutputGate(nn.Module):
    """y = sigma(read W_g + b) * read: the paper's output gate on what was read; [b n d] -> [b n d]."""

    def __init__(self, hidden_dim: int) -> None:
        super().__init__()
        self.gate = Gate(hidden_dim, hidden_dim)
        self.probe = Probe("batch token feature")

    def forward(self, read: Tensor) -> Tensor:
        return self.probe(torch.sigmoid(self.gate(read))) * read


class AddressedRead(nn.Module):
    """y = g_out * ((a_t M / h) W_o), with the token's own address a_t.  hidden: [b n d] -> [b n d]."""

    def __init__(
        self, config: InternalMemoryConfig, hidden_dim: int, slot_dim: int, address: SlotAddress
    ) -> None:
        super().__init__()
        self.address = address
        self.o_proj = nn.Linear(slot_dim, hidden_dim, bias=False)
        self.output_gate = OutputGate(hidden_dim) if config.output_gate else nn.Identity()
        self.weight_probe = Probe("batch token slot")

    def forward(self, hidden: Tensor, slots: Tensor) -> Tensor:
        weight = self.weight_probe(self.address(hidden) / self.address.num_heads)
        return self.output_gate(self.o_proj(einsum(weight, slots, "b n s, b s e -> b n e")))


class AddressedWrite(nn.Module):
    """Each token writes to the slots its key addresses, one token after another:

        a_t = address(key_t)                            which slots
        i_t = sigma(c_t W_i),  f_t = sigma(c_t W_f)     whether to write; what stays where it writes
        M_s <- (1 - a_ts i_t (1 - f_t)) M_s + a_ts i_t tanh(x_t W_v)

    key = x_{t-1} at the start and a learned mixture of x_{t-1} and x_t later (a token shift): a value is
    filed under the key before it. c = [x_t, x_{t-1}]. A token whose input gate is shut leaves every
    slot exactly as it was, which is what keeps a memory over a long silence.
    """

    def __init__(
        self, config: InternalMemoryConfig, hidden_dim: int, slot_dim: int, address: SlotAddress
    ) -> None:
        super().__init__()
        self.address = address
        self.shift = nn.Parameter(torch.full((hidden_dim,), config.shift_init))
        self.v_proj = nn.Linear(hidden_dim, slot_dim, bias=False)
        self.input_gate = Gate(2 * hidden_dim, 1, config.input_bias)
        self.forget_gate = Gate(2 * hidden_dim, 1, config.forget_bias)
        self.weight_probe = Probe("batch token slot")
        self.input_probe = Probe("batch token")
        self.forget_probe = Probe("batch token")

    def forward(self, hidden: Tensor, slots: Tensor, mask: Tensor) -> Tensor:
        hidden = hidden * rearrange(mask, "b n -> b n 1")
        before = F.pad(hidden, (0, 0, 1, 0))[:, :-1]
        context = torch.cat((hidden, before), -1)
        address = self.weight_probe(self.address(torch.lerp(hidden, before, self.shift)))
        opened = self.input_probe(rearrange(torch.sigmoid(self.input_gate(context)), "b n 1 -> b n"))
        kept = self.forget_probe(rearrange(torch.sigmoid(self.forget_gate(context)), "b n 1 -> b n"))
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
        self.q_proj = nn.Linear(hidden_dim, slot_dim, bias=False)
        self.k_proj = nn.Linear(slot_dim, slot_dim, bias=False)
        self.v_proj = nn.Linear(slot_dim, slot_dim, bias=False)
        self.o_proj = nn.Linear(slot_dim, hidden_dim, bias=False)
        self.output_gate = OutputGate(hidden_dim) if config.output_gate else nn.Identity()
        self.weight_probe = Probe("batch head token slot")

    def forward(self, hidden: Tensor, slots: Tensor) -> Tensor:
        q = rearrange(self.q_proj(hidden), "b n (h k) -> b h n k", h=self.num_heads)
        k = rearrange(self.k_proj(slots), "b s (h k) -> b h s k", h=self.num_heads)
        v = rearrange(self.v_proj(slots), "b s (h k) -> b h s k", h=self.num_heads)
        score = einsum(q, k, "b h n k, b h s k -> b h n s") * q.shape[-1] ** -0.5
        weight = self.weight_probe(torch.softmax(score, -1))
        read = rearrange(einsum(weight, v, "b h n s, b h s k -> b h n k"), "b h n k -> b n (h k)")
        return self.output_gate(self.o_proj(read))


class AttentionWrite(nn.Module):
    """The paper's write, made causal: slots attend to [slots; segment] once the segment is over.

        U  = Attn(slots W_q, [slots; x] W_k, [slots; x] W_v),  U <- norm(slots + U), U <- norm(U + mlp(U))
        i, f = sigma(mean(x) W_x + tanh(slots) W_m + b),  b_i = 0, b_f = 1
        M' = f * M + i * tanh(U)

    with x = hidden W_in brought to the slots' width. The pooled mean is over the finished segment only.
    """

    def __init__(self, config: InternalMemoryConfig, hidden_dim: int, slot_dim: int) -> None:
        super().__init__()
        self.num_heads = config.num_heads
        self.in_proj = nn.Linear(hidden_dim, slot_dim, bias=False)
        self.q_proj = nn.Linear(slot_dim, slot_dim, bias=False)
        self.k_proj = nn.Linear(slot_dim, slot_dim, bias=False)
        self.v_proj = nn.Linear(slot_dim, slot_dim, bias=False)
        self.mlp = nn.Sequential(nn.Linear(slot_dim, slot_dim), nn.ReLU(), nn.Linear(slot_dim, slot_dim))
        self.attended_norm, self.mlp_norm = RMSNorm(slot_dim), RMSNorm(slot_dim)
        self.input_gate = Gate(2 * slot_dim, slot_dim, config.input_bias)
        self.forget_gate = Gate(2 * slot_dim, slot_dim, config.forget_bias)
        self.weight_probe = Probe("batch head slot source")
        self.input_probe = Probe("batch slot feature")
        self.forget_probe = Probe("batch slot feature")

    def forward(self, hidden: Tensor, slots: Tensor, mask: Tensor) -> Tensor:
        x = self.in_proj(hidden) * rearrange(mask, "b n -> b n 1")
        update = self.attended_norm(slots + self.attend(slots, x, mask))
        update = torch.tanh(self.mlp_norm(update + self.mlp(update)))
        count = rearrange(mask.sum(1).clamp(min=1), "b -> b 1").to(x.dtype)
        pooled = reduce(x, "b n e -> b e", "sum") / count
        context = torch.cat((repeat(pooled, "b e -> b s e", s=slots.shape[1]), torch.tanh(slots)), -1)
        opened = self.input_probe(torch.sigmoid(self.input_gate(context)))
        kept = self.forget_probe(torch.sigmoid(self.forget_gate(context)))
        return kept * slots + opened * update

    def attend(self, slots: Tensor, x: Tensor, mask: Tensor) -> Tensor:
        source = torch.cat((slots, x), 1)
        allowed = F.pad(mask, (slots.shape[1], 0), value=True)

        def heads(tensor: Tensor) -> Tensor:
            return rearrange(tensor, "b j (h k) -> b h j k", h=self.num_heads)

        q, k, v = heads(self.q_proj(slots)), heads(self.k_proj(source)), heads(self.v_proj(source))
        score = einsum(q, k, "b h s k, b h j k -> b h s j") * q.shape[-1] ** -0.5
        score = score.masked_fill(~rearrange(allowed, "b j -> b 1 1 j"), -torch.inf)
        weight = self.weight_probe(torch.softmax(score, -1))
        return rearrange(einsum(weight, v, "b h s j, b h j k -> b h s k"), "b h s k -> b s (h k)")
