"""Exact search: which stored items are nearest to a query. Plain torch, every score computed.

On one thread this beats FAISS's flat index at the sizes of a training run (docs/diary.md); where it no
longer does, `memlib.memory.external.store` has the indexes.
"""

from __future__ import annotations

import torch
from einops import rearrange, reduce, repeat
from torch import Tensor

TIE = 1e-4  # of two items whose scores differ by less, the newer comes first


def exact_search(score: Tensor, serial: Tensor, top_k: int, chunk: int = 1) -> Tensor:
    """The places of each query's top_k items, best first.

    score: [b h n c]; serial: [b c], -1 where a place is empty -> [b h n top_k], -1 where there are fewer.

    Equal scores are common (a token that came twice has one key twice), so the order among them must
    not hang on the last bit of a product: newer items get up to `TIE` more.

    With chunk > 1 whole chunks of neighbouring places come back, by their mean score, which is the
    score of their mean key (LongMem); a chunk whose tokens are not all there, in order, is left out.
    """
    newness = (serial + 1) / (serial.amax(1, keepdim=True) + 1).clamp(min=1)
    hidden = serial < 0
    if chunk > 1:
        score = reduce(score, "b h n (c m) -> b h n c", "mean", m=chunk)
        newness = reduce(newness, "b (c m) -> b c", "mean", m=chunk)
        members = rearrange(serial, "b (c m) -> b c m", m=chunk)
        in_order = members[..., :1] + torch.arange(chunk, device=serial.device)
        hidden = (members < 0).any(-1) | (members != in_order).any(-1)
    bonus = (TIE * newness).to(score.dtype).masked_fill(hidden, -torch.inf)
    score = score + rearrange(bonus, "b c -> b 1 1 c")
    best = score.topk(top_k // chunk, -1)
    place = torch.where(best.values.isneginf(), -1, best.indices)
    return place if chunk == 1 else chunk_places(place, chunk)


def chunk_places(place: Tensor, chunk: int) -> Tensor:
    """The places inside each chunk, one after another, -1 for none: [... c] -> [... c*chunk]."""
    inside = torch.arange(chunk, device=place.device).repeat(place.shape[-1])
    first = repeat(place, "... c -> ... (c m)", m=chunk)
    return torch.where(first < 0, -1, first * chunk + inside)
