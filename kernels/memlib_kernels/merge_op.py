"""The merge of two attentions in Triton as one operator of torch; merge_kernel.py has the mathematics.

Axes: b batch, h heads, n queries, k width.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor


@torch.library.custom_op("memlib_kernels::merge", mutates_args=())
def merge_op(out_a: Tensor, lse_a: Tensor, out_b: Tensor, lse_b: Tensor) -> Tensor:
    """out_a, out_b: [b h n k]; lse_a, lse_b: [b h n], of which any logit is part -> [b h n k]."""
    from memlib_kernels.merge_kernel import forward

    return forward(out_a, lse_a, out_b, lse_b)


@merge_op.register_fake
def _(out_a: Tensor, lse_a: Tensor, out_b: Tensor, lse_b: Tensor) -> Tensor:
    return out_a.new_empty(out_a.shape)


@torch.library.custom_op("memlib_kernels::merge_backward", mutates_args=())
def merge_backward_op(
    grad: Tensor, out_a: Tensor, lse_a: Tensor, out_b: Tensor, lse_b: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of out_a, out_b and lse_b; that of lse_a is the last one's negative."""
    from memlib_kernels.merge_kernel import backward

    return backward(grad, out_a, lse_a, out_b, lse_b)


@merge_backward_op.register_fake
def _(
    grad: Tensor, out_a: Tensor, lse_a: Tensor, out_b: Tensor, lse_b: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    return out_a.new_empty(out_a.shape), out_b.new_empty(out_b.shape), lse_b.new_empty(lse_b.shape)


def save_for_backward(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    ctx.save_for_backward(*inputs)


def backward_of(ctx: Any, grad: Tensor) -> Any:
    grad_a, grad_b, grad_lse = merge_backward_op(grad, *ctx.saved_tensors)
    return grad_a, -grad_lse, grad_b, grad_lse


merge_op.register_autograd(backward_of, setup_context=save_for_backward)
