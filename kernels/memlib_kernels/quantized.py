"""Attention over memory tokens that are stored in 8 or 4 bits.

Axes: b batch, h heads, n queries, m tokens, k key width, e value width, g groups of a row, w their width.

Each group of a row has its own scale; zero is exact:

    x = q scale,    q in -127 … 127 (int8) or -7 … 7 (two to a byte in uint8, the even place in the low half,
                    each as q + 8)

The CPU path dequantises, then attends: on a CPU the saving is storage, not time. A kernel reads the small
numbers and widens them on the way.
Source: docs/coverage.md.
"""

from __future__ import annotations

from math import ceil

import torch
from einops import rearrange
from torch import Tensor
from torch.nn import functional as F

from memlib_kernels.attention import attention, attention_reference


def quantized_read(
    q: Tensor,
    keys: tuple[Tensor, Tensor],
    values: tuple[Tensor, Tensor],
    mask: Tensor | None = None,
    *,
    scale: float | None = None,
) -> Tensor:
    """softmax(scale q K^T) V for quantised K and V, each given as (numbers, scales).

    q: [b h n k]; keys: int8 [b h m k] or uint8 [b h m k/2], and scales [b h m g]; values: the same with width
    e. Keys and values may have size 1 in b and h. mask: as for `attention`. Returns [b h n e]. Differentiable
    in q and scales.
    """
    k, v = (expanded(dequantize(*t), q) for t in (keys, values))
    return attention(q, k, v, mask, scale=scale)


def quantized_read_reference(
    q: Tensor,
    keys: tuple[Tensor, Tensor],
    values: tuple[Tensor, Tensor],
    mask: Tensor | None = None,
    *,
    scale: float | None = None,
) -> Tensor:
    """`quantized_read` with explicit scores and numbers unpacked one by one."""
    k, v = (expanded(dequantize_reference(*t), q) for t in (keys, values))
    return attention_reference(q, k, v, mask, scale=scale)


def expanded(tokens: Tensor, q: Tensor) -> Tensor:
    """Tokens in q's dtype, for q's rows and heads."""
    return tokens.to(q.dtype).expand(*q.shape[:2], -1, -1)


def dequantize(numbers: Tensor, scales: Tensor) -> Tensor:
    """Quantised rows as numbers of the scales' dtype: [… m k] or packed [… m k/2], [… m g] -> [… m k]."""
    if numbers.dtype == torch.uint8:
        pair = torch.stack((numbers & 15, numbers >> 4), -1)
        numbers = rearrange(pair, "... k two -> ... (k two)").to(scales.dtype) - 8
    width, groups = numbers.shape[-1], scales.shape[-1]
    each = ceil(width / groups)
    if groups * each == width:
        grouped = rearrange(numbers, "... (g w) -> ... g w", g=groups)
        return rearrange(grouped * rearrange(scales, "... g -> ... g 1"), "... g w -> ... (g w)")
    return numbers * scales.repeat_interleave(each, -1)[..., :width]


def dequantize_reference(numbers: Tensor, scales: Tensor) -> Tensor:
    """`dequantize` by groups filled up with zeros."""
    if numbers.dtype == torch.uint8:
        low, high = numbers.to(torch.int64) % 16 - 8, numbers.to(torch.int64) // 16 - 8
        numbers = rearrange([low, high], "two ... k -> ... (k two)")
    width, groups = numbers.shape[-1], scales.shape[-1]
    each = ceil(width / groups)
    padded = F.pad(numbers, (0, groups * each - width))
    grouped = rearrange(padded, "... (g w) -> ... g w", g=groups).to(scales.dtype)
    return rearrange(grouped * rearrange(scales, "... g -> ... g 1"), "... g w -> ... (g w)")[..., :width]
