"""Causal self-attention inside one window.

Axes: b batch, n new tokens, p tokens of the window that came in earlier calls, m = p + n, d hidden,
h heads, k head width.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from einops import rearrange
from torch import Tensor, nn

from memlib.nn.linear import Linear
from memlib.nn.rotary import RotaryPositionalEmbedding
from memlib.ops import attention, attention_with_lse, flash_attention


def window_mask(n: int, valid: Tensor | None, past: int, device: torch.device) -> Tensor | None:
    """Which of the window's past + n keys each of its last n tokens may attend to.

    valid: [b past+n] true for real tokens, or None where all are. Returns [b 1 n past+n] or
    [n past+n], true = may; or None where plain causal attention is meant. A token may always see
    itself, so that a padded row has a defined (and unused) output.
    """
    if past == 0 and valid is None:
        return None
    position = torch.arange(past + n, device=device)
    causal = position <= rearrange(position[past:], "n -> n 1")
    if valid is None:
        return causal
    itself = position == rearrange(position[past:], "n -> n 1")
    return causal & (rearrange(valid, "b m -> b 1 1 m") | itself)


class Heads(NamedTuple):
    """queries, keys, values: [b h n k] of the new tokens, without positions."""

    queries: Tensor
    keys: Tensor
    values: Tensor


class Attended(NamedTuple):
    """heads: [b h n k], before W_o; the window's keys, values: [b h m k], with positions; and, if asked for,
    logsumexp: [b h n] of each query's scores."""

    heads: Tensor
    keys: Tensor
    values: Tensor
    logsumexp: Tensor | None = None


class SelfAttention(nn.Module):
    """Multi-head causal attention over the window: y = softmax(Q K^T / sqrt(k)) V W_o.

    hidden: [b n d], the window's newest tokens; past_keys, past_values: [b h p k], the tokens of the
    same window that came in earlier calls (p may be 0); mask: from `window_mask`.
    Returns the output [b n d] and the window's keys and values [b h p+n k].

    A block with memories inside its attention takes the three steps one by one: `project`, `attend`,
    `o_proj`. out_scale: of W_o's start, 1 / sqrt(2 layers) in a model; reach: how many newest tokens of the
    window each token sees, itself included, None for all. Raises ValueError unless num_heads divides
    hidden_dim. Sources: Vaswani et al. 2017, arXiv 1706.03762; Beltagy et al. 2020, arXiv 2004.05150 (reach).
    """

    def __init__(
        self,
        hidden_dim: int,
        num_heads: int,
        use_rope: bool = True,
        out_scale: float = 1.0,
        reach: int | None = None,
    ) -> None:
        super().__init__()
        self.reach = reach
        if hidden_dim % num_heads:
            raise ValueError(f"num_heads = {num_heads}: must divide hidden_dim = {hidden_dim}")
        self.num_heads = num_heads  # on this process: tensor parallelism divides them
        self.q_proj = Linear(hidden_dim, hidden_dim)
        self.k_proj = Linear(hidden_dim, hidden_dim)
        self.v_proj = Linear(hidden_dim, hidden_dim)
        self.o_proj = Linear(hidden_dim, hidden_dim, scale=out_scale)
        self.rotary = RotaryPositionalEmbedding(hidden_dim // num_heads) if use_rope else None

    def forward(
        self, hidden: Tensor, past_keys: Tensor, past_values: Tensor, mask: Tensor | None
    ) -> tuple[Tensor, Tensor, Tensor]:
        attended = self.attend(self.project(hidden), past_keys, past_values, mask)
        return self.output(attended.heads), attended.keys, attended.values

    def project(self, hidden: Tensor) -> Heads:
        """[b n d] -> queries, keys and values by head."""
        return Heads(
            *(
                rearrange(proj(hidden), "b n (h k) -> b h n k", h=self.num_heads)
                for proj in (self.q_proj, self.k_proj, self.v_proj)
            )
        )

    def attend(
        self,
        heads: Heads,
        past_keys: Tensor,
        past_values: Tensor,
        mask: Tensor | None,
        logsumexp: bool = False,
    ) -> Attended:
        """Attention over the window, before W_o; logsumexp: also return that of the scores."""
        q, k, v = heads
        if self.rotary is not None:
            q, k = (self.rotary(part, past_keys.shape[-2]) for part in (q, k))
        keys, values = k, v
        if past_keys.shape[-2]:
            keys = torch.cat((past_keys.to(k.dtype), k), -2)
            values = torch.cat((past_values.to(v.dtype), v), -2)
        n, m = q.shape[-2], keys.shape[-2]
        if self.reach is not None and self.reach < m:
            if mask is None:
                mixed, lse = flash_attention(q, keys, values, causal=True, window=self.reach)
                return Attended(mixed, keys, values, lse)
            near = torch.ones(n, m, dtype=torch.bool, device=q.device).triu(m - n - self.reach + 1)
            mask = mask & near
        if logsumexp:
            mixed, lse = attention_with_lse(q, keys, values, mask, causal=mask is None)
            return Attended(mixed, keys, values, lse)
        return Attended(attention(q, keys, values, mask, causal=mask is None), keys, values)

    def output(self, heads: Tensor) -> Tensor:
        """W_o of the heads' attention: [b h n k] -> [b n d]."""
        return self.o_proj(rearrange(heads, "b h n k -> b n (h k)"))

    def without_positions(self, keys: Tensor) -> Tensor:
        """The window's keys as `project` made them: [b h m k], the first at position 0."""
        return keys if self.rotary is None else self.rotary(keys, inverse=True)
