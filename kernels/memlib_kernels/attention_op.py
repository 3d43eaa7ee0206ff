"""Attention in Triton as one operator of torch: with gradients, under torch.compile, torch.export and vmap.

Axes: b batch, h query heads, g key heads, n queries, m keys, k key width, e value width, u groups of queries,
j keys listed for a group. attention_kernel.py has the mathematics.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from memlib_kernels.rows import heads_last


@torch.library.custom_op("memlib_kernels::attention", mutates_args=())
def attention_op(
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
    """out: [b h n e], and lse: [b h n], float32 at least.

    q: [b h n k], k: [b g m k], v: [b g m e], g divides h; bias: broadcasts to [b h n m]; valid: [b m], true
    for keys that may be read; places: [b h u j], integers that broadcast in b and h, -1 for none: the only
    keys that the n / u queries of a group may read; causal: the last query sees the last key; window: how
    many newest keys a query sees, 0 for all.
    """
    from memlib_kernels.attention_kernel import forward

    return forward(q, k, v, bias, valid, places, causal, window, scale)


@attention_op.register_fake
def _(
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
    b, h, n, _ = q.shape
    return heads_last(q, v.shape[-1]), q.new_empty(b, h, n, dtype=torch.promote_types(q.dtype, torch.float32))


@torch.library.custom_op("memlib_kernels::attention_backward", mutates_args=())
def attention_backward_op(
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
    """dq, dk, dv, and dbias before its sum over broadcast axes: [b h 1 m], [b h n m], or empty."""
    from memlib_kernels.attention_kernel import backward

    return backward(
        grad_out, grad_lse, q, k, v, out, lse, bias, valid, places, causal, window, scale, bias_learns
    )


@attention_backward_op.register_fake
def _(
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
    (b, h, n, _), m = q.shape, k.shape[-2]
    dbias = lse.new_empty(0)
    if bias is not None and bias_learns:
        dbias = lse.new_empty(b, h, 1 if bias.shape[-2] == 1 else n, m)
    dq, dk, dv = (heads_last(t, t.shape[-1]) for t in (q, k, v))
    return dq, dk, dv, dbias


def save_for_backward(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    q, k, v, bias, valid, places, *ctx.options = inputs
    ctx.save_for_backward(q, k, v, bias, valid, places, *output)


def backward_of(ctx: Any, grad_out: Tensor, grad_lse: Tensor) -> Any:
    q, k, v, bias, valid, places, out, lse = ctx.saved_tensors
    learns = bias is not None and ctx.needs_input_grad[3]
    dq, dk, dv, dbias = attention_backward_op(
        grad_out, grad_lse, q, k, v, out, lse, bias, valid, places, *ctx.options, learns
    )
    dbias = dbias.sum_to_size(bias.shape).to(bias.dtype) if learns else None
    return dq, dk, dv, dbias, None, None, None, None, None


attention_op.register_autograd(backward_of, setup_context=save_for_backward)


@attention_op.register_vmap
def _(info: Any, in_dims: tuple[int | None, ...], *args: Any) -> Any:
    """The mapped axis joins the batch."""
    size, (q, dim) = info.batch_size, (args[0], in_dims[0])
    b = len(q) if dim is None else q.movedim(dim, 0).shape[1]

    def joined(tensor: Tensor | None, dim: int | None) -> Tensor | None:
        if tensor is None:
            return None
        tensor = tensor.expand(size, *tensor.shape) if dim is None else tensor.movedim(dim, 0)
        return tensor.expand(size, b, *tensor.shape[2:]).flatten(0, 1)

    tensors = [joined(tensor, dim) for tensor, dim in zip(args[:6], in_dims[:6], strict=True)]
    out, lse = attention_op(*tensors, *args[6:])
    return (out.unflatten(0, (size, b)), lse.unflatten(0, (size, b))), (0, 0)
