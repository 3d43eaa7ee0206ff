"""Cross-attention from a stream to memory tokens.

Axes: b batch, n tokens, d hidden, m memory tokens, e their width, i inner width, h heads, k head width,
u chapters that are read by anyone, c chapters that one row reads, t tokens of a chapter.
"""

from __future__ import annotations

import torch
from einops import rearrange, repeat
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from memlib import ops
from memlib.nn.linear import Linear


class MemoryCrossAttention(nn.Module):
    """y = softmax(Q K^T / sqrt(k) + bias) V W_o,  Q = x W_q,  K = M W_k,  V = M W_v.

    hidden: [b n d]; memory: [m e], read by all rows, or [b m e], or chapters [u t e] of which row b reads
    chapters[b]: [b c], and then m = c t; bias: [b n m] or [b 1 m], added to the scores -> [b n d].

    The maps are d -> i, e -> i, e -> i, i -> d. The inner width i is d; `projection_rank` with
    `use_low_rank_projections`; and e with `reduced_dim_mode`, where memory is kept at width e = r: the
    maps are then W_q d -> r, W_k r -> r, W_v r -> r, W_o r -> d. W_o starts at zero unless `wo_init_zero` is
    off, so that a new memory changes nothing at first.

    use_flash_attention: torch's fused kernel, which keeps no [n m] weights; the plain path says the same.
    gradient_checkpointing: keys, values and weights are computed again in the backward pass.
    Raises ValueError where widths do not fit. Source: "Core Package", Memory Cross-Attention
    (docs/coverage.md).
    """

    def __init__(
        self,
        hidden_dim: int,
        num_heads: int,
        memory_dim: int | None = None,
        use_low_rank_projections: bool = False,
        projection_rank: int = 64,
        reduced_dim_mode: bool = False,
        use_flash_attention: bool = True,
        gradient_checkpointing: bool = False,
        wo_init_zero: bool = True,
    ) -> None:
        super().__init__()
        self.memory_dim = memory_dim or hidden_dim
        inner = projection_rank if use_low_rank_projections else hidden_dim
        if reduced_dim_mode:
            inner = self.memory_dim
        if inner % num_heads:
            raise ValueError(f"num_heads = {num_heads}: must divide the inner width {inner}")
        self.num_heads, self.flash = num_heads, use_flash_attention
        self.gradient_checkpointing = gradient_checkpointing
        self.q_proj = Linear(hidden_dim, inner)
        self.k_proj = Linear(self.memory_dim, inner)
        self.v_proj = Linear(self.memory_dim, inner)
        self.o_proj = Linear(inner, hidden_dim, scale=0.0 if wo_init_zero else 1.0)

    def forward(
        self, hidden: Tensor, memory: Tensor, bias: Tensor | None = None, chapters: Tensor | None = None
    ) -> Tensor:
        if memory.shape[-1] != self.memory_dim:
            raise ValueError(
                f"memory has width {memory.shape[-1]}: this attention reads {self.memory_dim}; "
                "set memory_dim to the bank's dim"
            )
        if self.gradient_checkpointing and torch.is_grad_enabled():
            return checkpoint(self.attend, hidden, memory, bias, chapters, use_reentrant=False)
        return self.attend(hidden, memory, bias, chapters)

    def attend(self, hidden: Tensor, memory: Tensor, bias: Tensor | None, chapters: Tensor | None) -> Tensor:
        q = self.queries(hidden)
        k = self.heads(self.k_proj(memory), len(hidden), chapters)
        v = self.heads(self.v_proj(memory), len(hidden), chapters)
        mask = None if bias is None else rearrange(bias, "b n m -> b 1 n m")
        if self.flash:
            read = ops.attention(q, k, v, mask)
        else:
            read = ops.attention_reference(q, k, v, mask)
        return self.o_proj(rearrange(read, "b h n k -> b n (h k)"))

    def weights(
        self, hidden: Tensor, memory: Tensor, bias: Tensor | None = None, chapters: Tensor | None = None
    ) -> Tensor:
        """Attention weight of each token on each memory token: [b h n m], sums to 1 over m."""
        k = self.heads(self.k_proj(memory), len(hidden), chapters)
        return ops.memory_attention_weights(self.queries(hidden), k, bias=bias)

    def queries(self, hidden: Tensor) -> Tensor:
        return rearrange(self.q_proj(hidden), "b n (h k) -> b h n k", h=self.num_heads)

    def heads(self, projected: Tensor, rows: int, chapters: Tensor | None) -> Tensor:
        """Keys or values by row and head, [b h m k]; a chapter is projected once, however many read it."""
        if chapters is not None:
            projected = rearrange(projected[chapters], "b c t i -> b (c t) i")
        elif projected.ndim == 2:
            projected = repeat(projected, "m i -> b m i", b=rows)
        return rearrange(projected, "b m (h k) -> b h m k", h=self.num_heads)
