"""The address of a feature vector, which internal and hds share: one softmax for each book."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from .base import heads_of, linear, scalar, softmax


def books(address: Any, x: Tensor) -> list[list[Tensor]]:
    """a_hs = softmax_s(sharpness (x W_a)_h . address_hs): for each book h, a weight for each slot s."""
    found = []
    for book, query in zip(address.table, heads_of(linear(address.proj, x), len(address.table)), strict=True):
        found.append(softmax([scalar(address.sharpness) * (query @ slot) for slot in book]))
    return found
