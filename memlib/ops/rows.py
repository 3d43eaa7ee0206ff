"""Rows of a sequence or a table, taken or replaced by their places.

Axes: b batch, h heads, n new rows, c rows, k width. All rows stand one after another in one table, so that
an index has one entry per row and not one per number.
"""

from __future__ import annotations

import torch
from einops import rearrange, repeat
from torch import Tensor


def take_rows(tokens: Tensor, index: Tensor) -> Tensor:
    """The rows at some places: tokens [b c …], index [b n] in 0 … c - 1 -> [b n …]."""
    b, c = tokens.shape[:2]
    first = rearrange(torch.arange(b, device=index.device) * c, "b -> b 1")
    flat = rearrange(index + first, "b n -> (b n)")
    return tokens.flatten(0, 1).index_select(0, flat).unflatten(0, (b, index.shape[1]))


def take_rows_reference(tokens: Tensor, index: Tensor) -> Tensor:
    """`take_rows` by advanced indexing."""
    return tokens[rearrange(torch.arange(len(tokens), device=tokens.device), "b -> b 1"), index]


def put_rows(into: Tensor, new: Tensor, place: Tensor, valid: Tensor) -> Tensor:
    """A copy of `into` with the valid new rows at their places.

    into: [b h c k], new: [b h n k]; place: [b n], distinct in each row of the batch; valid: [b n]
    -> [b h c k], of the dtype of `into`.
    """
    b, h, c, _ = into.shape
    first = rearrange(torch.arange(b * h, device=place.device) * c, "(b h) -> b h 1", h=h)
    flat = rearrange(rearrange(place, "b n -> b 1 n") + first, "b h n -> (b h n)")
    table, rows = rearrange(into, "b h c k -> (b h c) k"), rearrange(new, "b h n k -> (b h n) k")
    kept = torch.where(
        repeat(valid, "b n -> (b h n) 1", h=h), rows.to(into.dtype), table.index_select(0, flat)
    )
    return rearrange(table.index_copy(0, flat, kept), "(b h c) k -> b h c k", b=b, h=h)


def put_rows_reference(into: Tensor, new: Tensor, place: Tensor, valid: Tensor) -> Tensor:
    """`put_rows` by gather and scatter."""
    h, k = into.shape[1], into.shape[3]
    place, valid = (repeat(t, "b n -> b h n k", h=h, k=k) for t in (place, valid))
    return into.scatter(2, place, torch.where(valid, new.to(into.dtype), into.gather(2, place)))
