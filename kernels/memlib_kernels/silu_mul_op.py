"""`silu_mul` in Triton as one operator of torch, with gradients. silu_mul_kernel.py has the mathematics."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor


@torch.library.custom_op("memlib_kernels::silu_mul", mutates_args=())
def silu_mul_op(gate: Tensor, up: Tensor) -> Tensor:
    """gate, up: of one shape and dtype -> the same, contiguous."""
    from memlib_kernels.silu_mul_kernel import forward

    return forward(gate, up)


@silu_mul_op.register_fake
def _(gate: Tensor, up: Tensor) -> Tensor:
    return gate.new_empty(gate.shape)


@torch.library.custom_op("memlib_kernels::silu_mul_backward", mutates_args=())
def silu_mul_backward_op(grad: Tensor, gate: Tensor, up: Tensor) -> tuple[Tensor, Tensor]:
    """dgate and dup, contiguous."""
    from memlib_kernels.silu_mul_kernel import backward

    return backward(grad, gate, up)


@silu_mul_backward_op.register_fake
def _(grad: Tensor, gate: Tensor, up: Tensor) -> tuple[Tensor, Tensor]:
    return gate.new_empty(gate.shape), up.new_empty(up.shape)


def save_for_backward(ctx: Any, inputs: tuple[Tensor, Tensor], output: Tensor) -> None:
    ctx.save_for_backward(*inputs)


def backward_of(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor]:
    return silu_mul_backward_op(grad, *ctx.saved_tensors)


silu_mul_op.register_autograd(backward_of, setup_context=save_for_backward)
