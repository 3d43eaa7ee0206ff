"""silu(gate) up and its gradients, each in one pass over rows.

Axes: n rows, d features.    With s = sigma(gate):

    y = gate s up,    dgate = dy up s (1 + gate (1 - s)),    dup = dy gate s
"""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from memlib_kernels.launch import launch
from memlib_kernels.rows import as_rows, tile_grid
from memlib_kernels.tiles import ANY, accumulator, tile


@triton.jit
def silu_mul_forward(
    Gate, Up, Out, gate_n, up_n, n, d, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr, ACC: tl.constexpr
):  # fmt: skip
    """One tile of y, whose rows are contiguous."""
    rows = tl.program_id(0).to(tl.int64) * BLOCK_N + tl.arange(0, BLOCK_N)[:, None]
    columns = tl.program_id(1) * BLOCK_D + tl.arange(0, BLOCK_D)[None, :]
    inside = (rows < n) & (columns < d)
    gate = tl.load(Gate + rows * gate_n + columns, mask=inside, other=0.0).to(ACC)
    up = tl.load(Up + rows * up_n + columns, mask=inside, other=0.0).to(ACC)
    y = gate / (1.0 + tl.exp(-gate)) * up
    tl.store(Out + rows * d + columns, y.to(Out.dtype.element_ty), mask=inside)


@triton.jit
def silu_mul_backward(
    DOut, Gate, Up, DGate, DUp, out_n, gate_n, up_n, n, d,
    BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr, ACC: tl.constexpr,
):  # fmt: skip
    """One tile of dgate and dup."""
    rows = tl.program_id(0).to(tl.int64) * BLOCK_N + tl.arange(0, BLOCK_N)[:, None]
    columns = tl.program_id(1) * BLOCK_D + tl.arange(0, BLOCK_D)[None, :]
    inside = (rows < n) & (columns < d)
    dout = tl.load(DOut + rows * out_n + columns, mask=inside, other=0.0).to(ACC)
    gate = tl.load(Gate + rows * gate_n + columns, mask=inside, other=0.0).to(ACC)
    up = tl.load(Up + rows * up_n + columns, mask=inside, other=0.0).to(ACC)
    s = 1.0 / (1.0 + tl.exp(-gate))
    dgate = dout * up * s * (1.0 + gate * (1.0 - s))
    dup = dout * gate * s
    tl.store(DGate + rows * d + columns, dgate.to(DGate.dtype.element_ty), mask=inside)
    tl.store(DUp + rows * d + columns, dup.to(DUp.dtype.element_ty), mask=inside)


# ---------------------------------------------------------------------------------------------- the launches


def forward(gate: Tensor, up: Tensor) -> Tensor:
    out = gate.new_empty(gate.shape)
    (gate, gate_n), (up, up_n) = as_rows(gate), as_rows(up)
    used = tile("silu_mul_forward", ANY, gate.dtype)
    launch(
        silu_mul_forward,
        tile_grid(gate, used),
        gate, up, out, gate_n, up_n, *gate.shape,
        BLOCK_N=used.n, BLOCK_D=used.m, ACC=accumulator(gate), **used.options,
    )  # fmt: skip
    return out


def backward(grad: Tensor, gate: Tensor, up: Tensor) -> tuple[Tensor, Tensor]:
    dgate, dup = gate.new_empty(gate.shape), up.new_empty(up.shape)
    (grad, grad_n), (gate, gate_n), (up, up_n) = as_rows(grad), as_rows(gate), as_rows(up)
    used = tile("silu_mul_backward", ANY, gate.dtype)
    launch(
        silu_mul_backward,
        tile_grid(gate, used),
        grad, gate, up, dgate, dup, grad_n, gate_n, up_n, *gate.shape,
        BLOCK_N=used.n, BLOCK_D=used.m, ACC=accumulator(gate), **used.options,
    )  # fmt: skip
    return dgate, dup
