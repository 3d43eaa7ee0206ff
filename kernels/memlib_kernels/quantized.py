"""Attention over memory tokens that are stored in 8 or 4 bits.

Axes: b batch, h heads, n queries, m tokens, k key width, e value width, g groups of a row, w their width.

Each group of a row has its own scale; zero is exact:

    x = q scale,    q in -127 … 127 (int8) or -7 … 7 (two to a byte in uint8, the even place in the low half,
                    each as q + 8)

The CPU path dequantises, then attends: on a CPU the saving is storage, not time. The kernel
(quantized_kernel.py) reads the small numbers and widens them on the way.
Sources: docs/coverage.md; absorbed projections: DeepSeek-AI 2024, arXiv 2405.04434, section 2.1.
"""

from __future__ import annotations

from math import ceil

import torch
from einops import rearrange
from torch import Tensor
from torch.nn import functional as F

from memlib_kernels.attention import attention, attention_reference, mask_rows
from memlib_kernels.launch import runs_triton
from memlib_kernels.quantized_op import fits, quantized_read_op, width_of
from memlib_kernels.tiles import has_tiles


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
    in q and scales. The kernel takes rows of one group, or groups of a power of two; torch takes all others.

    Where keys and values are projections of a bank X [m d], K = X W_k and V = X W_v, read the bank itself:

        q . K_m = (W_k q) . X_m,    sum_m w_m V_m = (sum_m w_m X_m) W_v

        quantized_read(q @ W_k.T, bank, bank, scale=k**-0.5) @ W_v

    Then nothing of the size [h m k] is made or kept: one quantised bank serves all heads and layers. A score
    costs d multiplications instead of k, but the m d k of the projection are saved. With m much larger than
    k, this pays for n < d k / (d - k) queries between two changes of the bank: 73 for d = 512 and k = 64. So
    it pays in generation, and in training only with short segments; never in time where projected keys can be
    kept, as for a frozen bank, though they then need h (k + e) numbers a token instead of d.
    """
    if runs_triton(q, *keys, *values, mask) and kernel_takes(q, keys, values, mask):
        scale = q.shape[-1] ** -0.5 if scale is None else scale
        return quantized_read_op(q, *keys, *values, mask, scale)[0]
    k, v = (expanded(dequantize(*t), q) for t in (keys, values))
    return attention(q, k, v, mask, scale=scale)


def kernel_takes(
    q: Tensor, keys: tuple[Tensor, Tensor], values: tuple[Tensor, Tensor], mask: Tensor | None
) -> bool:
    """Whether the kernel serves these arguments; torch serves all. It gives no gradient to a bias."""
    learned = mask is not None and mask.requires_grad
    served = not learned and fits(*keys) and fits(*values) and bool(q.numel() and keys[0].numel())
    widths = width_of(keys[0]), width_of(values[0])
    return served and has_tiles("quantized", q.dtype, *widths, rows=mask_rows(mask))


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
