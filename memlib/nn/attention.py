"""Causal self-attention inside one window."""

from __future__ import annotations

from collections.abc import Callable

import torch
from einops import einsum, rearrange
from torch import Tensor, nn
from torch.nn import functional as F

from memlib.nn.rotary import RotaryPositionalEmbedding

Mix = Callable[[Tensor, Callable[[], Tensor]], Tensor]


def window_mask(n: int, valid: Tensor | None, past: int, device: torch.device) -> Tensor | None:
    """Which of the window's past + n keys each of its last n tokens may attend to.

    valid: [b past+n] true for real tokens, or None where all are. Returns [b 1 n past+n] or
    [n past+n], true = may; or None where plain causal attention says it all. A token may always see
    itself, so that a padded row has a defined (and unused) output.
    """
    if past == 0 and valid is None:
        return None
    position = torch.arange(past + n, device=device)
    causal = position <= rearrange(position[past:], "n -> n 1")
    if valid is None:
        return causal
    itself = position == rearrange(position[past:], "n -> n 1")
    return causal & (rearrange(valid, "b p -> b 1 1 p") | itself)


class SelfAttention(nn.Module):
    """Multi-head causal attention over the window: y = softmax(Q K^T / sqrt(k)) V W_o.

    hidden: [b n d], the window's newest tokens; past_keys, past_values: [b h p k], the tokens of the
    same window that came in earlier calls (p may be 0); mask: from `window_mask`.
    Returns the output [b n d] and the window's keys and values [b h p+n k].

    `mix` may bring something else into the heads before W_o: it gets their output [b h n k] and a
    function that gives the log-sum-exp of their scores [b h n].
    Source: Vaswani et al. 2017, arXiv 1706.03762.
    """

    def __init__(self, hidden_dim: int, num_heads: int, use_rope: bool = True) -> None:
        super().__init__()
        if hidden_dim % num_heads:
            raise ValueError(f"num_heads = {num_heads}: must divide hidden_dim = {hidden_dim}")
        self.num_heads = num_heads
        self.q_proj = nn.Linear(hidden_dim, hidden_dim, bias=False)
        self.k_proj = nn.Linear(hidden_dim, hidden_dim, bias=False)
        self.v_proj = nn.Linear(hidden_dim, hidden_dim, bias=False)
        self.o_proj = nn.Linear(hidden_dim, hidden_dim, bias=False)
        self.rotary = RotaryPositionalEmbedding(hidden_dim // num_heads) if use_rope else None

    def forward(
        self,
        hidden: Tensor,
        past_keys: Tensor,
        past_values: Tensor,
        mask: Tensor | None,
        mix: Mix | None = None,
    ) -> tuple[Tensor, Tensor, Tensor]:
        def heads(projected: Tensor) -> Tensor:
            return rearrange(projected, "b n (h k) -> b h n k", h=self.num_heads)

        q, k, v = (heads(p(hidden)) for p in (self.q_proj, self.k_proj, self.v_proj))
        if self.rotary is not None:
            q, k = self.rotary(torch.cat((q, k)), past_keys.shape[-2]).chunk(2)
        keys, values = torch.cat((past_keys, k), -2), torch.cat((past_values, v), -2)
        mixed = F.scaled_dot_product_attention(q, keys, values, mask, is_causal=mask is None)
        if mix is not None:
            mixed = mix(mixed, lambda: scores_logsumexp(q, keys, mask))
        return self.o_proj(rearrange(mixed, "b h n k -> b n (h k)")), keys, values


def scores_logsumexp(q: Tensor, keys: Tensor, mask: Tensor | None) -> Tensor:
    """log sum_m exp(q_n . k_m / sqrt(k)) over the keys a token may attend to.

    q: [b h n k], keys: [b h m k], mask: as for `SelfAttention` -> [b h n].
    """
    score = einsum(q, keys, "b h n k, b h m k -> b h n m") * q.shape[-1] ** -0.5
    if mask is None:
        mask = torch.ones(score.shape[-2:], dtype=torch.bool, device=q.device).tril()
    return torch.logsumexp(score.masked_fill(~mask, -torch.inf), -1)
