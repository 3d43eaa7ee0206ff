"""Exact search: which stored items have the highest scores for a query.

Axes: b batch, h heads, n queries, c places, m places of a chunk, k key width.

Every score is compared. Source: brute-force search as in LongMem (Wang et al. 2023, arXiv 2306.07174) and
Memorizing Transformers (Wu et al. 2022, arXiv 2203.08913).
"""

from __future__ import annotations

import torch
from einops import einsum, rearrange, reduce, repeat
from torch import Tensor

from memlib_kernels.dispatch import eager_cpu
from memlib_kernels.selected import COLUMNS_FROM, top_index, top_of_finite

TIE = 1e-4  # of two items whose scores differ by less, the newer comes first
CACHED = 2**19  # scores computed and searched at a time: 2 MiB


def exact_search(score: Tensor, serial: Tensor, top_k: int, chunk: int = 1) -> Tensor:
    """The places of each query's top_k items, best first.

    score: [b h n c]; serial: [b c], -1 where a place is empty -> [b h n top_k], -1 where there are fewer.

    Equal scores are common: a token that occurs twice has one key twice. So that rounding does not decide
    their order, newer items get a bonus of up to `TIE`.

    With chunk > 1, whole chunks of neighbouring places are returned, ranked by their mean score, which is
    the score of their mean key (LongMem). Chunks with missing or unordered tokens are left out.
    """
    ranked = ranked_scores(score, serial, chunk)
    place = top_index(ranked, top_k // chunk)
    return existing(ranked, place, chunk)


def exact_search_reference(score: Tensor, serial: Tensor, top_k: int, chunk: int = 1) -> Tensor:
    """`exact_search` by torch.topk."""
    ranked = ranked_scores(score, serial, chunk)
    return existing(ranked, ranked.topk(top_k // chunk, -1).indices, chunk)


@torch.no_grad()
def nearest(query: Tensor, keys: Tensor, serial: Tensor, top_k: int, chunk: int = 1) -> Tensor:
    """`exact_search` by the inner products of queries and keys, which are never all in memory at once.

    query: [b h n k], keys: [b h c k], serial: [b c] -> places [b h n top_k], without a gradient.
    """
    if not eager_cpu(query, keys, serial) or not query.numel():
        return nearest_reference(query, keys, serial, top_k, chunk)
    b, h, n, _ = query.shape
    bonus = newer_bonus(serial, chunk).to(query.dtype)
    hidden = bonus.isneginf()
    bonus.clamp_(min=torch.finfo(query.dtype).min / 2)
    packs = query.dtype != torch.float64 and bonus.shape[1] < COLUMNS_FROM
    rows = max(1, CACHED // (h * keys.shape[2]))
    found = serial.new_empty(b, h, n, top_k)
    for row in range(b):
        transposed = rearrange(keys[row], "h c k -> h k c")
        for first in range(0, n, rows):
            at = slice(first, first + rows)
            score = query[row, :, at] @ transposed
            if chunk > 1:
                score = reduce(score, "h n (c m) -> h n c", "mean", m=chunk)
            score.add_(bonus[row])
            if packs:
                place = top_of_finite(score.to(torch.float64), top_k // chunk)
            else:
                place = top_index(score, top_k // chunk)
            place.masked_fill_(hidden[row][place], -1)
            found[row, :, at] = place if chunk == 1 else chunk_places(place, chunk)
    return found


@torch.no_grad()
def nearest_reference(query: Tensor, keys: Tensor, serial: Tensor, top_k: int, chunk: int = 1) -> Tensor:
    """`nearest` with all scores at once."""
    score = einsum(query, keys, "b h n k, b h c k -> b h n c")
    return exact_search_reference(score, serial, top_k, chunk)


def ranked_scores(score: Tensor, serial: Tensor, chunk: int) -> Tensor:
    """Scores of places or chunks with the bonus of newer ones, -inf where there is no item: [b h n c/m]."""
    if chunk > 1:
        score = reduce(score, "b h n (c m) -> b h n c", "mean", m=chunk)
    return score + rearrange(newer_bonus(serial, chunk).to(score.dtype), "b c -> b 1 1 c")


def newer_bonus(serial: Tensor, chunk: int) -> Tensor:
    """What is added to the scores of places or chunks, -inf where there is no item: [b c/m]."""
    newness = (serial + 1) / (serial.amax(1, keepdim=True) + 1).clamp(min=1)
    hidden = serial < 0
    if chunk > 1:
        newness = reduce(newness, "b (c m) -> b c", "mean", m=chunk)
        members = rearrange(serial, "b (c m) -> b c m", m=chunk)
        in_order = members[..., :1] + torch.arange(chunk, device=serial.device)
        hidden = (members < 0).any(-1) | (members != in_order).any(-1)
    return (TIE * newness).masked_fill(hidden, -torch.inf)


def existing(ranked: Tensor, place: Tensor, chunk: int) -> Tensor:
    """Places found, -1 where the score is -inf; chunks are expanded to their places."""
    place = torch.where(ranked.gather(-1, place).isneginf(), -1, place)
    return place if chunk == 1 else chunk_places(place, chunk)


def chunk_places(place: Tensor, chunk: int) -> Tensor:
    """The places inside each chunk, one after another, -1 for none: [... c] -> [... c*chunk]."""
    inside = torch.arange(chunk, device=place.device).repeat(place.shape[-1])
    first = repeat(place, "... c -> ... (c m)", m=chunk)
    return torch.where(first < 0, -1, first * chunk + inside)
