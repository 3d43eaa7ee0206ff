"""Queries, keys and attention by content, which ltm and ring share."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from .base import linear, scalar, shifted, softmax, unit


def query_of(key: Any, x: Tensor) -> Tensor:
    """What a token asks for: u(x W)."""
    return unit(linear(key.proj, x))


def key_of(key: Any, x: Tensor, before: Tensor) -> Tensor:
    """What it is filed under: the same map of the shifted token."""
    return query_of(key, shifted(key.shift, x, before))


def score_of(attention: Any, query: Tensor, key: Tensor) -> Tensor:
    """sharpness sqrt(k) query . key."""
    return scalar(attention.sharpness) * len(key) ** 0.5 * (query @ key)


def attended(scores: list[Tensor], values: list[Tensor], nothing: Tensor) -> Tensor:
    """sum_s softmax(scores)_s value_s, zero where there is nothing."""
    weights = softmax(scores)
    return sum((weight * value for weight, value in zip(weights, values, strict=True)), nothing)
