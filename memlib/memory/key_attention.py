"""Retrieval by content: unit keys, and attention of tokens over what is kept under keys.

Axes: b batch, n tokens, s places, d hidden, k key width, e value width.
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
    """What a token asks for, and what it is filed under: two unit vectors of one projection.

        query_t = u(x_t W),   key_t = u(lerp(x_t, x_{t-1}, shift) W),   u(y) = y / |y|

    One projection for both, so that what is filed under a key is found by that key from the first step
    on. shift starts at `shift_init`; at 1 a token is filed under the token before it, which is how a
    value comes to stand under its key (docs/diary.md).
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
    """Cross-attention of tokens over a memory's places, O(n s), all of them or each token's top k.

        w = softmax_s(sharpness sqrt(k) query . key_s + bias_s)     over the places that may be read
        y = sum_s w_s value_s                                       zero where none may be read

    query: [b n k], keys: [b s k], values: [b s e], bias: [b s] (-inf: may not be read) -> [b n e].
    Keys are unit vectors where they were written in full: a random key then scores like a normal number
    of deviation `sharpness`, a match scores sharpness sqrt(k).
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
        """The weights over all places, each of which may be read: [b n s]."""
        return torch.softmax(query * self.scale(keys) @ keys.transpose(1, 2), -1)

    @torch.no_grad()
    def used(self, query: Tensor, keys: Tensor, bias: Tensor | None, mask: Tensor) -> Tensor:
        """The largest weight that any token of mask: [b n] gave each place: [b s]."""
        weight = memory_attention_weights(query, keys, bias=bias, scale=self.scale(keys))
        return reduce(weight * rearrange(mask, "b n -> b n 1"), "b n s -> b s", "max")


def in_time_order(kept: Tensor, count: int) -> Tensor:
    """Where the tokens of kept: [b n] stand, earliest first, filled up with others: [b c]."""
    return kept.to(torch.int8).argsort(stable=True, dim=-1, descending=True)[:, :count]
