"""Addresses by several books, and the read at them, with their gradients, tile by tile over the slots.

Axes: b batch, n queries, r = (b n) rows, h books, s slots of a book, k width of an address, e slot width,
p parts of the rows.

    a_nh = softmax_s(c query_nh . table_hs),    y_n = sum_h share_nh sum_s a_nhs M_hs    c: sharpness

The read takes a maximum and a sum for each book as it walks (the online softmax). It keeps both instead of
an address, and not their logarithm: at a high sharpness that would lose digits. With g_nhs = dy_n . M_hs:

    dshare_nh = sum_s a g,    ds = share a (g - dshare)
    dquery = c ds table,    dtable = c ds^T query,    dc = sum ds (query . table),    dM = (share a)^T dy

`weights` stores the addresses, which a write needs too. Their gradient is that of any softmax,
ds = a (da - sum_s a da). A sum over many rows is made by several programs, each over a part of the rows, and
torch adds the parts in one order.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from memlib_kernels.attention_kernel import put_rows, rows_of, strides
from memlib_kernels.launch import launch
from memlib_kernels.rows import dense
from memlib_kernels.tiles import Tile, accumulator, next_power, precision, tile

PARTS = 32  # at most, of a sum over rows
WIDEST = 256  # bytes of a tile along the slot width: more would spill registers


@triton.jit
def raised_sum(score, top, total):
    """exp(score - maximum) of one more tile, the new maximum and sum, and what scales older sums."""
    raised = tl.maximum(top, tl.max(score, 1))
    p = tl.exp(score - raised[:, None])
    shrink = tl.exp(top - raised)
    return p, raised, total * shrink + tl.sum(p, 1), shrink


@triton.jit
def scores(
    q, Table, factor, t_s, slots, s, K_WIDTH: tl.constexpr, BLOCK_K: tl.constexpr, PRECISION: tl.constexpr,
    ACC: tl.constexpr,
):  # fmt: skip
    """factor q . table of a tile, -inf outside: [n s], and the tile of the table: [s k]."""
    table = rows_of(Table, slots, t_s, slots < s, K_WIDTH, BLOCK_K)
    score = tl.dot(q, tl.trans(table), input_precision=PRECISION, out_dtype=ACC) * factor
    return tl.where((slots < s)[None, :], score, float("-inf")), table


@triton.jit
def addressed_weights_forward(
    Query, Table, Sharpness, Out, q_r, q_h, t_h, t_s, r, heads, s,
    K_WIDTH: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_S: tl.constexpr,
    PRECISION: tl.constexpr, ACC: tl.constexpr,
):  # fmt: skip
    """The addresses of one tile of rows in one book: one walk over the slots for the sum, one to divide."""
    factor = tl.load(Sharpness).to(ACC)
    h = tl.program_id(1).to(tl.int64)
    rows = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    q = rows_of(Query + h * q_h, rows, q_r, rows < r, K_WIDTH, BLOCK_K)
    Table += h * t_h
    top = tl.full([BLOCK_N], float("-inf"), ACC)
    total = tl.zeros([BLOCK_N], ACC)
    for first in range(0, s, BLOCK_S):
        slots = first + tl.arange(0, BLOCK_S)
        score, _ = scores(q, Table, factor, t_s, slots, s, K_WIDTH, BLOCK_K, PRECISION, ACC)
        _, top, total, _ = raised_sum(score, top, total)
    for first in range(0, s, BLOCK_S):
        slots = first + tl.arange(0, BLOCK_S)
        score, _ = scores(q, Table, factor, t_s, slots, s, K_WIDTH, BLOCK_K, PRECISION, ACC)
        a = tl.exp(score - top[:, None]) / total[:, None]
        at = Out + (rows.to(tl.int64)[:, None] * heads + h) * s + slots[None, :]
        tl.store(at, a.to(Out.dtype.element_ty), mask=(rows < r)[:, None] & (slots < s)[None, :])


@triton.jit
def addressed_weights_backward_query(
    DOut, Address, Query, Table, Sharpness, DQuery, DSharpness, Delta, q_r, q_h, t_h, t_s, r, heads, s,
    K_WIDTH: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_S: tl.constexpr,
    PRECISION: tl.constexpr, ACC: tl.constexpr,
):  # fmt: skip
    """dquery, dsharpness of one tile of rows in one book, and delta = sum_s a da. DOut, Address: [r h s]."""
    factor = tl.load(Sharpness).to(ACC)
    h = tl.program_id(1).to(tl.int64)
    rows = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    inside = rows < r
    place = rows.to(tl.int64) * heads + h
    Table += h * t_h
    delta = tl.zeros([BLOCK_N], ACC)
    for first in range(0, s, BLOCK_S):
        slots = first + tl.arange(0, BLOCK_S)
        at = place[:, None] * s + slots[None, :]
        mask = inside[:, None] & (slots < s)[None, :]
        a = tl.load(Address + at, mask=mask, other=0.0).to(ACC)
        da = tl.load(DOut + at, mask=mask, other=0.0).to(ACC)
        delta += tl.sum(a * da, 1)
    tl.store(Delta + place, delta, mask=inside)
    dq = tl.zeros([BLOCK_N, BLOCK_K], ACC)
    for first in range(0, s, BLOCK_S):
        slots = first + tl.arange(0, BLOCK_S)
        at = place[:, None] * s + slots[None, :]
        mask = inside[:, None] & (slots < s)[None, :]
        a = tl.load(Address + at, mask=mask, other=0.0).to(ACC)
        da = tl.load(DOut + at, mask=mask, other=0.0).to(ACC)
        ds = a * (da - delta[:, None])
        table = rows_of(Table, slots, t_s, slots < s, K_WIDTH, BLOCK_K)
        dq = tl.dot(ds.to(table.dtype), table, dq, input_precision=PRECISION, out_dtype=ACC)
    q = rows_of(Query + h * q_h, rows, q_r, inside, K_WIDTH, BLOCK_K).to(ACC)
    tl.store(DSharpness + place, tl.sum(dq * q, 1), mask=inside)
    put_rows(DQuery + h * K_WIDTH, dq * factor, rows, heads * K_WIDTH, inside, K_WIDTH, BLOCK_K)


@triton.jit
def addressed_weights_backward_table(
    DOut, Address, Query, Sharpness, Delta, DTable, q_r, q_h, r, heads, s, part,
    K_WIDTH: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_S: tl.constexpr,
    PRECISION: tl.constexpr, ACC: tl.constexpr,
):  # fmt: skip
    """dtable of one tile of slots in one book, summed over `part` rows. DTable: [p h s k]."""
    factor = tl.load(Sharpness).to(ACC)
    h = tl.program_id(1).to(tl.int64)
    slots = tl.program_id(0) * BLOCK_S + tl.arange(0, BLOCK_S)
    begin = tl.program_id(2) * part
    dtable = tl.zeros([BLOCK_S, BLOCK_K], ACC)
    for first in range(begin, tl.minimum(begin + part, r), BLOCK_N):
        rows = first + tl.arange(0, BLOCK_N)
        inside = rows < tl.minimum(begin + part, r)
        place = rows.to(tl.int64) * heads + h
        at = place[None, :] * s + slots[:, None]
        mask = inside[None, :] & (slots < s)[:, None]
        a = tl.load(Address + at, mask=mask, other=0.0).to(ACC)
        da = tl.load(DOut + at, mask=mask, other=0.0).to(ACC)
        ds = a * (da - tl.load(Delta + place, mask=inside, other=0.0)[None, :])
        q = rows_of(Query + h * q_h, rows, q_r, inside, K_WIDTH, BLOCK_K)
        dtable = tl.dot(ds.to(q.dtype), q, dtable, input_precision=PRECISION, out_dtype=ACC)
    out = DTable + (tl.program_id(2).to(tl.int64) * heads + h) * s * K_WIDTH
    put_rows(out, dtable * factor, slots, K_WIDTH, slots < s, K_WIDTH, BLOCK_K)


@triton.jit
def addressed_read_forward(
    Query, Table, Sharpness, Slots, Share, Out, Top, Total,
    q_b, q_n, q_h, t_h, t_s, m_b, m_h, m_s, share_b, share_n, share_h, n, heads, s, e,
    K_WIDTH: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_S: tl.constexpr,
    BLOCK_E: tl.constexpr, SHARE: tl.constexpr, PRECISION: tl.constexpr, ACC: tl.constexpr,
):  # fmt: skip
    """y of one tile of queries and of the slot width, book after book; each book's maximum and sum."""
    factor = tl.load(Sharpness).to(ACC)
    b = tl.program_id(1).to(tl.int64)
    rows = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    places = tl.program_id(2) * BLOCK_E + tl.arange(0, BLOCK_E)
    inside = rows < n
    y = tl.zeros([BLOCK_N, BLOCK_E], ACC)
    for book in range(heads):
        h = tl.cast(book, tl.int64)
        q = rows_of(Query + b * q_b + h * q_h, rows, q_n, inside, K_WIDTH, BLOCK_K)
        top = tl.full([BLOCK_N], float("-inf"), ACC)
        total = tl.zeros([BLOCK_N], ACC)
        mixed = tl.zeros([BLOCK_N, BLOCK_E], ACC)
        for first in range(0, s, BLOCK_S):
            slots = first + tl.arange(0, BLOCK_S)
            score, _ = scores(q, Table + h * t_h, factor, t_s, slots, s, K_WIDTH, BLOCK_K, PRECISION, ACC)
            p, top, total, shrink = raised_sum(score, top, total)
            at = Slots + b * m_b + h * m_h + slots.to(tl.int64)[:, None] * m_s + places[None, :]
            held = tl.load(at, mask=(slots < s)[:, None] & (places < e)[None, :], other=0.0).to(q.dtype)
            mixed *= shrink[:, None]
            mixed = tl.dot(p.to(q.dtype), held, mixed, input_precision=PRECISION, out_dtype=ACC)
        share = 1.0 / total
        if SHARE:
            at = Share + b * share_b + rows.to(tl.int64) * share_n + h * share_h
            share *= tl.load(at, mask=inside, other=0.0).to(ACC)
        else:
            share /= heads
        y += mixed * share[:, None]
        if tl.program_id(2) == 0:
            tl.store(Top + (b * n + rows) * heads + h, top, mask=inside)
            tl.store(Total + (b * n + rows) * heads + h, total, mask=inside)
    out = Out + (b * n + rows)[:, None] * e + places[None, :]
    tl.store(out, y.to(Out.dtype.element_ty), mask=inside[:, None] & (places < e)[None, :])


@triton.jit
def addresses(score, top, total):
    """The addresses of a tile again, from the maximum and the sum of the forward pass."""
    return tl.exp(score - top) / total


@triton.jit
def addresses_by_slot(
    table, q, factor, Top, Total, place, inside, PRECISION: tl.constexpr, ACC: tl.constexpr
):  # fmt: skip
    """The addresses of a tile, transposed: [s n]. They then enter their products as they are.

    Rows of slots outside hold anything: no sum runs over slots here, and these rows are not stored.
    """
    score = tl.dot(table, tl.trans(q), input_precision=PRECISION, out_dtype=ACC) * factor
    top = tl.load(Top + place, mask=inside, other=0.0)
    total = tl.load(Total + place, mask=inside, other=1.0)
    return addresses(score, top[None, :], total[None, :])


@triton.jit
def products(
    DOut, Slots, rows, slots, n, s, m_s, e, BLOCK_N: tl.constexpr, BLOCK_S: tl.constexpr,
    BLOCK_E: tl.constexpr, BY_SLOT: tl.constexpr, PRECISION: tl.constexpr, ACC: tl.constexpr,
):  # fmt: skip
    """g = dy . M of one tile, over the whole slot width: [n s], or [s n] by slot."""
    g = tl.zeros([BLOCK_S, BLOCK_N] if BY_SLOT else [BLOCK_N, BLOCK_S], ACC)
    for first in range(0, e, BLOCK_E):
        places = first + tl.arange(0, BLOCK_E)
        width = (places < e)[None, :]
        at = DOut + rows.to(tl.int64)[:, None] * e + places[None, :]
        dout = tl.load(at, mask=(rows < n)[:, None] & width, other=0.0)
        at = Slots + slots.to(tl.int64)[:, None] * m_s + places[None, :]
        held = tl.load(at, mask=(slots < s)[:, None] & width, other=0.0).to(dout.dtype)
        if BY_SLOT:
            g = tl.dot(held, tl.trans(dout), g, input_precision=PRECISION, out_dtype=ACC)
        else:
            g = tl.dot(dout, tl.trans(held), g, input_precision=PRECISION, out_dtype=ACC)
    return g


@triton.jit
def shares(Share, rows, n, share_n, heads, SHARE: tl.constexpr, ACC: tl.constexpr):
    """A book's share for each row, 0 outside."""
    if SHARE:
        return tl.load(Share + rows.to(tl.int64) * share_n, mask=rows < n, other=0.0).to(ACC)
    return tl.where(rows < n, 1.0, 0.0).to(ACC) / heads


@triton.jit
def addressed_read_backward_query(
    Query, Table, Sharpness, Slots, Share, DOut, Top, Total, DQuery, DSharpness, DShare,
    q_b, q_n, q_h, t_h, t_s, m_b, m_h, m_s, share_b, share_n, share_h, n, heads, s, e,
    K_WIDTH: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_S: tl.constexpr,
    BLOCK_E: tl.constexpr, SHARE: tl.constexpr, PRECISION: tl.constexpr, ACC: tl.constexpr,
):  # fmt: skip
    """dquery, dsharpness and dshare of one tile of queries in one book."""
    factor = tl.load(Sharpness).to(ACC)
    b, h = (tl.program_id(1) // heads).to(tl.int64), (tl.program_id(1) % heads).to(tl.int64)
    rows = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    inside = rows < n
    place = (b * n + rows) * heads + h
    q = rows_of(Query + b * q_b + h * q_h, rows, q_n, inside, K_WIDTH, BLOCK_K)
    DOut += b * n * e
    Slots += b * m_b + h * m_h
    Table += h * t_h
    top = tl.load(Top + place, mask=inside, other=0.0)[:, None]
    total = tl.load(Total + place, mask=inside, other=1.0)[:, None]
    dshare = tl.zeros([BLOCK_N], ACC)
    for first in range(0, s, BLOCK_S):
        slots = first + tl.arange(0, BLOCK_S)
        score, _ = scores(q, Table, factor, t_s, slots, s, K_WIDTH, BLOCK_K, PRECISION, ACC)
        g = products(DOut, Slots, rows, slots, n, s, m_s, e, BLOCK_N, BLOCK_S, BLOCK_E, False, PRECISION, ACC)
        dshare += tl.sum(addresses(score, top, total) * g, 1)
    tl.store(DShare + place, dshare, mask=inside)
    share = shares(Share + b * share_b + h * share_h, rows, n, share_n, heads, SHARE, ACC)
    dq = tl.zeros([BLOCK_N, BLOCK_K], ACC)
    for first in range(0, s, BLOCK_S):
        slots = first + tl.arange(0, BLOCK_S)
        score, table = scores(q, Table, factor, t_s, slots, s, K_WIDTH, BLOCK_K, PRECISION, ACC)
        g = products(DOut, Slots, rows, slots, n, s, m_s, e, BLOCK_N, BLOCK_S, BLOCK_E, False, PRECISION, ACC)
        ds = addresses(score, top, total) * (g - dshare[:, None]) * share[:, None]
        dq = tl.dot(ds.to(table.dtype), table, dq, input_precision=PRECISION, out_dtype=ACC)
    tl.store(DSharpness + place, tl.sum(dq * q.to(ACC), 1), mask=inside)
    out = DQuery + (b * n * heads + h) * K_WIDTH
    put_rows(out, dq * factor, rows, heads * K_WIDTH, inside, K_WIDTH, BLOCK_K)


@triton.jit
def addressed_read_backward_table(
    Query, Table, Sharpness, Slots, Share, DOut, Top, Total, DShare, DTable,
    q_b, q_n, q_h, t_h, t_s, m_b, m_h, m_s, share_b, share_n, share_h, n, heads, s, e,
    K_WIDTH: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_S: tl.constexpr,
    BLOCK_E: tl.constexpr, SHARE: tl.constexpr, PRECISION: tl.constexpr, ACC: tl.constexpr,
):  # fmt: skip
    """dtable of one tile of slots in one book, summed over the queries of one row: DTable [b h s k]."""
    factor = tl.load(Sharpness).to(ACC)
    b, h = (tl.program_id(1) // heads).to(tl.int64), (tl.program_id(1) % heads).to(tl.int64)
    slots = tl.program_id(0) * BLOCK_S + tl.arange(0, BLOCK_S)
    DOut += b * n * e
    Slots += b * m_b + h * m_h
    table = rows_of(Table + h * t_h, slots, t_s, slots < s, K_WIDTH, BLOCK_K)
    dtable = tl.zeros([BLOCK_S, BLOCK_K], ACC)
    for first in range(0, n, BLOCK_N):
        rows = first + tl.arange(0, BLOCK_N)
        inside = rows < n
        place = (b * n + rows) * heads + h
        q = rows_of(Query + b * q_b + h * q_h, rows, q_n, inside, K_WIDTH, BLOCK_K)
        dshare = tl.load(DShare + place, mask=inside, other=0.0)
        share = shares(Share + b * share_b + h * share_h, rows, n, share_n, heads, SHARE, ACC)
        a = addresses_by_slot(table, q, factor, Top, Total, place, inside, PRECISION, ACC)
        g = products(DOut, Slots, rows, slots, n, s, m_s, e, BLOCK_N, BLOCK_S, BLOCK_E, True, PRECISION, ACC)
        ds = a * (g - dshare[None, :]) * share[None, :]
        dtable = tl.dot(ds.to(q.dtype), q, dtable, input_precision=PRECISION, out_dtype=ACC)
    out = DTable + (b * heads + h) * s * K_WIDTH
    put_rows(out, dtable * factor, slots, K_WIDTH, slots < s, K_WIDTH, BLOCK_K)


@triton.jit
def addressed_read_backward_slots(
    Query, Table, Sharpness, Share, DOut, Top, Total, DSlots,
    q_b, q_n, q_h, t_h, t_s, share_b, share_n, share_h, n, heads, s, e,
    K_WIDTH: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_S: tl.constexpr,
    BLOCK_E: tl.constexpr, SHARE: tl.constexpr, PRECISION: tl.constexpr, ACC: tl.constexpr,
):  # fmt: skip
    """The gradient of one tile of slots and of their width."""
    factor = tl.load(Sharpness).to(ACC)
    b, h = (tl.program_id(1) // heads).to(tl.int64), (tl.program_id(1) % heads).to(tl.int64)
    slots = tl.program_id(0) * BLOCK_S + tl.arange(0, BLOCK_S)
    places = tl.program_id(2) * BLOCK_E + tl.arange(0, BLOCK_E)
    table = rows_of(Table + h * t_h, slots, t_s, slots < s, K_WIDTH, BLOCK_K)
    dslots = tl.zeros([BLOCK_S, BLOCK_E], ACC)
    for first in range(0, n, BLOCK_N):
        rows = first + tl.arange(0, BLOCK_N)
        inside = rows < n
        place = b * n + rows
        q = rows_of(Query + b * q_b + h * q_h, rows, q_n, inside, K_WIDTH, BLOCK_K)
        share = shares(Share + b * share_b + h * share_h, rows, n, share_n, heads, SHARE, ACC)
        a = addresses_by_slot(table, q, factor, Top, Total, place * heads + h, inside, PRECISION, ACC)
        at = DOut + place[:, None] * e + places[None, :]
        dout = tl.load(at, mask=inside[:, None] & (places < e)[None, :], other=0.0)
        a = (a * share[None, :]).to(dout.dtype)
        dslots = tl.dot(a, dout, dslots, input_precision=PRECISION, out_dtype=ACC)
    out = DSlots + ((b * heads + h) * s + slots)[:, None] * e + places[None, :]
    mask = (slots < s)[:, None] & (places < e)[None, :]
    tl.store(out, dslots.to(DSlots.dtype.element_ty), mask=mask)


# ---------------------------------------------------------------------------------------------- the launches


def constants(kernel: str, query: Tensor) -> tuple[dict[str, Any], Tile]:
    """The constants that all kernels share, and the tile."""
    k = query.shape[-1]
    used = tile(kernel, k, query.dtype)
    return {
        "K_WIDTH": k,
        "BLOCK_K": next_power(k),
        "BLOCK_N": used.n,
        "BLOCK_S": used.m,
        "PRECISION": precision(query),
        "ACC": accumulator(query),
    } | used.options, used


def weights(query: Tensor, table: Tensor, sharpness: Tensor) -> Tensor:
    """Arguments and result as for `memlib_kernels::addressed_weights`."""
    (b, n, h, _), s = query.shape, table.shape[1]
    query, table = dense(query.flatten(0, 1), table)
    out = query.new_empty(b, n, h, s)
    shared, used = constants("addressed_weights_forward", query)
    launch(
        addressed_weights_forward,
        (-(-b * n // used.n), h),
        query, table, sharpness, out, *strides(query, 2), *strides(table, 2), b * n, h, s, **shared,
    )  # fmt: skip
    return out


def weights_backward(
    grad: Tensor, query: Tensor, table: Tensor, sharpness: Tensor, address: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """Arguments and results as for `memlib_kernels::addressed_weights_backward`."""
    (b, n, h, k), s = query.shape, table.shape[1]
    dquery = query.new_empty(query.shape)
    query, table = dense(query.flatten(0, 1), table)
    grad = grad.contiguous()
    wide = torch.promote_types(query.dtype, torch.float32)
    delta, dsharpness = (query.new_empty(b * n, h, dtype=wide) for _ in range(2))
    shared, used = constants("addressed_weights_backward_query", query)
    launch(
        addressed_weights_backward_query,
        (-(-b * n // used.n), h),
        grad, address, query, table, sharpness, dquery, dsharpness, delta,
        *strides(query, 2), *strides(table, 2), b * n, h, s, **shared,
    )  # fmt: skip
    shared, used = constants("addressed_weights_backward_table", query)
    tiles = -(-b * n // used.n)
    part = -(-tiles // PARTS) * used.n
    dtable = table.new_empty(-(-b * n // part), h, s, k, dtype=wide)
    launch(
        addressed_weights_backward_table,
        (-(-s // used.m), h, len(dtable)),
        grad, address, query, sharpness, delta, dtable, *strides(query, 2), b * n, h, s, part, **shared,
    )  # fmt: skip
    return dquery, dtable.sum(0).to(table.dtype), total_of(dsharpness, sharpness)


def part_of(query: Tensor, e: int) -> int:
    """Numbers of a tile along the slot width."""
    return max(16, min(next_power(e), WIDEST // query.element_size()))


def total_of(parts: Tensor, like: Tensor) -> Tensor:
    """The sum of all parts, as a tensor of one element like another."""
    return parts.sum().to(like.dtype).reshape(like.shape)


def read(
    query: Tensor, table: Tensor, sharpness: Tensor, slots: Tensor, share: Tensor | None
) -> tuple[Tensor, Tensor, Tensor]:
    """Arguments and results as for `memlib_kernels::addressed_read`."""
    (b, n, h, _), (s, e) = query.shape, slots.shape[2:]
    query, table, slots = dense(query, table, slots)
    out, wide = query.new_empty(b, n, e), torch.promote_types(query.dtype, torch.float32)
    top, total = (query.new_empty(b, n, h, dtype=wide) for _ in range(2))
    shared, used = constants("addressed_read_forward", query)
    width = part_of(query, e)
    launch(
        addressed_read_forward,
        (-(-n // used.n), b, -(-e // width)),
        query, table, sharpness, slots, query if share is None else share, out, top, total,
        *strides(query, 3), *strides(table, 2), *strides(slots, 3), *strides(share, 3), n, h, s, e,
        **shared, BLOCK_E=width, SHARE=share is not None,
    )  # fmt: skip
    return out, top, total


def read_backward(
    grad: Tensor,
    query: Tensor,
    table: Tensor,
    sharpness: Tensor,
    slots: Tensor,
    share: Tensor | None,
    top: Tensor,
    total: Tensor,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Arguments and results as for `memlib_kernels::addressed_read_backward`."""
    (b, n, h, k), (s, e) = query.shape, slots.shape[2:]
    dquery, dslots = query.new_empty(query.shape), slots.new_empty(slots.shape)
    dshare, dsharpness, dtable = torch.empty_like(top), torch.empty_like(top), top.new_empty(b, h, s, k)
    query, table, slots = dense(query, table, slots)
    grad = grad.contiguous()
    weighted = query if share is None else share
    steps = (*strides(query, 3), *strides(table, 2))
    sizes = (*strides(share, 3), n, h, s, e)
    width = part_of(query, e)
    options = {"BLOCK_E": width, "SHARE": share is not None}
    shared, used = constants("addressed_read_backward_query", query)
    launch(
        addressed_read_backward_query,
        (-(-n // used.n), b * h),
        query, table, sharpness, slots, weighted, grad, top, total, dquery, dsharpness, dshare,
        *steps, *strides(slots, 3), *sizes, **shared, **options,
    )  # fmt: skip
    shared, used = constants("addressed_read_backward_table", query)
    launch(
        addressed_read_backward_table,
        (-(-s // used.m), b * h),
        query, table, sharpness, slots, weighted, grad, top, total, dshare, dtable,
        *steps, *strides(slots, 3), *sizes, **shared, **options,
    )  # fmt: skip
    shared, used = constants("addressed_read_backward_slots", query)
    launch(
        addressed_read_backward_slots,
        (-(-s // used.m), b * h, -(-e // width)),
        query, table, sharpness, weighted, grad, top, total, dslots, *steps, *sizes, **shared, **options,
    )  # fmt: skip
    return dquery, dtable.sum(0).to(table.dtype), total_of(dsharpness, sharpness), dslots, dshare
