"""Transformer block with optional cross-attention to given memory tokens ("Core Package", docs/coverage.md).

    A (default):  x = x + attention(norm(x))
                  x = x + memory(norm(x), M)        B: x = x + mlp(norm(x)) comes before this line
                  x = x + mlp(norm(x))

It takes a text in one window and keeps nothing. The model's own block, with states, open windows and any
number of memories, is `memlib.models.block.TransformerBlock`; it has the same parts in the same order.
"""

from __future__ import annotations

from torch import Tensor, nn

from memlib.memory.chapters.attention import MemoryCrossAttention
from memlib.nn.attention import SelfAttention, window_mask
from memlib.nn.mlp import MLP
from memlib.nn.norm import RMSNorm


class MemoryTransformerBlock(nn.Module):
    """block(hidden_states [b n d], memory [m e] or [b m e]) -> [b n d], in variant A or B.

    attention_mask: [b n], zero for padding. memory_dim: width e of the tokens, hidden_dim if None;
    intermediate_dim: of the MLP, 4 hidden_dim if None. With `wo_init_zero` the block begins as the plain
    one, bit for bit: W_o and the last map of B's extra MLP are zero. Raises ValueError for another variant,
    and where memory is given without has_memory or the other way round.
    """

    def __init__(
        self,
        hidden_dim: int,
        num_heads: int,
        has_memory: bool = True,
        memory_block_variant: str = "A",
        wo_init_zero: bool = True,
        memory_dim: int | None = None,
        intermediate_dim: int | None = None,
        use_rope: bool = True,
    ) -> None:
        super().__init__()
        if memory_block_variant not in ("A", "B"):
            raise ValueError(f"memory_block_variant = {memory_block_variant!r}: expected 'A' or 'B'")
        width = intermediate_dim or 4 * hidden_dim
        self.attention_norm = RMSNorm(hidden_dim)
        self.attention = SelfAttention(hidden_dim, num_heads, use_rope)
        self.extra_mlp: MLP | None = None
        self.memory_attention: MemoryCrossAttention | None = None
        if has_memory:
            self.memory_norm = RMSNorm(hidden_dim)
            self.memory_attention = MemoryCrossAttention(
                hidden_dim, num_heads, memory_dim, wo_init_zero=wo_init_zero
            )
            if memory_block_variant == "B":
                self.extra_norm, self.extra_mlp = RMSNorm(hidden_dim), MLP(hidden_dim, width)
                if wo_init_zero:
                    nn.init.zeros_(self.extra_mlp.down_proj.weight)
        self.mlp_norm = RMSNorm(hidden_dim)
        self.mlp = MLP(hidden_dim, width)

    def forward(
        self, hidden_states: Tensor, memory: Tensor | None = None, attention_mask: Tensor | None = None
    ) -> Tensor:
        if (memory is None) != (self.memory_attention is None):
            has = self.memory_attention is not None
            raise ValueError(
                f"this block was built with has_memory = {has}: "
                f"{'give it memory tokens' if has else 'it takes no memory'}"
            )
        x = hidden_states + self.attend(self.attention_norm(hidden_states), attention_mask)
        if self.extra_mlp is not None:
            x = x + self.extra_mlp(self.extra_norm(x))
        if self.memory_attention is not None and memory is not None:
            x = x + self.memory_attention(self.memory_norm(x), memory)
        return x + self.mlp(self.mlp_norm(x))

    def attend(self, hidden: Tensor, attention_mask: Tensor | None) -> Tensor:
        """Causal self-attention over the given window; [b n d] -> [b n d]."""
        b, n, d = hidden.shape
        heads = self.attention.num_heads
        none = hidden.new_zeros(b, heads, 0, d // heads)
        valid = None if attention_mask is None else attention_mask.bool()
        return self.attention(hidden, none, none, window_mask(n, valid, 0, hidden.device))[0]


class VanillaTransformerBlock(MemoryTransformerBlock):
    """The block without memory: the control, equal to a memory block with W_o = 0."""

    def __init__(
        self, hidden_dim: int, num_heads: int, intermediate_dim: int | None = None, use_rope: bool = True
    ) -> None:
        super().__init__(
            hidden_dim, num_heads, has_memory=False, intermediate_dim=intermediate_dim, use_rope=use_rope
        )
