"""Addresses: which slots a token means, one book for writing and reading.

Axes: b batch, n tokens, s slots, d hidden, h books, k key width.
"""

from __future__ import annotations

import torch
from einops import einsum, rearrange
from torch import Tensor, nn

from memlib.memory.gates import identity_slots


class SlotAddress(nn.Module):
    """Which slots a feature vector means, by h independent address books over s / h slots each.

        a = softmax(sharpness * (x W_a)_h . address_hs)   within each book's slots

    One address for reading and writing, so that what is filed under a key is found by that key from the
    first step on. Sharp from the start, a book is a random hash; two keys that share a slot of one book
    seldom share one of the next, so a few books survive the collisions that one does not (docs/diary.md).
    x: [b n d] -> [b n s], summing to 1 over each book's slots.
    """

    def __init__(
        self, hidden_dim: int, num_slots: int, num_heads: int, address_dim: int, sharpness: float
    ) -> None:
        super().__init__()
        self.num_heads = num_heads
        self.proj = nn.Linear(hidden_dim, address_dim, bias=False)
        rows = identity_slots(num_slots, address_dim // num_heads)
        self.table = nn.Parameter(rearrange(rows, "(s h) k -> h s k", h=num_heads).contiguous())
        self.sharpness = nn.Parameter(torch.tensor(sharpness))

    def forward(self, features: Tensor) -> Tensor:
        query = rearrange(self.proj(features), "b n (h k) -> b n h k", h=self.num_heads)
        score = einsum(query, self.table, "b n h k, h s k -> b n h s")
        return rearrange(torch.softmax(self.sharpness * score, -1), "b n h s -> b n (h s)")
