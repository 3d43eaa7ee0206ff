"""One transformer block: self-attention, zero or more memory reads, a fusion, a feed-forward.

With softmax fusion (the documents' diagrams):      With residual fusion (variants A and B):

    h = norm(x)                                          x = x + attention(norm(x))
    H = g0 attention(h) + g1 read_1(h) + …               x = x + mlp(norm(x))             (B only)
    x = x + H                                            x = x + sum_i read_i(norm(x)) W_o,i
    x = x + mlp(norm(x))                                 x = x + mlp(norm(x))

The h a memory is read with is also the h its segment is written with. A memory that takes part in the
attention stands inside attention(h) and has no place in the fusion.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import NamedTuple, cast

from torch import Tensor, nn

from memlib.memory.base import Memory, State
from memlib.memory.gates import ResidualFusion, SoftmaxFusion
from memlib.nn.attention import Mix, SelfAttention
from memlib.nn.mlp import MLP
from memlib.nn.norm import RMSNorm


class BlockOutput(NamedTuple):
    """stream [b n d]; keys, values of the window [b h p+n k]; hidden [b n d], what is written."""

    stream: Tensor
    keys: Tensor
    values: Tensor
    hidden: Tensor


class StreamBlock(nn.Module):
    """A block with any number of memories by name; with none it is the plain pre-norm block.

    stream: [b n d]; past_keys, past_values: [b h p k], mask: as `SelfAttention` takes them;
    states: one per memory, read and never changed here.
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
    ) -> None:
        super().__init__()
        self.attention_norm = RMSNorm(hidden_dim)
        self.attention = SelfAttention(hidden_dim, num_heads, use_rope)
        self.memories = nn.ModuleDict(memories or {})
        self.fusion: SoftmaxFusion | ResidualFusion | None = None
        self.extra_mlp: MLP | None = None
        fused = sum(not memory.in_attention for memory in self.kinds())
        if fused and fusion == "softmax":
            self.fusion = SoftmaxFusion(hidden_dim, fused)
        elif fused:
            self.memory_norm = RMSNorm(hidden_dim)
            self.fusion = ResidualFusion(hidden_dim, fused, wo_init_zero)
            if memory_block_variant == "B":
                self.extra_norm = RMSNorm(hidden_dim)
                self.extra_mlp = MLP(hidden_dim, intermediate_dim)
        self.mlp_norm = RMSNorm(hidden_dim)
        self.mlp = MLP(hidden_dim, intermediate_dim)
        self.dropout = nn.Dropout(dropout)

    def forward(
        self,
        stream: Tensor,
        past_keys: Tensor,
        past_values: Tensor,
        mask: Tensor | None,
        states: Sequence[State] = (),
    ) -> BlockOutput:
        hidden = self.attention_norm(stream)
        mixed, keys, values = self.attention(hidden, past_keys, past_values, mask, self.mix(hidden, states))
        if isinstance(self.fusion, SoftmaxFusion):
            mixed = self.fusion(hidden, mixed, self.read(hidden, states))
        stream = stream + self.dropout(mixed)
        if isinstance(self.fusion, ResidualFusion):
            if self.extra_mlp is not None:
                stream = stream + self.dropout(self.extra_mlp(self.extra_norm(stream)))
            hidden = self.memory_norm(stream)
            stream = self.fusion(stream, self.read(hidden, states))
        stream = stream + self.dropout(self.mlp(self.mlp_norm(stream)))
        return BlockOutput(stream, keys, values, hidden)

    def read(self, hidden: Tensor, states: Sequence[State]) -> list[Tensor]:
        """What each memory has to say to each token; hidden: [b n d] -> one [b n d] per memory."""
        pairs = zip(self.kinds(), states, strict=True)
        return [memory.read(hidden, state) for memory, state in pairs if not memory.in_attention]

    def mix(self, hidden: Tensor, states: Sequence[State]) -> Mix | None:
        """What brings the memories that take part in the attention into it, one after another."""
        pairs = zip(self.kinds(), states, strict=True)
        taking_part = [(memory, state) for memory, state in pairs if memory.in_attention]
        return partial(mix_all, hidden, taking_part) if taking_part else None

    def kinds(self) -> list[Memory]:
        """The block's memories, in the order of their states."""
        return cast(list[Memory], list(self.memories.values()))

    def close_memory(self) -> None:
        """Shut every memory out (law L5), and B's extra MLP: the block is then exactly the plain one."""
        if self.fusion is not None:
            self.fusion.close()
        if self.extra_mlp is not None:
            nn.init.zeros_(self.extra_mlp.down_proj.weight)
        for memory in self.kinds():
            if memory.in_attention:
                memory.close()


def mix_all(
    hidden: Tensor,
    memories: Sequence[tuple[Memory, State]],
    attended: Tensor,
    logsumexp: Callable[[], Tensor],
) -> Tensor:
    """attended [b h n k] with the share of each memory in it."""
    for memory, state in memories:
        attended = memory.mix(hidden, attended, logsumexp, state)
    return attended
