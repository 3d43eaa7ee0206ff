"""A learned mixture of each token and the one before it.

Axes: b batch, n tokens, d features.    y_t = (1 - share) x_t + share x_{t-1}

Source: the token shift of RWKV, Peng et al. 2023, arXiv 2305.13048.
"""

from __future__ import annotations

from typing import Any

import torch
from einops import rearrange
from torch import Tensor
from torch.nn import functional as F

from memlib_kernels.dispatch import apply, eager_cpu


def shifted(x: Tensor) -> Tensor:
    """The token before each token, zeros before the first: [b n d] -> [b n d]."""
    return F.pad(x, (0, 0, 1, 0))[:, :-1]


def token_shift(x: Tensor, share: Tensor, first: Tensor | None = None) -> Tensor:
    """x: [b n d], share: [d], first: [b d], the token before the first one, zeros by default -> [b n d]."""
    if eager_cpu(x, share, first) and x.dtype == share.dtype and x.shape[1]:
        return apply(TokenShift, x, share, first)
    return token_shift_reference(x, share, first)


def token_shift_reference(x: Tensor, share: Tensor, first: Tensor | None = None) -> Tensor:
    """`token_shift` by a padded copy."""
    before = shifted(x) if first is None else torch.cat((rearrange(first, "b d -> b 1 d"), x), 1)[:, :-1]
    return torch.lerp(x, before.to(x.dtype), share.to(x.dtype))


class TokenShift(torch.autograd.Function):
    """The CPU path, without a copy of the tokens before."""

    @staticmethod
    def forward(x: Tensor, share: Tensor, first: Tensor | None) -> Tensor:
        y = torch.empty_like(x, memory_format=torch.contiguous_format)
        torch.lerp(x[:, 1:], x[:, :-1], share, out=y[:, 1:])
        start = torch.zeros_like(x[:, 0]) if first is None else first.to(x.dtype)
        torch.lerp(x[:, 0], start, share, out=y[:, 0])
        return y

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        ctx.save_for_backward(*inputs)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Any:
        x, share, first = ctx.saved_tensors
        passed = grad * share
        grad_x = grad - passed
        grad_x[:, :-1] += passed[:, 1:]
        grad_share = (grad[:, 1:] * (x[:, :-1] - x[:, 1:])).sum((0, 1)) - (grad[:, 0] * x[:, 0]).sum(0)
        if first is None:
            return grad_x, grad_share, None
        return grad_x, grad_share + (grad[:, 0] * first).sum(0), passed[:, 0].to(first.dtype)
