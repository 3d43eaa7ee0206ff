"""Root mean square normalisation.

Axes: … any, d features.    y = x / sqrt(mean_d(x^2) + eps) * weight

Source: Zhang and Sennrich 2019, arXiv 1910.07467.
"""

from __future__ import annotations

from typing import Any

import torch
from einops import rearrange, reduce
from torch import Tensor

from memlib_kernels.dispatch import apply, eager_cpu
from memlib_kernels.launch import runs_triton
from memlib_kernels.norm_op import norm_op
from memlib_kernels.tiles import has_tiles


def rms_norm(x: Tensor, weight: Tensor, eps: float = 1e-6) -> Tensor:
    """x: […  d], weight: [d] -> [… d], of x's dtype. Statistics in float32 at least."""
    if runs_triton(x, weight) and has_tiles("norm", x.dtype, x.shape[-1]):
        return norm_op(x, weight, None, None, "rms", 0.0, 0, "none", eps)[0]
    if eager_cpu(x, weight) and x.dtype == weight.dtype and x.dtype in (torch.float32, torch.float64):
        return apply(RMSNorm, x, weight, eps)[0]
    return rms_norm_reference(x, weight, eps)


def rms_norm_reference(x: Tensor, weight: Tensor, eps: float = 1e-6) -> Tensor:
    """`rms_norm` as its formula says."""
    wide = x.to(torch.promote_types(x.dtype, torch.float32))
    mean = reduce(wide.square(), "... d -> ... 1", "mean")
    return (wide * torch.rsqrt(mean + eps)).to(x.dtype) * weight.to(x.dtype)


class RMSNorm(torch.autograd.Function):
    """The CPU path: keeps x and one number per row, where autograd would keep four tensors of x's size."""

    @staticmethod
    def forward(x: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
        scale = torch.rsqrt(reduce(x.square(), "... d -> ... 1", "mean") + eps)
        return (x * scale).mul_(weight), scale

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
        ctx.mark_non_differentiable(output[1])
        ctx.save_for_backward(*inputs[:2], output[1])

    @staticmethod
    def backward(ctx: Any, grad: Tensor, unused: Tensor) -> Any:
        """With u = x scale: dx = scale (w g - u mean(w g u)),  dw = sum over rows of g u."""
        x, weight, scale = ctx.saved_tensors
        unit = x * scale
        product = rearrange(grad * unit, "... d -> (...) d")
        mean = torch.mv(product, weight).div_(len(weight)).view_as(scale)
        grad_x = torch.addcmul(grad * weight, unit, mean, value=-1).mul_(scale)
        return grad_x, product.sum(0), None
