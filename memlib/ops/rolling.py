"""The newest tokens of a stream, and their mean.

Axes: b batch, n tokens, m tokens and those before them, w newest tokens, d features.
"""

from __future__ import annotations

import torch
from einops import einsum, rearrange, repeat
from torch import Tensor
from torch.nn import functional as F


def rolling_mean(hidden: Tensor, mask: Tensor, window: int, newest: int | None = None) -> Tensor:
    """The mean of the last `window` valid tokens up to each token: [b n d], [b n] -> [b n d].

    newest: compute it for this many last tokens only.
    """
    first = hidden.shape[1] - (hidden.shape[1] if newest is None else newest)
    number = mask.cumsum(1)
    now, then = rearrange(number[:, first:], "b n -> b n 1"), rearrange(number, "b m -> b 1 m")
    near = (rearrange(mask, "b m -> b 1 m") & (then > now - window)).tril(first)
    weight = near.to(hidden.dtype)
    total = einsum(weight, hidden, "b n m, b m d -> b n d")
    return total / weight.sum(-1, keepdim=True).clamp(min=1)


def rolling_mean_reference(hidden: Tensor, mask: Tensor, window: int, newest: int | None = None) -> Tensor:
    """`rolling_mean`, token by token."""
    rows = []
    for tokens, valid in zip(hidden, mask, strict=True):
        means = []
        for i in range(len(tokens)):
            last = tokens[: i + 1][valid[: i + 1]][-window:]
            means.append(last.mean(0) if len(last) else torch.zeros_like(tokens[i]))
        rows.append(torch.stack(means)[len(means) - (len(means) if newest is None else newest) :])
    return torch.stack(rows)


def newest_tokens(hidden: Tensor, mask: Tensor, count: int) -> tuple[Tensor, Tensor]:
    """The last `count` valid tokens in order, zeros before them: [b n d], [b n] -> [b w d], [b w]."""
    missing = max(0, count - hidden.shape[1])
    hidden, mask = F.pad(hidden, (0, 0, missing, 0)), F.pad(mask, (missing, 0), value=False)
    order = mask.long().argsort(dim=1, stable=True)[:, mask.shape[1] - count :]
    there = mask.gather(1, order)
    picked = hidden.gather(1, repeat(order, "b w -> b w d", d=hidden.shape[-1]))
    return picked * rearrange(there, "b w -> b w 1"), there


def newest_tokens_reference(hidden: Tensor, mask: Tensor, count: int) -> tuple[Tensor, Tensor]:
    """`newest_tokens`, row by row."""
    kept = hidden.new_zeros(hidden.shape[0], count, hidden.shape[2])
    there = mask.new_zeros(hidden.shape[0], count)
    for b, (tokens, valid) in enumerate(zip(hidden, mask, strict=True)):
        last = tokens[valid][max(0, int(valid.sum()) - count) :]
        if len(last):
            kept[b, count - len(last) :], there[b, count - len(last) :] = last, True
    return kept, there
