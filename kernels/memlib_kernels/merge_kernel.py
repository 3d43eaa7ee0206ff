"""One softmax over two sets of keys, from an attention over each.

Axes: r rows (b h n), k width.

    w = sigma(lse_b - lse_a),    out = out_a + w (out_b - out_a)
    dout_a = (1 - w) dout,  dout_b = w dout,  dlse_b = -dlse_a = w (1 - w) dout . (out_b - out_a)

Where b is shut (lse_b = -inf) w is 0 and out is out_a bit for bit, whatever out_b contains.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from memlib_kernels.launch import launch
from memlib_kernels.tiles import accumulator, next_power, tile


@triton.jit
def share_of_b(LseA, LseB, rows, inside, ACC: tl.constexpr):
    """w of each row."""
    b = tl.load(LseB + rows, mask=inside, other=float("-inf")).to(ACC)
    a = tl.load(LseA + rows, mask=inside, other=0.0).to(ACC)
    shut = b == float("-inf")
    return tl.where(shut, 0.0, 1.0 / (1.0 + tl.exp(a - tl.where(shut, 0.0, b))))


@triton.jit
def merge_forward(
    OutA, LseA, OutB, LseB, Out, count,
    WIDTH: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_N: tl.constexpr, ACC: tl.constexpr,
):  # fmt: skip
    rows = tl.program_id(0).to(tl.int64) * BLOCK_N + tl.arange(0, BLOCK_N)
    columns = tl.arange(0, BLOCK_K)
    at = rows[:, None] * WIDTH + columns[None, :]
    inside = rows < count
    w = share_of_b(LseA, LseB, rows, inside, ACC)[:, None]
    mask = inside[:, None] & (columns < WIDTH)[None, :]
    a = tl.load(OutA + at, mask=mask, other=0.0).to(ACC)
    b = tl.load(OutB + at, mask=mask & (w > 0.0), other=0.0).to(ACC)  # never read where b is shut
    out = tl.where(w > 0.0, a + w * (b - a), a)
    tl.store(Out + at, out.to(Out.dtype.element_ty), mask=mask)


@triton.jit
def merge_backward(
    DOut, OutA, LseA, OutB, LseB, DOutA, DOutB, DLse, count,
    WIDTH: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_N: tl.constexpr, ACC: tl.constexpr,
):  # fmt: skip
    rows = tl.program_id(0).to(tl.int64) * BLOCK_N + tl.arange(0, BLOCK_N)
    columns = tl.arange(0, BLOCK_K)
    at = rows[:, None] * WIDTH + columns[None, :]
    inside = rows < count
    w = share_of_b(LseA, LseB, rows, inside, ACC)
    mask = inside[:, None] & (columns < WIDTH)[None, :]
    open_ = mask & (w > 0.0)[:, None]
    dout = tl.load(DOut + at, mask=mask, other=0.0).to(ACC)
    a = tl.load(OutA + at, mask=open_, other=0.0).to(ACC)
    b = tl.load(OutB + at, mask=open_, other=0.0).to(ACC)
    tl.store(DOutA + at, (dout * (1.0 - w)[:, None]).to(DOutA.dtype.element_ty), mask=mask)
    tl.store(DOutB + at, (dout * w[:, None]).to(DOutB.dtype.element_ty), mask=mask)
    dlse = tl.sum(dout * (b - a), 1) * w * (1.0 - w)
    tl.store(DLse + rows, dlse.to(DLse.dtype.element_ty), mask=inside)


def forward(out_a: Tensor, lse_a: Tensor, out_b: Tensor, lse_b: Tensor) -> Tensor:
    """Arguments as for `memlib_kernels::merge`."""
    out_a, lse_a, out_b, lse_b = (t.contiguous() for t in (out_a, lse_a, out_b, lse_b))
    out = torch.empty_like(out_a)
    start(merge_forward, "merge_forward", out_a, out_a, lse_a, out_b, lse_b, out)
    return out


def backward(
    grad: Tensor, out_a: Tensor, lse_a: Tensor, out_b: Tensor, lse_b: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """Arguments as for `memlib_kernels::merge_backward`."""
    grad, out_a, lse_a, out_b, lse_b = (t.contiguous() for t in (grad, out_a, lse_a, out_b, lse_b))
    grads = torch.empty_like(out_a), torch.empty_like(out_b), torch.empty_like(lse_b)
    start(merge_backward, "merge_backward", out_a, grad, out_a, lse_a, out_b, lse_b, *grads)
    return grads


def start(kernel: object, name: str, like: Tensor, *tensors: Tensor) -> None:
    """One program for each tile of rows of `like`."""
    width = like.shape[-1]
    count = like.numel() // max(1, width)
    used = tile(name, width, like.dtype)
    launch(
        kernel,
        (-(-count // used.n),),
        *tensors,
        count,
        WIDTH=width,
        BLOCK_K=next_power(width),
        BLOCK_N=used.n,
        ACC=accumulator(like),
        **used.options,
    )
