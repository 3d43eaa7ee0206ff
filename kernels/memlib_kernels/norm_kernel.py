"""Normalisation with residual, dropout and activation, and its gradients, in one pass over the rows each.

Axes: n rows, d features, p programs of the backward pass.    norm.py has the formula. A program holds whole
rows, so that the backward pass computes the statistics again and nothing but `total` is kept. With z = u
weight + bias, dz from dy through activation and dropout, and du = dz weight:

    dtotal = scale (du - u mean_d(du u) [- mean_d du for kind "layer"]) + what came for x + residual
    dweight = sum_n dz u,    dbias = sum_n dz

Each program sums dweight and dbias over its rows; torch adds the programs' sums, in one order.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from memlib_kernels.launch import launch
from memlib_kernels.rows import as_rows
from memlib_kernels.tiles import accumulator, next_power, tile

PROGRAMS = 512  # at most, of the backward pass: each adds two rows to the sums of dweight and dbias


@triton.jit
def normalised(total, inside, d, eps, LAYER: tl.constexpr):
    """u: [n d], zeros outside, and scale: [n 1]."""
    if LAYER:
        total = tl.where(inside, total - tl.sum(total, 1, keep_dims=True) / d, 0.0)
    scale = 1.0 / tl.sqrt(tl.sum(total * total, 1, keep_dims=True) / d + eps)
    return tl.where(inside, total * scale, 0.0), scale


@triton.jit
def kept(seed, rows, columns, d, dropout):
    """Where dropout keeps a number, by its place in row-major order."""
    return tl.rand(seed, rows * d + columns) >= dropout


@triton.jit(do_not_specialize=["seed"])
def norm_forward(
    X, Residual, Weight, Bias, Total, Out, x_n, residual_n, n, d, dropout, grow, seed, eps,
    BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr, LAYER: tl.constexpr, RESIDUAL: tl.constexpr,
    BIAS: tl.constexpr, DROPOUT: tl.constexpr, ACTIVATION: tl.constexpr, ACC: tl.constexpr,
):  # fmt: skip
    """One tile of rows of y and of x + residual. grow: 1 / (1 - dropout)."""
    rows = tl.program_id(0).to(tl.int64) * BLOCK_N + tl.arange(0, BLOCK_N)[:, None]
    columns = tl.arange(0, BLOCK_D)[None, :]
    inside = (rows < n) & (columns < d)
    total = tl.load(X + rows * x_n + columns, mask=inside, other=0.0).to(ACC)
    if RESIDUAL:
        total += tl.load(Residual + rows * residual_n + columns, mask=inside, other=0.0).to(ACC)
        rounded = total.to(Total.dtype.element_ty)
        tl.store(Total + rows * d + columns, rounded, mask=inside)
        total = rounded.to(ACC)
    u, _ = normalised(total, inside, d, eps, LAYER)
    y = u * tl.load(Weight + columns, mask=columns < d, other=0.0).to(ACC)
    if BIAS:
        y += tl.load(Bias + columns, mask=columns < d, other=0.0).to(ACC)
    if DROPOUT:
        y = tl.where(kept(seed, rows, columns, d, dropout), y * grow, 0.0)
    if ACTIVATION == "relu":
        y = tl.where(y <= 0.0, 0.0, y)
    if ACTIVATION == "silu":
        y = y / (1.0 + tl.exp(-y))
    tl.store(Out + rows * d + columns, y.to(Out.dtype.element_ty), mask=inside)


@triton.jit(do_not_specialize=["seed"])
def norm_backward(
    DOut, DTotal, Total, Weight, Bias, DX, DWeight, DBias, out_n, dtotal_n, total_n,
    n, d, tiles, dropout, grow, seed, eps,
    BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr, LAYER: tl.constexpr, RESIDUAL: tl.constexpr,
    BIAS: tl.constexpr, DROPOUT: tl.constexpr, ACTIVATION: tl.constexpr, ACC: tl.constexpr,
):  # fmt: skip
    """dx of `tiles` tiles of rows, and their sums for dweight and dbias: [p d]."""
    program = tl.program_id(0).to(tl.int64)
    columns = tl.arange(0, BLOCK_D)[None, :]
    weight = tl.load(Weight + columns, mask=columns < d, other=0.0).to(ACC)
    dweight = tl.zeros([1, BLOCK_D], ACC)
    dbias = tl.zeros([1, BLOCK_D], ACC)
    for i in range(tiles):
        rows = (program * tiles + i) * BLOCK_N + tl.arange(0, BLOCK_N)[:, None]
        inside = (rows < n) & (columns < d)
        total = tl.load(Total + rows * total_n + columns, mask=inside, other=0.0).to(ACC)
        dz = tl.load(DOut + rows * out_n + columns, mask=inside, other=0.0).to(ACC)
        u, scale = normalised(total, inside, d, eps, LAYER)
        if ACTIVATION != "none":
            z = u * weight
            if BIAS:
                z += tl.load(Bias + columns, mask=columns < d, other=0.0).to(ACC)
            if DROPOUT:
                z *= grow  # dropped numbers get no gradient, whatever z is there
            if ACTIVATION == "relu":
                dz = tl.where(z > 0.0, dz, 0.0)
            if ACTIVATION == "silu":
                s = 1.0 / (1.0 + tl.exp(-z))
                dz = dz * s * (1.0 + z * (1.0 - s))
        if DROPOUT:
            dz = tl.where(kept(seed, rows, columns, d, dropout), dz * grow, 0.0)
        dweight += tl.sum(dz * u, 0, keep_dims=True)
        dbias += tl.sum(dz, 0, keep_dims=True)
        du = dz * weight
        dx = du - u * (tl.sum(du * u, 1, keep_dims=True) / d)
        if LAYER:
            dx -= tl.sum(du, 1, keep_dims=True) / d
        dx *= scale
        if RESIDUAL:
            dx += tl.load(DTotal + rows * dtotal_n + columns, mask=inside, other=0.0).to(ACC)
        tl.store(DX + rows * d + columns, dx.to(DX.dtype.element_ty), mask=inside)
    tl.store(DWeight + program * d + columns, dweight, mask=columns < d)
    if BIAS:
        tl.store(DBias + program * d + columns, dbias, mask=columns < d)


# ---------------------------------------------------------------------------------------------- the launches


def constants(
    kernel: str, rows: Tensor, bias: Tensor | None, kind: str, dropout: float, activation: str
) -> dict[str, Any]:
    """The constants that both passes share."""
    used = tile(kernel, rows.shape[-1], rows.dtype)
    return {
        "BLOCK_N": used.n,
        "BLOCK_D": next_power(rows.shape[-1]),
        "LAYER": kind == "layer",
        "BIAS": bias is not None,
        "DROPOUT": dropout > 0,
        "ACTIVATION": activation,
        "ACC": accumulator(rows),
    } | used.options


def forward(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    residual: Tensor | None,
    kind: str,
    dropout: float,
    seed: int,
    activation: str,
    eps: float,
) -> tuple[Tensor, Tensor]:
    """Arguments and results as for `memlib_kernels::norm`."""
    out, total = x.new_empty(x.shape), x.new_empty(0 if residual is None else x.shape)
    x, x_n = as_rows(x)
    added, added_n = (x, 0) if residual is None else as_rows(residual)
    chosen = constants("norm_forward", x, bias, kind, dropout, activation)
    n, d = x.shape
    launch(
        norm_forward,
        (-(-n // chosen["BLOCK_N"]),),
        x, added, weight.contiguous(), weight if bias is None else bias.contiguous(), total, out,
        x_n, added_n, n, d, dropout, 1 / (1 - dropout), seed, eps,
        **chosen, RESIDUAL=residual is not None,
    )  # fmt: skip
    return out, total


def backward(
    grad: Tensor,
    grad_total: Tensor | None,
    total: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    kind: str,
    dropout: float,
    seed: int,
    activation: str,
    eps: float,
) -> tuple[Tensor, Tensor, Tensor]:
    """Arguments and results as for `memlib_kernels::norm_backward`."""
    dx = total.new_empty(total.shape)
    (grad, grad_n), (total, total_n) = as_rows(grad), as_rows(total)
    added, added_n = (grad, 0) if grad_total is None else as_rows(grad_total)
    chosen = constants("norm_backward", total, bias, kind, dropout, activation)
    n, d = total.shape
    blocks = -(-n // chosen["BLOCK_N"])
    tiles = -(-blocks // PROGRAMS)
    programs = -(-blocks // max(1, tiles))
    wide = torch.promote_types(total.dtype, torch.float32)
    dweight = weight.new_empty(programs, d, dtype=wide)
    dbias = weight.new_empty(programs, 0 if bias is None else d, dtype=wide)
    launch(
        norm_backward,
        (programs,),
        grad, added, total, weight.contiguous(), weight if bias is None else bias.contiguous(), dx, dweight,
        dbias, grad_n, added_n, total_n, n, d, tiles, dropout, 1 / (1 - dropout), seed, eps,
        **chosen, RESIDUAL=grad_total is not None,
    )  # fmt: skip
    dbias_ = dbias.sum(0).to(weight.dtype if bias is None else bias.dtype)
    return dx, dweight.sum(0).to(weight.dtype), dbias_
