"""Softmax attention tile by tile: the forward pass and its gradients, without the matrix of scores.

Axes: b batch, h query heads, g query heads of one key head, n queries, m keys, k key width, e value width.

    s_nm = scale q_n . k_m + bias_nm,    out_n = sum_m softmax_m(s_nm) v_m,    lse_n = log sum_m exp(s_nm)

Forward: a program holds one tile of queries and walks over the keys. It keeps each row's maximum and sum so
far; where a new tile raises the maximum, what was summed is scaled down (the online softmax).

Backward: the scores are computed again. With p = exp(s - lse) and a gradient for both outputs,

    delta_n = dout_n . out_n - dlse_n,    ds = p (dout . v - delta)
    dq = scale ds k,    dk = scale ds^T q,    dv = p^T dout,    dbias = ds

Each output tile belongs to one program, so sums have one order and the result is the same in every run: one
kernel walks over the keys for dq, another over the queries for dk, dv and dbias.

With `places`, the queries of a group read only the keys whose numbers are listed for them. A row without any
key gets out = 0 and lse = -inf. The GPU's exponential has base 2: exp(x) = exp2(x log2 e). The factor is
applied to the difference, whose rounding is small where p is large.

Sources: Dao et al. 2022, arXiv 2205.14135; Dao 2023, arXiv 2307.08691; Milakov and Gimelshein 2018,
arXiv 1805.02867 (online softmax).
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from memlib_kernels.launch import launch
from memlib_kernels.rows import dense, heads_last
from memlib_kernels.tiles import Tile, accumulator, next_power, precision, tile

LOG2E = tl.constexpr(1.4426950408889634)


@triton.jit
def rows_of(Tensor_, rows, row_stride, inside, WIDTH: tl.constexpr, BLOCK: tl.constexpr, first=0):
    """The rows `rows` of a matrix whose last axis is contiguous, zeros outside: [rows BLOCK].

    first: the first column, a multiple of BLOCK.
    """
    columns = first + tl.arange(0, BLOCK)
    at = Tensor_ + rows.to(tl.int64)[:, None] * row_stride + columns[None, :]
    if WIDTH % BLOCK == 0:
        return tl.load(at, mask=inside[:, None], other=0.0)
    return tl.load(at, mask=inside[:, None] & (columns < WIDTH)[None, :], other=0.0)


@triton.jit
def product(
    a, b, A, rows_a, a_step, inside_a, B, rows_b, b_step, inside_b,
    WIDTH: tl.constexpr, BLOCK: tl.constexpr, CHUNK: tl.constexpr, PRECISION: tl.constexpr, ACC: tl.constexpr,
):  # fmt: skip
    """a b^T, of rows a of A and b of B: [rows_a rows_b].

    A wide float32 tile does not fit in registers, least of all as the TF32 terms of tf32x3, which the
    compiler keeps for the whole loop. Then CHUNK columns at a time are loaded again, and a and b not used.
    """
    if CHUNK >= BLOCK:
        total = tl.dot(a, tl.trans(b), input_precision=PRECISION, out_dtype=ACC)
    else:
        total = tl.zeros([a.shape[0], b.shape[0]], ACC)
        for first in range(0, BLOCK, CHUNK):
            part_a = rows_of(A, rows_a, a_step, inside_a, WIDTH, CHUNK, first)
            part_b = rows_of(B, rows_b, b_step, inside_b, WIDTH, CHUNK, first)
            total = tl.dot(part_a, tl.trans(part_b), total, input_precision=PRECISION, out_dtype=ACC)
    return total


@triton.jit
def put_rows(Tensor_, value, rows, row_stride, inside, WIDTH: tl.constexpr, BLOCK: tl.constexpr):
    """Store [rows BLOCK] as rows of a matrix."""
    columns = tl.arange(0, BLOCK)
    at = Tensor_ + rows.to(tl.int64)[:, None] * row_stride + columns[None, :]
    mask = inside[:, None] & (columns < WIDTH)[None, :]
    tl.store(at, value.to(Tensor_.dtype.element_ty), mask=mask)


@triton.jit
def masked_scores(
    score, Bias, Valid, rows, keys, inside, n, m, bias_n, bias_m, valid_m,
    CAUSAL: tl.constexpr, WINDOW: tl.constexpr, BIAS: tl.constexpr, VALID: tl.constexpr, ACC: tl.constexpr,
):  # fmt: skip
    """Scores with the bias added, and -inf where a query may not attend.

    score: [rows keys], rows: [rows 1], keys, inside: [1 keys]; or all of them transposed. Keys that are not
    inside must be m or more. Rows from n on get scores that nobody reads.
    """
    allowed = inside
    last = rows + (m - n)  # the last query sees the last key
    if CAUSAL:
        allowed = keys <= last  # so they are inside, and one comparison is enough
    if WINDOW > 0:
        allowed = allowed & (keys > last - WINDOW)
    if VALID:
        valid = tl.load(Valid + keys.to(tl.int64) * valid_m, mask=inside, other=0)
        allowed = allowed & (valid != 0)
    if BIAS == "key":
        score += tl.load(Bias + keys.to(tl.int64) * bias_m, mask=inside, other=0.0).to(ACC)
    if BIAS == "pair":
        at = Bias + rows.to(tl.int64) * bias_n + keys.to(tl.int64) * bias_m
        score += tl.load(at, mask=(rows < n) & (keys < m), other=0.0).to(ACC)
    return tl.where(allowed, score, float("-inf"))


@triton.jit
def key_range(
    start, n, m, BLOCK_N: tl.constexpr, BLOCK_M: tl.constexpr, CAUSAL: tl.constexpr, WINDOW: tl.constexpr
):
    """The keys that a tile of queries from `start` on may attend to: a multiple of BLOCK_M, and the end."""
    low = 0
    high = m
    if CAUSAL:
        high = tl.minimum(m, tl.maximum(0, start + BLOCK_N + (m - n)))
    if WINDOW > 0:
        low = tl.maximum(0, start + (m - n) - WINDOW + 1) // BLOCK_M * BLOCK_M
    return low, high


@triton.jit
def attention_forward(
    Q, K, V, Bias, Valid, Places, Out, Lse,
    q_b, q_h, q_n, k_b, k_h, k_m, v_b, v_h, v_m, bias_b, bias_h, bias_n, bias_m, valid_b, valid_m,
    places_b, places_h, places_g, out_b, out_h, out_n,
    heads, per_key_head, n, m, listed, group, tiles, scale,
    K_WIDTH: tl.constexpr, E_WIDTH: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_E: tl.constexpr,
    BLOCK_N: tl.constexpr, BLOCK_M: tl.constexpr, CHUNK: tl.constexpr, CAUSAL: tl.constexpr,
    WINDOW: tl.constexpr, BIAS: tl.constexpr, VALID: tl.constexpr, PLACES: tl.constexpr,
    PRECISION: tl.constexpr, ACC: tl.constexpr,
):  # fmt: skip
    """out and lse of one tile of queries. group: queries that share their places; tiles: of a group."""
    tile_of_head, bh = tl.program_id(0), tl.program_id(1)
    b, h = (bh // heads).to(tl.int64), (bh % heads).to(tl.int64)
    which = tile_of_head // tiles
    start = which * group + tile_of_head % tiles * BLOCK_N
    rows = start + tl.arange(0, BLOCK_N)
    inside_rows = (rows < n) & (rows < (which + 1) * group)
    Q += b * q_b + h * q_h
    K += b * k_b + h // per_key_head * k_h
    V += b * v_b + h // per_key_head * v_h
    Bias += b * bias_b + h * bias_h
    Valid += b * valid_b
    Places += b * places_b + h * places_h + which.to(tl.int64) * places_g
    q = rows_of(Q, rows, q_n, inside_rows, K_WIDTH, BLOCK_K)
    top = tl.full([BLOCK_N], float("-inf"), ACC)
    total = tl.zeros([BLOCK_N], ACC)
    mixed = tl.zeros([BLOCK_N, BLOCK_E], ACC)
    low, high = key_range(start, n, m, BLOCK_N, BLOCK_M, CAUSAL, WINDOW)
    if PLACES:
        high = listed
    for first in range(low, high, BLOCK_M):
        keys = first + tl.arange(0, BLOCK_M)
        inside = keys < high
        if PLACES:
            keys = tl.load(Places + keys, mask=inside, other=-1)
            inside = keys >= 0
            keys = tl.where(inside, keys, m)
        k = rows_of(K, keys, k_m, inside, K_WIDTH, BLOCK_K)
        v = rows_of(V, keys, v_m, inside, E_WIDTH, BLOCK_E)
        score = product(
            q, k, Q, rows, q_n, inside_rows, K, keys, k_m, inside, K_WIDTH, BLOCK_K, CHUNK, PRECISION, ACC
        )
        score = masked_scores(
            score * scale, Bias, Valid, rows[:, None], keys[None, :], inside[None, :],
            n, m, bias_n, bias_m, valid_m, CAUSAL, WINDOW, BIAS, VALID, ACC,
        )  # fmt: skip
        raised = tl.maximum(top, tl.max(score, 1))
        safe = tl.where(raised == float("-inf"), 0.0, raised)  # no key so far: -inf - -inf would be NaN
        p = tl.exp2((score - safe[:, None]) * LOG2E)
        shrink = tl.exp2((top - safe) * LOG2E)
        total = total * shrink + tl.sum(p, 1)
        mixed = tl.dot(p.to(v.dtype), v, mixed * shrink[:, None], input_precision=PRECISION, out_dtype=ACC)
        top = raised
    empty = total == 0.0
    mixed = mixed / tl.where(empty, 1.0, total)[:, None]
    lse = tl.where(empty, float("-inf"), top + tl.log(tl.where(empty, 1.0, total)))
    put_rows(Out + b * out_b + h * out_h, mixed, rows, out_n, inside_rows, E_WIDTH, BLOCK_E)
    tl.store(Lse + bh.to(tl.int64) * n + rows, lse, mask=inside_rows)


@triton.jit
def attention_backward_queries(
    Q, K, V, Bias, Valid, Places, Out, Lse, DOut, DLse, Delta, DQ,
    q_b, q_h, q_n, k_b, k_h, k_m, v_b, v_h, v_m, bias_b, bias_h, bias_n, bias_m, valid_b, valid_m,
    places_b, places_h, places_g, out_b, out_h, out_n, dq_b, dq_h, dq_n,
    heads, per_key_head, n, m, listed, group, tiles, scale,
    K_WIDTH: tl.constexpr, E_WIDTH: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_E: tl.constexpr,
    BLOCK_N: tl.constexpr, BLOCK_M: tl.constexpr, CHUNK: tl.constexpr, CAUSAL: tl.constexpr,
    WINDOW: tl.constexpr, BIAS: tl.constexpr, VALID: tl.constexpr, PLACES: tl.constexpr,
    PRECISION: tl.constexpr, ACC: tl.constexpr,
):  # fmt: skip
    """dq of one tile of queries, and its delta for the other kernel."""
    tile_of_head, bh = tl.program_id(0), tl.program_id(1)
    b, h = (bh // heads).to(tl.int64), (bh % heads).to(tl.int64)
    which = tile_of_head // tiles
    start = which * group + tile_of_head % tiles * BLOCK_N
    rows = start + tl.arange(0, BLOCK_N)
    inside_rows = (rows < n) & (rows < (which + 1) * group)
    at = bh.to(tl.int64) * n + rows
    Q += b * q_b + h * q_h
    K += b * k_b + h // per_key_head * k_h
    V += b * v_b + h // per_key_head * v_h
    Bias += b * bias_b + h * bias_h
    Valid += b * valid_b
    Places += b * places_b + h * places_h + which.to(tl.int64) * places_g
    DOut += b * out_b + h * out_h
    q = rows_of(Q, rows, q_n, inside_rows, K_WIDTH, BLOCK_K)
    dout = rows_of(DOut, rows, out_n, inside_rows, E_WIDTH, BLOCK_E)
    out = rows_of(Out + b * out_b + h * out_h, rows, out_n, inside_rows, E_WIDTH, BLOCK_E)
    delta = tl.sum(out.to(ACC) * dout.to(ACC), 1) - tl.load(DLse + at, mask=inside_rows, other=0.0)
    tl.store(Delta + at, delta, mask=inside_rows)
    lse = tl.load(Lse + at, mask=inside_rows, other=float("-inf"))
    lse = tl.where(lse == float("-inf"), float("inf"), lse)  # a row without keys: p = exp(-inf) = 0
    dq = tl.zeros([BLOCK_N, BLOCK_K], ACC)
    low, high = key_range(start, n, m, BLOCK_N, BLOCK_M, CAUSAL, WINDOW)
    if PLACES:
        high = listed
    for first in range(low, high, BLOCK_M):
        keys = first + tl.arange(0, BLOCK_M)
        inside = keys < high
        if PLACES:
            keys = tl.load(Places + keys, mask=inside, other=-1)
            inside = keys >= 0
            keys = tl.where(inside, keys, m)
        k = rows_of(K, keys, k_m, inside, K_WIDTH, BLOCK_K)
        v = rows_of(V, keys, v_m, inside, E_WIDTH, BLOCK_E)
        score = product(
            q, k, Q, rows, q_n, inside_rows, K, keys, k_m, inside, K_WIDTH, BLOCK_K, CHUNK, PRECISION, ACC
        )
        score = masked_scores(
            score * scale, Bias, Valid, rows[:, None], keys[None, :], inside[None, :],
            n, m, bias_n, bias_m, valid_m, CAUSAL, WINDOW, BIAS, VALID, ACC,
        )  # fmt: skip
        p = tl.exp2((score - lse[:, None]) * LOG2E)
        dp = product(
            dout, v, DOut, rows, out_n, inside_rows, V, keys, v_m, inside,
            E_WIDTH, BLOCK_E, CHUNK, PRECISION, ACC,
        )  # fmt: skip
        ds = p * (dp - delta[:, None])
        dq = tl.dot(ds.to(k.dtype), k, dq, input_precision=PRECISION, out_dtype=ACC)
    put_rows(DQ + b * dq_b + h * dq_h, dq * scale, rows, dq_n, inside_rows, K_WIDTH, BLOCK_K)


@triton.jit
def attention_backward_keys(
    Q, K, V, Bias, Valid, Lse, DOut, Delta, DK, DV, DBias,
    q_b, q_h, q_n, k_b, k_h, k_m, v_b, v_h, v_m, bias_b, bias_h, bias_n, bias_m, valid_b, valid_m,
    out_b, out_h, out_n, dk_b, dk_h, dk_m, dv_b, dv_h, dv_m,
    heads, per_key_head, n, m, scale,
    K_WIDTH: tl.constexpr, E_WIDTH: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_E: tl.constexpr,
    BLOCK_N: tl.constexpr, BLOCK_M: tl.constexpr, CHUNK: tl.constexpr, CAUSAL: tl.constexpr,
    WINDOW: tl.constexpr, BIAS: tl.constexpr, VALID: tl.constexpr, DBIAS: tl.constexpr,
    PRECISION: tl.constexpr, ACC: tl.constexpr,
):  # fmt: skip
    """dk, dv and dbias of one tile of keys.

    The scores are held transposed, [keys rows]: p and ds then enter their products as they are.
    DBias: [b h 1 m] where the bias is per key, [b h n m] where it is per pair.
    """
    first, bg = tl.program_id(0) * BLOCK_M, tl.program_id(1)
    key_heads = heads // per_key_head
    b, g = (bg // key_heads).to(tl.int64), (bg % key_heads).to(tl.int64)
    keys = first + tl.arange(0, BLOCK_M)
    inside = keys < m
    K += b * k_b + g * k_h
    V += b * v_b + g * v_h
    Valid += b * valid_b
    k = rows_of(K, keys, k_m, inside, K_WIDTH, BLOCK_K)
    v = rows_of(V, keys, v_m, inside, E_WIDTH, BLOCK_E)
    dk = tl.zeros([BLOCK_M, BLOCK_K], ACC)
    dv = tl.zeros([BLOCK_M, BLOCK_E], ACC)
    low = 0
    high = n
    if CAUSAL:
        low = tl.maximum(0, first - (m - n)) // BLOCK_N * BLOCK_N
    if WINDOW > 0:
        high = tl.minimum(n, tl.maximum(0, first + BLOCK_M - 1 + WINDOW - (m - n)))
    tiles = tl.cdiv(high - low, BLOCK_N)
    dbias = tl.zeros([BLOCK_M], ACC)
    for step in range(per_key_head * tiles):  # one loop: in a nested one dk and dv would move at each turn
        h = g * per_key_head + step // tiles
        head = b * heads + h
        rows = low + step % tiles * BLOCK_N + tl.arange(0, BLOCK_N)
        inside_rows = rows < n
        at = head * n + rows
        Q_h, DOut_h = Q + b * q_b + h * q_h, DOut + b * out_b + h * out_h
        q = rows_of(Q_h, rows, q_n, inside_rows, K_WIDTH, BLOCK_K)
        dout = rows_of(DOut_h, rows, out_n, inside_rows, E_WIDTH, BLOCK_E)
        lse = tl.load(Lse + at, mask=inside_rows, other=float("-inf"))
        lse = tl.where(lse == float("-inf"), float("inf"), lse)
        delta = tl.load(Delta + at, mask=inside_rows, other=0.0)
        score = product(
            k, q, K, keys, k_m, inside, Q_h, rows, q_n, inside_rows, K_WIDTH, BLOCK_K, CHUNK, PRECISION, ACC
        )
        score = masked_scores(
            score * scale, Bias + b * bias_b + h * bias_h, Valid,
            rows[None, :], keys[:, None], inside[:, None],
            n, m, bias_n, bias_m, valid_m, CAUSAL, WINDOW, BIAS, VALID, ACC,
        )  # fmt: skip
        p = tl.exp2((score - lse[None, :]) * LOG2E)
        dv = tl.dot(p.to(dout.dtype), dout, dv, input_precision=PRECISION, out_dtype=ACC)
        dp = product(
            v, dout, V, keys, v_m, inside, DOut_h, rows, out_n, inside_rows,
            E_WIDTH, BLOCK_E, CHUNK, PRECISION, ACC,
        )  # fmt: skip
        ds = p * (dp - delta[None, :])
        dk = tl.dot(ds.to(q.dtype), q, dk, input_precision=PRECISION, out_dtype=ACC)
        if DBIAS == "key":
            dbias = tl.where(step % tiles == 0, 0.0, dbias) + tl.sum(ds, 1)
            tl.store(DBias + head * m + keys, dbias, mask=inside & (step % tiles == tiles - 1))
        if DBIAS == "pair":
            pairs = DBias + at[None, :] * m + keys[:, None]
            tl.store(pairs, ds, mask=inside_rows[None, :] & inside[:, None])
    put_rows(DK + b * dk_b + g * dk_h, dk * scale, keys, dk_m, inside, K_WIDTH, BLOCK_K)
    put_rows(DV + b * dv_b + g * dv_h, dv, keys, dv_m, inside, E_WIDTH, BLOCK_E)


@triton.jit
def attention_backward_slots(
    Q, K, V, Bias, Lse, DOut, Delta, Starts, Groups, DK, DV, DBias,
    q_b, q_h, q_n, k_b, k_h, k_m, v_b, v_h, v_m, bias_b, bias_h, bias_m, out_b, out_h, out_n,
    dk_b, dk_h, dk_m, dv_b, dv_h, dv_m,
    heads, per_key_head, n, m, listed, group, scale,
    K_WIDTH: tl.constexpr, E_WIDTH: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_E: tl.constexpr,
    BLOCK_N: tl.constexpr, BIAS: tl.constexpr, DBIAS: tl.constexpr, ACC: tl.constexpr,
):  # fmt: skip
    """dk, dv and dbias of one key with `places`: the sum over the groups of queries that list it.

    Groups: [b h listed], the groups' numbers in the order of the keys that they list; Starts: [b h m+1],
    where a key's groups begin.
    """
    slot, bg = tl.program_id(0), tl.program_id(1)
    key_heads = heads // per_key_head
    b, g = (bg // key_heads).to(tl.int64), (bg % key_heads).to(tl.int64)
    columns, places = tl.arange(0, BLOCK_K), tl.arange(0, BLOCK_E)
    k = tl.load(K + b * k_b + g * k_h + slot * k_m + columns, mask=columns < K_WIDTH, other=0.0).to(ACC)
    v = tl.load(V + b * v_b + g * v_h + slot * v_m + places, mask=places < E_WIDTH, other=0.0).to(ACC)
    dk = tl.zeros([BLOCK_K], ACC)
    dv = tl.zeros([BLOCK_E], ACC)
    for i in range(per_key_head):
        h = g * per_key_head + i
        head = b * heads + h
        begin = tl.load(Starts + head * (m + 1) + slot)
        count = (tl.load(Starts + head * (m + 1) + slot + 1) - begin) * group
        bias = 0.0
        if BIAS == "key":
            bias = tl.load(Bias + b * bias_b + h * bias_h + slot * bias_m).to(ACC)
        dbias = tl.zeros([1], ACC)
        for first in range(0, count, BLOCK_N):
            entry = first + tl.arange(0, BLOCK_N)
            inside = entry < count
            which = tl.load(Groups + head * listed + begin + entry // group, mask=inside, other=0)
            rows = which * group + entry % group
            inside = inside & (rows < n)
            at = head * n + rows
            q = rows_of(Q + b * q_b + h * q_h, rows, q_n, inside, K_WIDTH, BLOCK_K).to(ACC)
            dout = rows_of(DOut + b * out_b + h * out_h, rows, out_n, inside, E_WIDTH, BLOCK_E).to(ACC)
            lse = tl.load(Lse + at, mask=inside, other=float("inf"))
            lse = tl.where(lse == float("-inf"), float("inf"), lse)
            delta = tl.load(Delta + at, mask=inside, other=0.0)
            p = tl.exp2((tl.sum(q * k[None, :], 1) * scale + bias - lse) * LOG2E)
            ds = p * (tl.sum(dout * v[None, :], 1) - delta)
            dk += tl.sum(ds[:, None] * q, 0)
            dv += tl.sum(p[:, None] * dout, 0)
            dbias += tl.sum(ds, 0)
        if DBIAS == "key":
            tl.store(DBias + head * m + slot + tl.arange(0, 1), dbias)
    dk_at = DK + b * dk_b + g * dk_h + slot * dk_m + columns
    dv_at = DV + b * dv_b + g * dv_h + slot * dv_m + places
    tl.store(dk_at, (dk * scale).to(DK.dtype.element_ty), mask=columns < K_WIDTH)
    tl.store(dv_at, dv.to(DV.dtype.element_ty), mask=places < E_WIDTH)


# ---------------------------------------------------------------------------------------------- the launches


def strides(tensor: Tensor | None, axes: int) -> list[int]:
    """The first strides of a tensor, 0 along axes of size 1; all 0 for None."""
    if tensor is None:
        return [0] * axes
    return [0 if size == 1 else stride for size, stride in zip(tensor.shape, tensor.stride(), strict=True)][
        :axes
    ]


def chunk(q: Tensor, v: Tensor) -> int:
    """Columns of a product's operands that are loaded at a time: all, unless they are wide and float32."""
    block = next_power(max(q.shape[-1], v.shape[-1]))
    return 64 if block > 128 and q.element_size() > 2 else block


def kind_of(bias: Tensor | None) -> str:
    """Whether a bias is per "key", per "pair" of query and key, or "none"."""
    return "none" if bias is None else "key" if bias.shape[-2] == 1 else "pair"


def widths(q: Tensor, v: Tensor, kernel: str) -> tuple[dict[str, Any], Tile]:
    """The constants that both passes share, and the tile."""
    k, e = q.shape[-1], v.shape[-1]
    chosen = tile(kernel, max(k, e), q.dtype)
    return {
        "K_WIDTH": k,
        "E_WIDTH": e,
        "BLOCK_K": next_power(k),
        "BLOCK_E": next_power(e),
        "BLOCK_N": chosen.n,
        "ACC": accumulator(q),
    } | chosen.options, chosen


def forward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    bias: Tensor | None,
    valid: Tensor | None,
    places: Tensor | None,
    causal: bool,
    window: int,
    scale: float,
) -> tuple[Tensor, Tensor]:
    """out: [b h n e], lse: [b h n]. Arguments as for `memlib_kernels::attention`."""
    (b, h, n, _), m = q.shape, k.shape[-2]
    q, k, v = dense(q, k, v)
    out = heads_last(q, v.shape[-1])
    lse = q.new_empty(b, h, n, dtype=torch.promote_types(q.dtype, torch.float32))
    constants, used = widths(q, v, "attention_forward")
    groups, group, tiles = grouping(places, n, used.n)
    launch(
        attention_forward,
        (groups * tiles, b * h),
        q, k, v, q if bias is None else bias, q if valid is None else valid, q if places is None else places,
        out, lse,
        *strides(q, 3), *strides(k, 3), *strides(v, 3), *strides(bias, 4), *strides(valid, 2),
        *strides(places, 3), *strides(out, 3),
        h, h // k.shape[1], n, m, 0 if places is None else places.shape[-1], group, tiles, scale,
        **constants, BLOCK_M=used.m, CHUNK=chunk(q, v), CAUSAL=causal, WINDOW=window, BIAS=kind_of(bias),
        VALID=valid is not None, PLACES=places is not None, PRECISION=precision(q),
    )  # fmt: skip
    return out, lse


def grouping(places: Tensor | None, n: int, block: int) -> tuple[int, int, int]:
    """Groups of queries that share their places, queries of a group, and tiles of a group."""
    groups = 1 if places is None else places.shape[2]
    group = n if places is None else -(-n // groups)
    return groups, group, -(-group // block)


def backward(
    grad_out: Tensor,
    grad_lse: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    lse: Tensor,
    bias: Tensor | None,
    valid: Tensor | None,
    places: Tensor | None,
    causal: bool,
    window: int,
    scale: float,
    bias_learns: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """dq, dk, dv, and dbias: [b h 1 m] per key, [b h n m] per pair, empty if the bias does not learn."""
    (b, h, n, _), (m, key_heads) = q.shape, (k.shape[-2], k.shape[1])
    q, k, v = dense(q, k, v)
    if grad_out.stride() != out.stride():
        grad_out = torch.empty_strided(out.shape, out.stride(), dtype=out.dtype, device=out.device).copy_(
            grad_out
        )
    grad_lse = grad_lse.contiguous()
    delta = torch.empty_like(lse)
    dq, dk, dv = heads_last(q, q.shape[-1]), heads_last(k, k.shape[-1]), heads_last(v, v.shape[-1])
    dbias = lse.new_empty(0)
    kind = kind_of(bias) if bias_learns else "none"
    if kind != "none":
        dbias = lse.new_zeros(b, h, 1 if kind == "key" else n, m)
    constants, used = widths(q, v, "attention_backward_queries")
    groups, group, tiles = grouping(places, n, used.n)
    shared = {"BIAS": kind_of(bias), "ACC": accumulator(q)}
    masks = {
        "CHUNK": chunk(q, v),
        "CAUSAL": causal,
        "WINDOW": window,
        "VALID": valid is not None,
        "PRECISION": precision(q),
    }
    pointers = (q, k, v, q if bias is None else bias, q if valid is None else valid)
    steps = (*strides(q, 3), *strides(k, 3), *strides(v, 3))
    launch(
        attention_backward_queries,
        (groups * tiles, b * h),
        *pointers, q if places is None else places, out, lse, grad_out, grad_lse, delta, dq,
        *steps, *strides(bias, 4), *strides(valid, 2), *strides(places, 3), *strides(out, 3), *strides(dq, 3),
        h, h // key_heads, n, m, 0 if places is None else places.shape[-1], group, tiles, scale,
        **constants | shared | masks, BLOCK_M=used.m, PLACES=places is not None,
    )  # fmt: skip
    gradients = (*strides(dk, 3), *strides(dv, 3))
    if places is None:
        constants, used = widths(q, v, "attention_backward_keys")
        launch(
            attention_backward_keys,
            (-(-m // used.m), b * key_heads),
            *pointers, lse, grad_out, delta, dk, dv, dbias if kind != "none" else q,
            *steps, *strides(bias, 4), *strides(valid, 2), *strides(out, 3), *gradients,
            h, h // key_heads, n, m, scale, **constants | shared | masks, BLOCK_M=used.m, DBIAS=kind,
        )  # fmt: skip
    else:
        starts, order = inverted(places, b, h, m)
        constants, _ = widths(q, v, "attention_backward_slots")
        bias_steps = [step for i, step in enumerate(strides(bias, 4)) if i != 2]
        launch(
            attention_backward_slots,
            (m, b * key_heads),
            *pointers[:4], lse, grad_out, delta, starts, order, dk, dv, dbias if kind != "none" else q,
            *steps, *bias_steps, *strides(out, 3), *gradients,
            h, h // key_heads, n, m, order.shape[-1], group, scale, **constants | shared, DBIAS=kind,
        )  # fmt: skip
    return dq, dk, dv, dbias


def inverted(places: Tensor, b: int, h: int, m: int) -> tuple[Tensor, Tensor]:
    """For each key the groups that list it: their first places [b h m+1], and the groups [b h listed]."""
    flat = places.expand(b, h, *places.shape[2:]).flatten(2)
    ordered, order = flat.sort(stable=True, dim=-1)
    keys = torch.arange(m + 1, device=places.device).expand(b, h, m + 1).contiguous()
    starts = torch.searchsorted(ordered.contiguous(), keys.to(ordered.dtype))
    return starts.to(torch.int32), (order // places.shape[-1]).to(torch.int32)
