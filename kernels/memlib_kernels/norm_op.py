"""`fused_norm` in Triton as one operator of torch, with gradients. norm_kernel.py has the mathematics."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor


@torch.library.custom_op("memlib_kernels::norm", mutates_args=())
def norm_op(
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
    """y: [… d], contiguous, and x + residual, empty without a residual. activation: or "none"."""
    from memlib_kernels.norm_kernel import forward

    return forward(x, weight, bias, residual, kind, dropout, seed, activation, eps)


@norm_op.register_fake
def _(
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
    return x.new_empty(x.shape), x.new_empty(0 if residual is None else x.shape)


@torch.library.custom_op("memlib_kernels::norm_backward", mutates_args=())
def norm_backward_op(
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
    """The gradients of total, of the weight, and of the bias (empty without one)."""
    from memlib_kernels.norm_kernel import backward

    return backward(grad, grad_total, total, weight, bias, kind, dropout, seed, activation, eps)


@norm_backward_op.register_fake
def _(
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
    dbias = weight.new_empty(0) if bias is None else bias.new_empty(bias.shape)
    return total.new_empty(total.shape), weight.new_empty(weight.shape), dbias


def save_for_backward(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    x, weight, bias, residual, *ctx.options = inputs
    ctx.added = residual is not None
    ctx.save_for_backward(output[1] if ctx.added else x, weight, bias)


def backward_of(ctx: Any, grad: Tensor, grad_total: Tensor) -> Any:
    total, weight, bias = ctx.saved_tensors
    dtotal, dweight, dbias = norm_backward_op(
        grad, grad_total if ctx.added else None, total, weight, bias, *ctx.options
    )
    dbias, dresidual = None if bias is None else dbias, dtotal if ctx.added else None
    return dtotal, dweight, dbias, dresidual, None, None, None, None, None


norm_op.register_autograd(backward_of, setup_context=save_for_backward)
