"""Attention over tokens in 8 or 4 bits, widened tile by tile, and its gradients.

Axes: b batch, h heads, n queries, m tokens, k key width, e value width, g groups of a row.

    K = numbers scale_group,    s_nm = c q_n . K_m + mask_nm,    out_n = sum_m softmax_m(s_nm) V_m

A program reads a tile of small numbers and their scales and widens them in registers: the wide keys and
values never exist in memory. Softmax and backward pass are those of attention_kernel.py; instead of the
logarithm of the sum, a row's maximum and sum are kept. The gradient of a scale is

    dscale_mg = sum over the columns of group g of dK_m numbers_m

made in the program that has summed dK of its tile of tokens over all queries; torch adds rows and heads that
share a bank. Layout of the numbers: quantized.py.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from memlib_kernels.attention_kernel import heads_last, put_rows, rows_of, strides
from memlib_kernels.launch import launch
from memlib_kernels.quantized_op import group_width, width_of
from memlib_kernels.rows import dense
from memlib_kernels.tiles import Tile, accumulator, next_power, precision, tile


@triton.jit
def numbers_of(
    Numbers, tokens, row_stride, inside, WIDTH: tl.constexpr, BLOCK: tl.constexpr, PACKED: tl.constexpr,
    ACC: tl.constexpr,
):  # fmt: skip
    """The small numbers of a tile of tokens, widened: [m BLOCK]. Packed, the even place is the low half.

    Beyond WIDTH they are 0, or -8 if packed: queries and outputs have nothing there.
    """
    if PACKED:
        bytes_ = rows_of(Numbers, tokens, row_stride, inside, WIDTH // 2, BLOCK // 2)
        return tl.interleave(bytes_ & 15, bytes_ >> 4).to(ACC) - 8.0
    return rows_of(Numbers, tokens, row_stride, inside, WIDTH, BLOCK).to(ACC)


@triton.jit
def scaled(
    numbers, Scales, tokens, row_stride, inside, groups, ROWS: tl.constexpr, BLOCK: tl.constexpr,
    EACH: tl.constexpr, ACC: tl.constexpr,
):  # fmt: skip
    """The numbers of a tile of tokens times their groups' scales, 0 outside: [m BLOCK]."""
    place = tl.arange(0, BLOCK // EACH)
    at = Scales + tokens.to(tl.int64)[:, None] * row_stride + place[None, :]
    scales = tl.load(at, mask=inside[:, None] & (place < groups)[None, :], other=0.0).to(ACC)
    grouped = tl.reshape(numbers, [ROWS, BLOCK // EACH, EACH]) * scales[:, :, None]
    return tl.reshape(grouped, [ROWS, BLOCK])


@triton.jit
def masked_scores(
    score, Mask, rows, tokens, n, m, mask_n, mask_m, MASK: tl.constexpr, ACC: tl.constexpr
):  # fmt: skip
    """Scores with the mask, -inf where a query may not attend.

    score: [n m], rows: [n 1], tokens: [1 m]; or all of them transposed.
    """
    allowed = (rows < n) & (tokens < m)
    if MASK != "none":
        at = Mask + rows.to(tl.int64) * mask_n + tokens.to(tl.int64) * mask_m
        mask = tl.load(at, mask=allowed, other=0)
        if MASK == "bias":
            score += mask.to(ACC)
        else:
            allowed = allowed & (mask != 0)
    return tl.where(allowed, score, float("-inf"))


@triton.jit
def quantized_forward(
    Q, K, KScale, V, VScale, Mask, Out, Top, Total,
    q_b, q_h, q_n, k_b, k_h, k_m, ks_b, ks_h, ks_m, v_b, v_h, v_m, vs_b, vs_h, vs_m,
    mask_b, mask_h, mask_n, mask_m, out_b, out_h, out_n, heads, n, m, scale, k_groups, v_groups,
    K_WIDTH: tl.constexpr, E_WIDTH: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_E: tl.constexpr,
    BLOCK_N: tl.constexpr, BLOCK_M: tl.constexpr, K_EACH: tl.constexpr, V_EACH: tl.constexpr,
    K_PACKED: tl.constexpr, V_PACKED: tl.constexpr, MASK: tl.constexpr, PRECISION: tl.constexpr,
    ACC: tl.constexpr,
):  # fmt: skip
    """out of one tile of queries, and its rows' maxima and sums."""
    b, h = (tl.program_id(1) // heads).to(tl.int64), (tl.program_id(1) % heads).to(tl.int64)
    rows = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    inside = rows < n
    q = rows_of(Q + b * q_b + h * q_h, rows, q_n, inside, K_WIDTH, BLOCK_K)
    Mask += b * mask_b + h * mask_h
    top = tl.full([BLOCK_N], float("-inf"), ACC)
    total = tl.zeros([BLOCK_N], ACC)
    mixed = tl.zeros([BLOCK_N, BLOCK_E], ACC)
    for first in range(0, m, BLOCK_M):
        tokens = first + tl.arange(0, BLOCK_M)
        held = tokens < m
        k = numbers_of(K + b * k_b + h * k_h, tokens, k_m, held, K_WIDTH, BLOCK_K, K_PACKED, ACC)
        at = KScale + b * ks_b + h * ks_h
        k = scaled(k, at, tokens, ks_m, held, k_groups, BLOCK_M, BLOCK_K, K_EACH, ACC)
        v = numbers_of(V + b * v_b + h * v_h, tokens, v_m, held, E_WIDTH, BLOCK_E, V_PACKED, ACC)
        at = VScale + b * vs_b + h * vs_h
        v = scaled(v, at, tokens, vs_m, held, v_groups, BLOCK_M, BLOCK_E, V_EACH, ACC)
        score = tl.dot(q, tl.trans(k.to(q.dtype)), input_precision=PRECISION, out_dtype=ACC) * scale
        score = masked_scores(score, Mask, rows[:, None], tokens[None, :], n, m, mask_n, mask_m, MASK, ACC)
        raised = tl.maximum(top, tl.max(score, 1))
        safe = tl.where(raised == float("-inf"), 0.0, raised)  # nothing so far: -inf - -inf would be NaN
        p = tl.exp(score - safe[:, None])
        shrink = tl.exp(top - safe)
        total = total * shrink + tl.sum(p, 1)
        mixed *= shrink[:, None]
        mixed = tl.dot(p.to(q.dtype), v.to(q.dtype), mixed, input_precision=PRECISION, out_dtype=ACC)
        top = raised
    empty = total == 0.0
    total = tl.where(empty, 1.0, total)
    put_rows(Out + b * out_b + h * out_h, mixed / total[:, None], rows, out_n, inside, E_WIDTH, BLOCK_E)
    place = (b * heads + h) * n + rows
    tl.store(Top + place, tl.where(empty, 0.0, top), mask=inside)
    tl.store(Total + place, total, mask=inside)


@triton.jit
def quantized_backward_queries(
    Q, K, KScale, V, VScale, Mask, Out, DOut, Top, Total, Delta, DQ,
    q_b, q_h, q_n, k_b, k_h, k_m, ks_b, ks_h, ks_m, v_b, v_h, v_m, vs_b, vs_h, vs_m,
    mask_b, mask_h, mask_n, mask_m, out_b, out_h, out_n, dout_b, dout_h, dout_n,
    heads, n, m, scale, k_groups, v_groups,
    K_WIDTH: tl.constexpr, E_WIDTH: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_E: tl.constexpr,
    BLOCK_N: tl.constexpr, BLOCK_M: tl.constexpr, K_EACH: tl.constexpr, V_EACH: tl.constexpr,
    K_PACKED: tl.constexpr, V_PACKED: tl.constexpr, MASK: tl.constexpr, PRECISION: tl.constexpr,
    ACC: tl.constexpr,
):  # fmt: skip
    """dq of one tile of queries, and delta = dout . out."""
    b, h = (tl.program_id(1) // heads).to(tl.int64), (tl.program_id(1) % heads).to(tl.int64)
    rows = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    inside = rows < n
    place = (b * heads + h) * n + rows
    q = rows_of(Q + b * q_b + h * q_h, rows, q_n, inside, K_WIDTH, BLOCK_K)
    out = rows_of(Out + b * out_b + h * out_h, rows, out_n, inside, E_WIDTH, BLOCK_E)
    dout = rows_of(DOut + b * dout_b + h * dout_h, rows, dout_n, inside, E_WIDTH, BLOCK_E)
    delta = tl.sum(out.to(ACC) * dout.to(ACC), 1)
    tl.store(Delta + place, delta, mask=inside)
    top = tl.load(Top + place, mask=inside, other=0.0)
    total = tl.load(Total + place, mask=inside, other=1.0)
    Mask += b * mask_b + h * mask_h
    dq = tl.zeros([BLOCK_N, BLOCK_K], ACC)
    for first in range(0, m, BLOCK_M):
        tokens = first + tl.arange(0, BLOCK_M)
        held = tokens < m
        k = numbers_of(K + b * k_b + h * k_h, tokens, k_m, held, K_WIDTH, BLOCK_K, K_PACKED, ACC)
        at = KScale + b * ks_b + h * ks_h
        k = scaled(k, at, tokens, ks_m, held, k_groups, BLOCK_M, BLOCK_K, K_EACH, ACC)
        v = numbers_of(V + b * v_b + h * v_h, tokens, v_m, held, E_WIDTH, BLOCK_E, V_PACKED, ACC)
        at = VScale + b * vs_b + h * vs_h
        v = scaled(v, at, tokens, vs_m, held, v_groups, BLOCK_M, BLOCK_E, V_EACH, ACC)
        k = k.to(q.dtype)
        score = tl.dot(q, tl.trans(k), input_precision=PRECISION, out_dtype=ACC) * scale
        score = masked_scores(score, Mask, rows[:, None], tokens[None, :], n, m, mask_n, mask_m, MASK, ACC)
        p = tl.exp(score - top[:, None]) / total[:, None]
        dp = tl.dot(dout, tl.trans(v.to(q.dtype)), input_precision=PRECISION, out_dtype=ACC)
        ds = p * (dp - delta[:, None])
        dq = tl.dot(ds.to(q.dtype), k, dq, input_precision=PRECISION, out_dtype=ACC)
    put_rows(DQ + place_of(b, h, heads, n, K_WIDTH), dq * scale, rows, K_WIDTH, inside, K_WIDTH, BLOCK_K)


@triton.jit
def place_of(b, h, heads, rows, width):
    """Where the rows of one batch row and head begin in a contiguous [b h rows width]."""
    return (b * heads + h) * rows * width


@triton.jit
def put_group_sums(
    Out, products, tokens, inside, groups, ROWS: tl.constexpr, BLOCK: tl.constexpr, EACH: tl.constexpr
):  # fmt: skip
    """The sums of [m BLOCK] over the columns of each group, stored as [m g]."""
    place = tl.arange(0, BLOCK // EACH)
    found = tl.sum(tl.reshape(products, [ROWS, BLOCK // EACH, EACH]), 2)
    at = Out + tokens.to(tl.int64)[:, None] * groups + place[None, :]
    tl.store(at, found, mask=inside[:, None] & (place < groups)[None, :])


@triton.jit
def quantized_backward_scales(
    Q, K, KScale, V, VScale, Mask, DOut, Top, Total, Delta, DKScale, DVScale,
    q_b, q_h, q_n, k_b, k_h, k_m, ks_b, ks_h, ks_m, v_b, v_h, v_m, vs_b, vs_h, vs_m,
    mask_b, mask_h, mask_n, mask_m, dout_b, dout_h, dout_n,
    heads, n, m, scale, k_groups, v_groups,
    K_WIDTH: tl.constexpr, E_WIDTH: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_E: tl.constexpr,
    BLOCK_N: tl.constexpr, BLOCK_M: tl.constexpr, K_EACH: tl.constexpr, V_EACH: tl.constexpr,
    K_PACKED: tl.constexpr, V_PACKED: tl.constexpr, MASK: tl.constexpr, PRECISION: tl.constexpr,
    ACC: tl.constexpr,
):  # fmt: skip
    """The gradients of the scales of one tile of tokens, for one batch row and head.

    The scores are held transposed, [m n]: p and ds then enter their products as they are.
    """
    b, h = (tl.program_id(1) // heads).to(tl.int64), (tl.program_id(1) % heads).to(tl.int64)
    tokens = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)
    held = tokens < m
    Mask += b * mask_b + h * mask_h
    k_numbers = numbers_of(K + b * k_b + h * k_h, tokens, k_m, held, K_WIDTH, BLOCK_K, K_PACKED, ACC)
    v_numbers = numbers_of(V + b * v_b + h * v_h, tokens, v_m, held, E_WIDTH, BLOCK_E, V_PACKED, ACC)
    k = scaled(
        k_numbers, KScale + b * ks_b + h * ks_h, tokens, ks_m, held, k_groups, BLOCK_M, BLOCK_K, K_EACH, ACC
    ).to(Q.dtype.element_ty)
    v = scaled(
        v_numbers, VScale + b * vs_b + h * vs_h, tokens, vs_m, held, v_groups, BLOCK_M, BLOCK_E, V_EACH, ACC
    ).to(Q.dtype.element_ty)
    dk = tl.zeros([BLOCK_M, BLOCK_K], ACC)
    dv = tl.zeros([BLOCK_M, BLOCK_E], ACC)
    for start in range(0, n, BLOCK_N):
        rows = start + tl.arange(0, BLOCK_N)
        inside = rows < n
        place = (b * heads + h) * n + rows
        q = rows_of(Q + b * q_b + h * q_h, rows, q_n, inside, K_WIDTH, BLOCK_K)
        dout = rows_of(DOut + b * dout_b + h * dout_h, rows, dout_n, inside, E_WIDTH, BLOCK_E)
        score = tl.dot(k, tl.trans(q), input_precision=PRECISION, out_dtype=ACC) * scale
        score = masked_scores(score, Mask, rows[None, :], tokens[:, None], n, m, mask_n, mask_m, MASK, ACC)
        top = tl.load(Top + place, mask=inside, other=0.0)
        total = tl.load(Total + place, mask=inside, other=1.0)
        delta = tl.load(Delta + place, mask=inside, other=0.0)
        p = tl.exp(score - top[None, :]) / total[None, :]
        dv = tl.dot(p.to(q.dtype), dout, dv, input_precision=PRECISION, out_dtype=ACC)
        dp = tl.dot(v, tl.trans(dout), input_precision=PRECISION, out_dtype=ACC)
        ds = p * (dp - delta[None, :])
        dk = tl.dot(ds.to(q.dtype), q, dk, input_precision=PRECISION, out_dtype=ACC)
    # Read again: kept over the loop, they would fill registers.
    k_numbers = numbers_of(K + b * k_b + h * k_h, tokens, k_m, held, K_WIDTH, BLOCK_K, K_PACKED, ACC)
    v_numbers = numbers_of(V + b * v_b + h * v_h, tokens, v_m, held, E_WIDTH, BLOCK_E, V_PACKED, ACC)
    DKScale += place_of(b, h, heads, m, k_groups)
    DVScale += place_of(b, h, heads, m, v_groups)
    put_group_sums(DKScale, dk * scale * k_numbers, tokens, held, k_groups, BLOCK_M, BLOCK_K, K_EACH)
    put_group_sums(DVScale, dv * v_numbers, tokens, held, v_groups, BLOCK_M, BLOCK_E, V_EACH)


# ---------------------------------------------------------------------------------------------- the launches


def constants(
    kernel: str, q: Tensor, keys: Tensor, key_scales: Tensor, values: Tensor, value_scales: Tensor
) -> tuple[dict[str, Any], Tile]:
    """The constants that all kernels share, and the tile."""
    k, e = width_of(keys), width_of(values)
    used = tile(kernel, max(k, e), q.dtype)
    return {
        "K_WIDTH": k,
        "E_WIDTH": e,
        "BLOCK_K": next_power(k),
        "BLOCK_E": next_power(e),
        "BLOCK_N": used.n,
        "BLOCK_M": used.m,
        "K_EACH": next_power(k) if key_scales.shape[-1] == 1 else group_width(keys, key_scales),
        "V_EACH": next_power(e) if value_scales.shape[-1] == 1 else group_width(values, value_scales),
        "K_PACKED": keys.dtype == torch.uint8,
        "V_PACKED": values.dtype == torch.uint8,
        "PRECISION": precision(q),
        "ACC": accumulator(q),
    } | used.options, used


def everywhere(mask: Tensor | None, q: Tensor, m: int) -> tuple[str, Tensor, list[int]]:
    """A mask's kind, its numbers, and its steps along [b h n m]; anything and zeros for None."""
    if mask is None:
        return "none", q, [0] * 4
    full = mask[(None,) * (4 - mask.ndim)].expand(*q.shape[:3], m)
    if mask.dtype == torch.bool:
        return "bool", full.view(torch.uint8), list(full.stride())
    return "bias", full, list(full.stride())


def forward(
    q: Tensor,
    keys: Tensor,
    key_scales: Tensor,
    values: Tensor,
    value_scales: Tensor,
    mask: Tensor | None,
    scale: float,
) -> tuple[Tensor, Tensor, Tensor]:
    """Arguments and results as for `memlib_kernels::quantized_read`."""
    (b, h, n, _), m = q.shape, keys.shape[2]
    out, wide = heads_last(q, width_of(values)), torch.promote_types(q.dtype, torch.float32)
    top, total = (q.new_empty(b, h, n, dtype=wide) for _ in range(2))
    tensors = dense(q, keys, key_scales, values, value_scales)
    shared, used = constants("quantized_forward", *tensors)
    kind, full, steps = everywhere(mask, q, m)
    launch(
        quantized_forward,
        (-(-n // used.n), b * h),
        *tensors, full, out, top, total, *(step for t in tensors for step in strides(t, 3)), *steps,
        *strides(out, 3), h, n, m, scale, key_scales.shape[-1], value_scales.shape[-1], **shared, MASK=kind,
    )  # fmt: skip
    return out, top, total


def backward(
    grad: Tensor,
    q: Tensor,
    keys: Tensor,
    key_scales: Tensor,
    values: Tensor,
    value_scales: Tensor,
    mask: Tensor | None,
    out: Tensor,
    top: Tensor,
    total: Tensor,
    scale: float,
    scales_learn: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """Arguments and results as for `memlib_kernels::quantized_read_backward`."""
    (b, h, n, _), m = q.shape, keys.shape[2]
    dq, delta = q.new_empty(q.shape), torch.empty_like(top)
    (grad,) = dense(grad)
    tensors = dense(q, keys, key_scales, values, value_scales)
    kind, full, steps = everywhere(mask, q, m)
    steps = [*(step for t in tensors for step in strides(t, 3)), *steps]
    groups = [t.shape[-1] for t in (key_scales, value_scales)]
    shared, used = constants("quantized_backward_queries", *tensors)
    launch(
        quantized_backward_queries,
        (-(-n // used.n), b * h),
        *tensors, full, out, grad, top, total, delta, dq, *steps, *strides(out, 3), *strides(grad, 3),
        h, n, m, scale, *groups, **shared, MASK=kind,
    )  # fmt: skip
    if not scales_learn:
        return dq, top.new_empty(0), top.new_empty(0)
    dk, dv = (top.new_empty(b, h, m, g) for g in groups)
    shared, used = constants("quantized_backward_scales", *tensors)
    launch(
        quantized_backward_scales,
        (-(-m // used.m), b * h),
        *tensors, full, grad, top, total, delta, dk, dv, *steps, *strides(grad, 3), h, n, m, scale,
        *groups, **shared, MASK=kind,
    )  # fmt: skip
    return dq, dk, dv
