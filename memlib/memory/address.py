"""Addresses of slots, shared by writes and reads.

Axes: b batch, n tokens, s slots, d hidden, h address books, k key width.
"""

from __future__ import annotations

import torch
from einops import rearrange
from torch import Tensor, nn

from memlib.nn.linear import Linear, vectors_for_scalars
from memlib.ops import addressed_weights


class SlotAddress(nn.Module):
    """Weights over slots, by h independent address books of s / h slots each.

        a = softmax(sharpness * (x W_a)_h . address_hs)   within each book's slots

    Writes and reads use the same address, so that what is written with a key is read with that key from the
    first step on. With a high initial sharpness a book is a random hash. Two keys that share a slot of one
    book seldom share one of the next, so a few books survive the collisions that one does not
    (docs/diary.md). x: [b n d] -> [b n s], summing to 1 over each book's slots.
    """

    def __init__(
        self, hidden_dim: int, num_slots: int, num_heads: int, address_dim: int, sharpness: float
    ) -> None:
        super().__init__()
        self.num_heads, self.num_slots, self.initial_sharpness = num_heads, num_slots, sharpness
        self.proj = Linear(hidden_dim, address_dim)
        self.table = nn.Parameter(torch.empty(num_heads, num_slots // num_heads, address_dim // num_heads))
        self.sharpness = nn.Parameter(torch.empty(1))
        self.register_load_state_dict_pre_hook(vectors_for_scalars)
        self.reset_parameters()

    @torch.no_grad()
    def reset_parameters(self) -> None:
        rows = identity_slots(self.num_slots, self.table.shape[-1]).to(self.table)
        self.table.copy_(rearrange(rows, "(s h) k -> h s k", h=self.num_heads))
        self.sharpness.fill_(self.initial_sharpness)

    def forward(self, features: Tensor) -> Tensor:
        query = rearrange(self.proj(features), "b n (h k) -> b n h k", h=self.num_heads)
        weight = addressed_weights(query, self.table, self.sharpness)
        return rearrange(weight, "b n h s -> b n (h s)")


def identity_slots(num_slots: int, dim: int) -> Tensor:
    """Rows of an identity matrix, for any number of slots and any width: [s d], unit rows.

    The first d rows are the identity's. Further rows are those of fixed random rotations, orthonormal among
    themselves, so that no two slots start equal. LM2 starts its memory at the identity and therefore needs as
    many slots as the width; this removes the restriction.
    """
    eye = torch.eye(dim)
    if num_slots <= dim:
        return eye[:num_slots]
    generator = torch.Generator().manual_seed(0)
    rounds = [eye]
    for _ in range((num_slots - 1) // dim):
        square = torch.randn(dim, dim, generator=generator)
        rounds.append(torch.linalg.qr(square).Q)
    return rearrange(torch.stack(rounds), "r s d -> (r s) d")[:num_slots]
