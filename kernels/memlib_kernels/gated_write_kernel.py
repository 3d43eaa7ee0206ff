"""A segment's gated write, and its gradients, tile by tile over slots and tokens.

Axes: b batch, n tokens, t tokens of a tile, s slots, e slot width.    With remain = 1 - erase:

    M_s' = prod_u remain_us M_s + sum_t strength_ts later_ts value_t,    later_ts = prod_{u>t} remain_us

Forward: a program holds a tile of slots and walks over the tokens from the last to the first, so that `later`
is at hand as a running product: products, erasure and update in one pass, and M is read once.

Backward, for a gradient G of M': with i_ts = later_ts (G_s . value_t),

    dM = prod_u remain_u G,    dstrength_t = i_t,    dvalue_t = sum_s strength_ts later_ts G_s
    derase_u = - later_u P_u,    P_0 = G . M,    P_{u+1} = remain_u P_u + strength_u (G . value_u)

P_u = G . (the slot before token u) is a linear recurrence over tokens, made tile by tile as an associative
scan. Nothing is divided by remain, so an erasure of exactly 1 is exact.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from memlib_kernels.attention_kernel import strides
from memlib_kernels.launch import launch
from memlib_kernels.rows import dense
from memlib_kernels.tiles import ANY, Tile, accumulator, next_power, precision, tile

WIDEST = 64  # numbers of a tile along the slot width: more would spill registers


@triton.jit
def tile_of(Matrix, rows, columns, row_stride, height, width):
    """The numbers at some rows and columns of [height width], zeros outside."""
    at = Matrix + rows.to(tl.int64)[:, None] * row_stride + columns[None, :]
    return tl.load(at, mask=(rows < height)[:, None] & (columns < width)[None, :], other=0.0)


@triton.jit
def put_tile(Matrix, value, rows, columns, row_stride, height, width):
    """Store a tile of [height width]."""
    at = Matrix + rows.to(tl.int64)[:, None] * row_stride + columns[None, :]
    mask = (rows < height)[:, None] & (columns < width)[None, :]
    tl.store(at, value.to(Matrix.dtype.element_ty), mask=mask)


@triton.jit
def later_of(Erase, tokens, slots, erase_n, n, s, beyond, ACC: tl.constexpr):
    """later of a tile: [t s]. beyond: the product of remain over all tokens after the one after the tile."""
    remain = 1.0 - tile_of(Erase, tokens + 1, slots, erase_n, n, s).to(ACC)
    return tl.cumprod(remain, 0, reverse=True) * beyond[None, :]


@triton.jit
def row_of(tile_, row, BLOCK: tl.constexpr):
    """One row of a tile."""
    return tl.sum(tl.where((tl.arange(0, BLOCK) == row)[:, None], tile_, 0.0), 0)


@triton.jit
def gated_write_forward(
    Slots, Strength, Erase, Values, Out,
    m_b, m_s, strength_b, strength_n, erase_b, erase_n, v_b, v_n, n, s, e,
    BLOCK_T: tl.constexpr, BLOCK_S: tl.constexpr, BLOCK_E: tl.constexpr, PRECISION: tl.constexpr,
    ACC: tl.constexpr,
):  # fmt: skip
    """One tile of the slots after all tokens."""
    b = tl.program_id(1).to(tl.int64)
    slots = tl.program_id(0) * BLOCK_S + tl.arange(0, BLOCK_S)
    places = tl.program_id(2) * BLOCK_E + tl.arange(0, BLOCK_E)
    Strength += b * strength_b
    Erase += b * erase_b
    Values += b * v_b
    later = tl.full([BLOCK_S], 1.0, ACC)  # of the first token of the tile at hand
    written = tl.zeros([BLOCK_S, BLOCK_E], ACC)
    tiles = tl.cdiv(n, BLOCK_T)
    for i in range(tiles):
        tokens = (tiles - 1 - i) * BLOCK_T + tl.arange(0, BLOCK_T)
        products = later_of(Erase, tokens, slots, erase_n, n, s, later, ACC)
        weight = tile_of(Strength, tokens, slots, strength_n, n, s).to(ACC) * products
        values = tile_of(Values, tokens, places, v_n, n, e).to(ACC)
        written = tl.dot(tl.trans(weight), values, written, input_precision=PRECISION, out_dtype=ACC)
        later = row_of(products, 0, BLOCK_T)
    kept = (1.0 - tl.load(Erase + slots, mask=slots < s, other=0.0).to(ACC)) * later
    written += kept[:, None] * tile_of(Slots + b * m_b, slots, places, m_s, s, e).to(ACC)
    put_tile(Out + b * s * e, written, slots, places, e, s, e)


@triton.jit
def gated_write_later(
    Erase, Later, Kept, erase_b, erase_n, n, s,
    BLOCK_T: tl.constexpr, BLOCK_S: tl.constexpr, ACC: tl.constexpr,
):  # fmt: skip
    """later: [b n s], and the product of remain over all tokens: [b s], of one tile of slots."""
    b = tl.program_id(1).to(tl.int64)
    slots = tl.program_id(0) * BLOCK_S + tl.arange(0, BLOCK_S)
    Erase += b * erase_b
    later = tl.full([BLOCK_S], 1.0, ACC)
    tiles = tl.cdiv(n, BLOCK_T)
    for i in range(tiles):
        tokens = (tiles - 1 - i) * BLOCK_T + tl.arange(0, BLOCK_T)
        products = later_of(Erase, tokens, slots, erase_n, n, s, later, ACC)
        put_tile(Later + b * n * s, products, tokens, slots, s, n, s)
        later = row_of(products, 0, BLOCK_T)
    kept = (1.0 - tl.load(Erase + slots, mask=slots < s, other=0.0).to(ACC)) * later
    tl.store(Kept + b * s + slots, kept, mask=slots < s)


@triton.jit
def then(keep, add, keep_next, add_next):
    """x -> keep x + add, and after it x -> keep_next x + add_next, as one such step."""
    return keep * keep_next, add * keep_next + add_next


@triton.jit
def gated_write_backward_slots(
    Grad, Slots, Strength, Erase, Values, Later, Kept, DSlots, DStrength, DErase,
    m_b, m_s, strength_b, strength_n, erase_b, erase_n, v_b, v_n, n, s, e,
    BLOCK_T: tl.constexpr, BLOCK_S: tl.constexpr, BLOCK_E: tl.constexpr, PRECISION: tl.constexpr,
    ACC: tl.constexpr,
):  # fmt: skip
    """dM, dstrength and derase of one tile of slots. The tokens' P is made one token ahead."""
    b = tl.program_id(1).to(tl.int64)
    slots = tl.program_id(0) * BLOCK_S + tl.arange(0, BLOCK_S)
    inside = slots < s
    Grad += b * s * e
    Values += b * v_b
    Later += b * n * s
    DErase += b * n * s
    kept = tl.load(Kept + b * s + slots, mask=inside, other=0.0)
    before = tl.zeros([BLOCK_S], ACC)  # P of the next tile's first token
    for first in range(0, e, BLOCK_E):
        places = first + tl.arange(0, BLOCK_E)
        grad = tile_of(Grad, slots, places, e, s, e).to(ACC)
        before += tl.sum(grad * tile_of(Slots + b * m_b, slots, places, m_s, s, e).to(ACC), 1)
        put_tile(DSlots + b * s * e, kept[:, None] * grad, slots, places, e, s, e)
    derase_first = -tl.load(Later + slots, mask=inside, other=0.0) * before
    tl.store(DErase + slots, derase_first.to(DErase.dtype.element_ty), mask=inside)
    for start in range(0, n, BLOCK_T):
        tokens = start + tl.arange(0, BLOCK_T)
        match = tl.zeros([BLOCK_T, BLOCK_S], ACC)
        for first in range(0, e, BLOCK_E):
            places = first + tl.arange(0, BLOCK_E)
            grad = tile_of(Grad, slots, places, e, s, e).to(ACC)
            values = tile_of(Values, tokens, places, v_n, n, e).to(ACC)
            match = tl.dot(values, tl.trans(grad), match, input_precision=PRECISION, out_dtype=ACC)
        dstrength = tile_of(Later, tokens, slots, s, n, s) * match
        put_tile(DStrength + b * n * s, dstrength, tokens, slots, s, n, s)
        remain = 1.0 - tile_of(Erase + b * erase_b, tokens, slots, erase_n, n, s).to(ACC)
        added = tile_of(Strength + b * strength_b, tokens, slots, strength_n, n, s).to(ACC) * match
        keep, add = tl.associative_scan((remain, added), 0, then)
        after = keep * before[None, :] + add
        derase = -tile_of(Later, tokens + 1, slots, s, n, s) * after
        put_tile(DErase, derase, tokens + 1, slots, s, n, s)
        before = row_of(after, BLOCK_T - 1, BLOCK_T)


@triton.jit
def gated_write_backward_values(
    Grad, Strength, Later, DValues, strength_b, strength_n, n, s, e,
    BLOCK_T: tl.constexpr, BLOCK_S: tl.constexpr, BLOCK_E: tl.constexpr, PRECISION: tl.constexpr,
    ACC: tl.constexpr,
):  # fmt: skip
    """dvalues of one tile of tokens and of the slot width."""
    b = tl.program_id(1).to(tl.int64)
    tokens = tl.program_id(0) * BLOCK_T + tl.arange(0, BLOCK_T)
    places = tl.program_id(2) * BLOCK_E + tl.arange(0, BLOCK_E)
    dvalues = tl.zeros([BLOCK_T, BLOCK_E], ACC)
    for first in range(0, s, BLOCK_S):
        slots = first + tl.arange(0, BLOCK_S)
        weight = tile_of(Strength + b * strength_b, tokens, slots, strength_n, n, s).to(ACC)
        weight *= tile_of(Later + b * n * s, tokens, slots, s, n, s)
        grad = tile_of(Grad + b * s * e, slots, places, e, s, e).to(ACC)
        dvalues = tl.dot(weight, grad, dvalues, input_precision=PRECISION, out_dtype=ACC)
    put_tile(DValues + b * n * e, dvalues, tokens, places, e, n, e)


# ---------------------------------------------------------------------------------------------- the launches


def constants(kernel: str, slots: Tensor, e: int) -> tuple[dict[str, Any], Tile]:
    """The constants that the kernels share, and the tile: n tokens by m slots. Products are of float32."""
    wide = torch.promote_types(slots.dtype, torch.float32)
    width = min(next_power(e), WIDEST)
    used = tile(kernel, width, wide)
    return {
        "BLOCK_T": used.n,
        "BLOCK_S": used.m,
        "BLOCK_E": width,
        "PRECISION": precision(slots.new_empty(0, dtype=wide)),
        "ACC": accumulator(slots),
    } | used.options, used


def forward(slots: Tensor, strength: Tensor, erase: Tensor, values: Tensor) -> Tensor:
    """Arguments and result as for `memlib_kernels::gated_write`."""
    (b, s, e), n = slots.shape, values.shape[1]
    out = slots.new_empty(slots.shape)
    slots, strength, erase, values = dense(slots, strength, erase, values)
    shared, used = constants("gated_write_forward", slots, e)
    launch(
        gated_write_forward,
        (-(-s // used.m), b, -(-e // shared["BLOCK_E"])),
        slots, strength, erase, values, out, *strides(slots, 2), *strides(strength, 2), *strides(erase, 2),
        *strides(values, 2), n, s, e, **shared,
    )  # fmt: skip
    return out


def backward(
    grad: Tensor, slots: Tensor, strength: Tensor, erase: Tensor, values: Tensor
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Arguments and results as for `memlib_kernels::gated_write_backward`."""
    (b, s, e), n = slots.shape, values.shape[1]
    dslots, dstrength, derase, dvalues = (t.new_empty(t.shape) for t in (slots, strength, erase, values))
    wide = torch.promote_types(slots.dtype, torch.float32)
    later, kept = slots.new_empty(b, n, s, dtype=wide), slots.new_empty(b, s, dtype=wide)
    grad = grad.contiguous()
    slots, strength, erase, values = dense(slots, strength, erase, values)
    used = tile("gated_write_later", ANY, wide)
    launch(
        gated_write_later,
        (-(-s // used.m), b),
        erase, later, kept, *strides(erase, 2), n, s,
        BLOCK_T=used.n, BLOCK_S=used.m, ACC=accumulator(slots), **used.options,
    )  # fmt: skip
    shared, used = constants("gated_write_backward_slots", slots, e)
    launch(
        gated_write_backward_slots,
        (-(-s // used.m), b),
        grad, slots, strength, erase, values, later, kept, dslots, dstrength, derase,
        *strides(slots, 2), *strides(strength, 2), *strides(erase, 2), *strides(values, 2), n, s, e, **shared,
    )  # fmt: skip
    shared, used = constants("gated_write_backward_values", slots, e)
    launch(
        gated_write_backward_values,
        (-(-n // used.n), b, -(-e // shared["BLOCK_E"])),
        grad, strength, later, dvalues, *strides(strength, 2), n, s, e, **shared,
    )  # fmt: skip
    return dslots, dstrength, derase, dvalues
