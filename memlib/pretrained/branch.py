"""A memory branch: the memories of one layer of a pretrained model, at a width of their own.

    h = norm(x W_down)                                   at width w
    x = x + s sum_i g_i(h) (read_i(h) W_up,i)            g = sigma(h W_g + b_g), per token

W_up starts at zero, so that a new branch changes nothing. A memory that `starts_silent` needs no such start:
its W_up is random, or the identity where w is the base's own width (`width` None: no W_down either). s is a
constant of the layer, about the size of its residual stream: with x of size 20, an addition of size 1 would
learn slowly. The branch computes in its own type, float32 also beside a base in bf16; it casts what it takes
and what it adds.

`forward` walks the segments by itself: the base reads any number of tokens in one call, and the branch reads
a piece and writes at each border. It is the only place where the branch's parameters are used.

Axes: b batch, n new tokens, p tokens already in the open segment, d hidden of the base, w width.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import NamedTuple

import torch
from torch import Tensor, nn

from memlib.memory.base import Memory, State
from memlib.memory.gates import Gate
from memlib.memory.layer import LayerInput, LayerMemories
from memlib.nn.hook_point import HookPoint
from memlib.nn.linear import Linear
from memlib.nn.norm import RMSNorm


class BranchOutput(NamedTuple):
    """residual: [b n d]; states: one for each memory; hidden: [b p w], the open segment after these tokens;
    losses: one for each memory and segment completed."""

    residual: Tensor
    states: Sequence[State]
    hidden: Tensor
    losses: list[dict[str, Tensor]]


class MemoryBranch(nn.Module):
    """The memories of one layer, read from its residual stream and added to it.

    scale: s; gate: None reads always in full; gate_cost: adds this x mean gate to the losses of a segment.
    """

    parameter_group = "memory"

    def __init__(
        self,
        hidden_dim: int,
        width: int | None,
        memories: Mapping[str, Memory],
        gate_init: float | None = 0.0,
        gate_cost: float = 0.0,
        scale: float = 1.0,
    ) -> None:
        super().__init__()
        self.down_proj = nn.Identity() if width is None else Linear(hidden_dim, width)
        self.norm = RMSNorm(width or hidden_dim)
        self.memories = LayerMemories(memories)
        self.gate = None if gate_init is None else Gate(width or hidden_dim, len(memories), gate_init)
        self.gate_cost = gate_cost
        self.up_proj = nn.ModuleList(
            nn.Identity()
            if memory.starts_silent and width is None
            else Linear(width or hidden_dim, hidden_dim, scale=float(memory.starts_silent))
            for memory in memories.values()
        )
        self.initial_scale = scale
        self.scale: Tensor
        self.register_buffer("scale", torch.empty(1))
        self.gate_point = HookPoint("branch.gate", "batch token memory")
        self.reset_parameters()

    def reset_parameters(self) -> None:
        nn.init.constant_(self.scale, self.initial_scale)

    def forward(self, residual: Tensor, inputs: LayerInput, segment_length: int) -> BranchOutput:
        """residual: [b n d]; inputs: of the open segment and all new tokens, over as many segments as these
        are. `inputs.latest` is what the first border writes to: it differs from `inputs.states` where an
        earlier layer of the same segment has written to a shared state."""
        stream = self.norm(self.down_proj(residual.to(self.norm.weight.dtype)))
        states, latest = inputs.states, inputs.latest or inputs.states
        hidden, past = inputs.hidden.to(stream.dtype), inputs.hidden.shape[1]
        reads: list[list[Tensor]] = []
        losses: list[dict[str, Tensor]] = []
        start, total = 0, stream.shape[1]
        while start < total:
            stop = min(start + segment_length - hidden.shape[1], total)
            piece = stream[:, start:stop]
            window = slice(start + past - hidden.shape[1], stop + past)
            mask, ids = inputs.mask[:, window], inputs.ids[:, window]
            real = None if inputs.has_tokens is None else mask.any(1)
            here = LayerInput(states, hidden, mask, ids, latest, real)
            reads.append(self.memories.read(piece, self.memories.open(here, piece.dtype), ids))
            hidden = torch.cat((hidden, piece), 1)
            if hidden.shape[1] == segment_length:
                losses += self.memories.losses(hidden, here) + self.cost(hidden, mask)
                states = latest = self.memories.write(hidden, here)
                hidden = hidden[:, :0]
            start = stop
        return BranchOutput(self.add(residual, stream, reads), states, hidden, losses)

    def add(self, residual: Tensor, stream: Tensor, reads: list[list[Tensor]]) -> Tensor:
        """x + s sum_i g_i(h) (read_i(h) W_up,i); reads: of each piece and memory, [b . w]."""
        gates = None if self.gate is None else torch.sigmoid(self.gate(stream))
        if gates is not None:
            self.gate_point(gates)
        added = torch.zeros_like(residual, dtype=stream.dtype)
        for i, up in enumerate(self.up_proj):
            read = up(torch.cat([piece[i] for piece in reads], 1))
            added = added + (read if gates is None else gates[..., i : i + 1] * read)
        return residual + (self.scale * added).to(residual.dtype)

    def cost(self, hidden: Tensor, mask: Tensor) -> list[dict[str, Tensor]]:
        """The price of reading: gate_cost x the mean gate of a segment's real tokens."""
        if self.gate is None or not self.gate_cost or not self.training:
            return []
        gates = torch.sigmoid(self.gate(hidden)).mean(-1) * mask
        return [{"gate": self.gate_cost * gates.sum() / mask.sum().clamp(min=1)}]

    @torch.no_grad()
    def close(self) -> None:
        """Shut the memories out for good: exactly the base."""
        self.scale.zero_()
