"""Unit keys, and attention of tokens over slots by their keys: for long-term memory and the ring.

Axes: b batch, n tokens, s slots, d hidden, k key width, e value width, c selected tokens.
"""

from __future__ import annotations

from typing import cast

import torch
from einops import rearrange, reduce
from torch import Tensor, nn

from memlib.nn.hook_point import HookPoint
from memlib.nn.linear import Linear, unit, vectors_for_scalars
from memlib.ops import memory_attention, memory_attention_weights, token_shift


class TokenKey(nn.Module):
    """Query and key of a token: two unit vectors from one projection.

        query_t = u(x_t W),   key_t = u(lerp(x_t, x_{t-1}, shift) W),   u(y) = y / |y|

    With one projection for both, a query finds the key of the same token from the first step on. shift
    starts at `shift_init`; at 1 a value is stored with the key of the token before it (docs/diary.md).
    """

    def __init__(self, hidden_dim: int, key_dim: int, shift_init: float) -> None:
        super().__init__()
        self.proj, self.shift_init = Linear(hidden_dim, key_dim), shift_init
        self.shift = nn.Parameter(torch.empty(hidden_dim))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        nn.init.constant_(self.shift, self.shift_init)

    def query(self, hidden: Tensor) -> Tensor:
        """hidden: [b n d] -> [b n k]."""
        return unit(self.proj(hidden))

    def key(self, hidden: Tensor) -> Tensor:
        """hidden: [b n d], zero at padding -> [b n k]; the first token has zeros before it."""
        return self.query(token_shift(hidden, self.shift))


class MemoryAttention(nn.Module):
    """Cross-attention of tokens over slots, O(n s), over all slots or each token's top k.

        w = softmax_s(sharpness sqrt(k) query . key_s + bias_s)     over readable slots
        y = sum_s w_s value_s                                       zero without readable slots

    query: [b n k], keys: [b s k], values: [b s e], bias: [b s] (-inf: not readable) -> [b n e].
    Keys written at full strength are unit vectors: the score of a random key has standard deviation
    `sharpness`, that of a match is sharpness sqrt(k).
    Source: "LTM Transformer Architecture", Memory Attention (docs/coverage.md); the softmax is ours.
    """

    def __init__(self, sharpness: float, name: str, top_k: int | None = None) -> None:
        super().__init__()
        self.initial_sharpness, self.top_k = sharpness, top_k
        self.sharpness = nn.Parameter(torch.empty(1))
        self.register_load_state_dict_pre_hook(vectors_for_scalars)
        self.weight_point = HookPoint(name, "batch token slot")
        self.reset_parameters()

    def reset_parameters(self) -> None:
        nn.init.constant_(self.sharpness, self.initial_sharpness)

    def forward(self, query: Tensor, keys: Tensor, values: Tensor, bias: Tensor | None = None) -> Tensor:
        scale, k = self.scale(keys), self.top_k
        self.weight_point(lambda: memory_attention_weights(query, keys, bias=bias, scale=scale, top_k=k))
        return cast(Tensor, memory_attention(query, keys, values, bias=bias, scale=scale, top_k=k))

    def scale(self, keys: Tensor) -> Tensor:
        return self.sharpness * keys.shape[-1] ** 0.5

    def weights(self, query: Tensor, keys: Tensor) -> Tensor:
        """Weights over all slots, each of them readable: [b n s]."""
        return torch.softmax(query * self.scale(keys) @ keys.transpose(1, 2), -1)

    @torch.no_grad()
    def used(self, query: Tensor, keys: Tensor, bias: Tensor | None, mask: Tensor) -> Tensor:
        """Largest weight that a real token gives each slot; mask: [b n] -> [b s]."""
        weight = memory_attention_weights(query, keys, bias=bias, scale=self.scale(keys))
        return reduce(weight * rearrange(mask, "b n -> b n 1"), "b n s -> b s", "max")


def in_time_order(kept: Tensor, count: int) -> Tensor:
    """Indices of the selected tokens, earliest first, filled up with other tokens: kept [b n] -> [b c]."""
    return kept.to(torch.int8).argsort(stable=True, dim=-1, descending=True)[:, :count]
