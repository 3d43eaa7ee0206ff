"""One transformer block: self-attention, zero or more memories, a fusion, a feed-forward.

With softmax fusion ("Architecture Diagrams"):      With residual fusion (variants A and B):

    h = norm(x)                                          x = x + attention(norm(x))
    H = g0 attention(h) + g1 read_1(h) + …               x = x + mlp(norm(x))             (B only)
    x = x + H                                            x = x + sum_i read_i(norm(x)) W_o,i
    x = x + mlp(norm(x))                                 x = x + mlp(norm(x))

The h a memory is read with is also the h its segment is written with. A memory that takes part in the
attention stands inside attention(h) and has no place in the fusion.

`forward` is the only place where a block's parameters are used, those of its memories included: it opens,
reads and, where the segment is complete, computes losses and writes. So a block can be sharded, compiled,
computed again in the backward pass or put on another device as it is.

Axes: b batch, n new tokens, p tokens already in the open segment, d hidden, h heads, k head width.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import NamedTuple

import torch
from torch import Tensor, nn

from memlib.memory.base import AttentionHeads, Memory, State
from memlib.memory.layer import LayerInput, LayerMemories
from memlib.models.fusion import ResidualFusion, SoftmaxFusion
from memlib.nn.attention import SelfAttention
from memlib.nn.mlp import MLP
from memlib.nn.noise import Dropout, Noise
from memlib.nn.norm import RMSNorm


class BlockOutput(NamedTuple):
    """residual: [b n d]; keys, values of the window: [b h p+n k]; and of the block's memories: hidden
    [b p+n d], the open segment as it will be written; states, losses: one each if it was complete."""

    residual: Tensor
    keys: Tensor
    values: Tensor
    hidden: Tensor | None = None
    states: Sequence[State] = ()
    losses: Sequence[dict[str, Tensor]] = ()


class TransformerBlock(nn.Module):
    """A block with any number of memories by kind; with none it is the plain pre-norm block.

    residual: [b n d]; past_keys, past_values: [b h p k], mask: as `SelfAttention` takes them; memory: what
    its memories need, None for a block without; noise: for dropout,
    None for torch's generator. out_scale: of the start of the maps into the residual
    stream, 1 / sqrt(2 layers) in a model; attention_window: `SelfAttention`'s reach.
    """

    def __init__(
        self,
        hidden_dim: int,
        num_heads: int,
        intermediate_dim: int,
        memories: Mapping[str, Memory] | None = None,
        fusion: str = "softmax",
        memory_block_variant: str = "A",
        wo_init_zero: bool = True,
        use_rope: bool = True,
        dropout: float = 0.0,
        out_scale: float = 1.0,
        attention_window: int | None = None,
    ) -> None:
        super().__init__()
        self.attention_norm = RMSNorm(hidden_dim)
        self.attention = SelfAttention(hidden_dim, num_heads, use_rope, out_scale, attention_window)
        self.memories = LayerMemories(memories)
        self.fusion: SoftmaxFusion | ResidualFusion | None = None
        self.extra_mlp: MLP | None = None
        fused = self.memories.fused
        if fused and fusion == "softmax":
            self.fusion = SoftmaxFusion(hidden_dim, fused)
        elif fused:
            self.memory_norm = RMSNorm(hidden_dim)
            self.fusion = ResidualFusion(hidden_dim, fused, wo_init_zero)
            if memory_block_variant == "B":
                self.extra_norm = RMSNorm(hidden_dim)
                self.extra_mlp = MLP(hidden_dim, intermediate_dim, 0.0 if wo_init_zero else out_scale)
        self.mlp_norm = RMSNorm(hidden_dim)
        self.mlp = MLP(hidden_dim, intermediate_dim, out_scale)
        self.dropout = Dropout(dropout)

    def forward(
        self,
        residual: Tensor,
        past_keys: Tensor,
        past_values: Tensor,
        mask: Tensor | None,
        memory: LayerInput | None = None,
        noise: Noise | None = None,
    ) -> BlockOutput:
        states = [] if memory is None else self.memories.open(memory, residual.dtype)
        ids = residual.new_zeros(0) if memory is None else memory.ids
        hidden = self.attention_norm(residual)
        mixed, keys, values = self.attend(hidden, past_keys, past_values, mask, states)
        if isinstance(self.fusion, SoftmaxFusion):
            mixed = self.fusion(hidden, mixed, self.memories.read(hidden, states, ids))
        residual = residual + self.dropout(mixed, noise, 0)
        if isinstance(self.fusion, ResidualFusion):
            if self.extra_mlp is not None:
                residual = residual + self.dropout(self.extra_mlp(self.extra_norm(residual)), noise, 1)
            hidden = self.memory_norm(residual)
            residual = self.fusion(residual, self.memories.read(hidden, states, ids))
        residual = residual + self.dropout(self.mlp(self.mlp_norm(residual)), noise, 2)
        if memory is None:
            return BlockOutput(residual, keys, values)
        segment = torch.cat((memory.hidden.to(hidden.dtype), hidden), 1)
        if memory.latest is None:
            return BlockOutput(residual, keys, values, segment)
        losses = self.memories.losses(segment, memory)
        own = (self.attention.without_positions(keys), values) if self.memories.uses_heads else ()
        return BlockOutput(
            residual, keys, values, segment, self.memories.write(segment, memory, *own), losses
        )

    def attend(
        self,
        hidden: Tensor,
        past_keys: Tensor,
        past_values: Tensor,
        mask: Tensor | None,
        states: Sequence[State],
    ) -> tuple[Tensor, Tensor, Tensor]:
        """The window's attention with the memories inside it; [b n d] -> [b n d], keys and values."""
        if self.memories.fused == len(self.memories):
            return self.attention(hidden, past_keys, past_values, mask)
        own = self.attention.project(hidden)
        attended = self.attention.attend(
            own, past_keys, past_values, mask, logsumexp=self.memories.uses_logsumexp
        )
        heads = AttentionHeads(
            hidden,
            *own,
            attended.heads,
            attended.logsumexp,
            lambda tokens: self.attention.project(tokens)[1:],
        )
        return self.attention.output(self.memories.mix(heads, states)), attended.keys, attended.values

    def close_memory(self) -> None:
        """Shut every memory out (law L5), and B's extra MLP: the block is then exactly the plain one."""
        if self.fusion is not None:
            self.fusion.close()
        if self.extra_mlp is not None:
            nn.init.zeros_(self.extra_mlp.down_proj.weight)
        self.memories.close()
