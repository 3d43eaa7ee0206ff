"""Rotation of pairs of features by angles that depend on the position.

Axes: b batch, h heads, n tokens, k head width.    (x1, x2) -> (x1 cos - x2 sin, x1 sin + x2 cos)

Feature i is paired with feature i + k/2. Source: Su et al. 2021, arXiv 2104.09864.
"""

from __future__ import annotations

from typing import Any

import torch
from einops import rearrange, repeat
from torch import Tensor

from memlib_kernels.dispatch import apply, eager_cpu


def rotate(heads: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """heads: [b h n k]; cos, sin of the angles: [n k/2], without a gradient -> [b h n k]."""
    if eager_cpu(heads, cos, sin) and heads.numel():
        return apply(Rotation, heads, cos, sin)
    return rotate_reference(heads, cos, sin)


def rotate_reference(heads: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """`rotate` pair by pair."""
    low, high = rearrange(heads, "b h n (two k) -> two b h n k", two=2)
    turned = torch.stack((low * cos - high * sin, low * sin + high * cos))
    return rearrange(turned, "two b h n k -> b h n (two k)")


class Rotation(torch.autograd.Function):
    """The CPU path: y = x cos + (x with its halves exchanged) sin, over whole rows [h k] of a token."""

    @staticmethod
    def forward(heads: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        x = rearrange(heads, "b h n k -> b n h k")
        low, high = x.chunk(2, -1)
        factor = repeat(cos, "n k -> n h two k", h=x.shape[2], two=2)
        other = repeat(torch.stack((-sin, sin), 1), "n two k -> n h (two k)", h=x.shape[2])
        y = torch.mul(x, rearrange(factor, "n h two k -> n h (two k)"))
        y.addcmul_(torch.cat((high, low), -1), other)
        return rearrange(y, "b n h k -> b h n k")

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor, ...], output: Tensor) -> None:
        ctx.save_for_backward(*inputs[1:])

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Any:
        cos, sin = ctx.saved_tensors
        return Rotation.forward(grad, cos, -sin), None, None
