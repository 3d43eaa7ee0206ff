"""`quantized_read` in Triton as one operator of torch, with gradients.

Axes: b batch, h heads, n queries, m tokens, k key width, e value width, g groups of a row. Nothing may be
empty. Numbers and scales may have size 1 in b and h. A row is one group, or a group's width is a power of
two. quantized_kernel.py has the mathematics.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor


@torch.library.custom_op("memlib_kernels::quantized_read", mutates_args=())
def quantized_read_op(
    q: Tensor,
    keys: Tensor,
    key_scales: Tensor,
    values: Tensor,
    value_scales: Tensor,
    mask: Tensor | None,
    scale: float,
) -> tuple[Tensor, Tensor, Tensor]:
    """What is read, [b h n e], and of each query's scores the maximum and the sum of exp(score - maximum).

    q: [b h n k]; keys: int8 [b h m k] or uint8 [b h m k/2]; key_scales: [b h m g]; values the same with e.
    mask: broadcasts to [b h n m]; true = may attend, or a bias, which gets no gradient. Maximum and sum:
    [b h n], float32 at least; 0 and 1 for a query that may attend to nothing.
    """
    from memlib_kernels.quantized_kernel import forward

    return forward(q, keys, key_scales, values, value_scales, mask, scale)


@quantized_read_op.register_fake
def _(
    q: Tensor,
    keys: Tensor,
    key_scales: Tensor,
    values: Tensor,
    value_scales: Tensor,
    mask: Tensor | None,
    scale: float,
) -> tuple[Tensor, Tensor, Tensor]:
    (b, h, n, _), wide = q.shape, torch.promote_types(q.dtype, torch.float32)
    top, total = (q.new_empty(b, h, n, dtype=wide) for _ in range(2))
    return q.new_empty(b, n, h, width_of(values)).transpose(1, 2), top, total


@torch.library.custom_op("memlib_kernels::quantized_read_backward", mutates_args=())
def quantized_read_backward_op(
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
    """dq, and the gradients of the scales for each row and head, [b h m g]; empty unless they learn."""
    from memlib_kernels.quantized_kernel import backward

    return backward(
        grad, q, keys, key_scales, values, value_scales, mask, out, top, total, scale, scales_learn
    )


@quantized_read_backward_op.register_fake
def _(
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
    dk, dv = (
        top.new_empty(*q.shape[:2], *t.shape[2:]) if scales_learn else top.new_empty(0)
        for t in (key_scales, value_scales)
    )
    return q.new_empty(q.shape), dk, dv


def width_of(numbers: Tensor) -> int:
    """Numbers of a row: two to a byte in uint8."""
    return numbers.shape[-1] * (2 if numbers.dtype == torch.uint8 else 1)


def group_width(numbers: Tensor, scales: Tensor) -> int:
    """Numbers of a group; the last group may have fewer."""
    return -(-width_of(numbers) // scales.shape[-1])


def fits(numbers: Tensor, scales: Tensor) -> bool:
    """Whether the kernels take these groups: one, or several of a power of two."""
    each = group_width(numbers, scales)
    return scales.shape[-1] == 1 or each & (each - 1) == 0


def save_for_backward(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    *tensors, ctx.scale = inputs
    ctx.save_for_backward(*tensors, *output)


def backward_of(ctx: Any, grad: Tensor, *unused: Tensor) -> Any:
    """Maximum and sum are there for this pass only: a gradient for them is not computed."""
    _, _, key_scales, _, value_scales, *_ = ctx.saved_tensors
    learn = ctx.needs_input_grad[2] or ctx.needs_input_grad[4]
    dq, dk, dv = quantized_read_backward_op(grad, *ctx.saved_tensors, ctx.scale, learn)
    dk, dv = (
        found.sum_to_size(t.shape).to(t.dtype) if learn else None
        for found, t in ((dk, key_scales), (dv, value_scales))
    )
    return dq, None, dk, None, dv, None, None


quantized_read_op.register_autograd(backward_of, setup_context=save_for_backward)
