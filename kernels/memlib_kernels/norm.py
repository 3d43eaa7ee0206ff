"""Normalisation of rows with what often stands around it, in one pass: residual, dropout, activation.

Axes: … any, d features.

    total = x + residual
    u = total / sqrt(mean_d(total^2) + eps)                              kind "rms"
    u = (total - mean_d total) / sqrt(var_d total + eps)                 kind "layer"
    y = activation(dropout(u weight + bias))

Dropout zeroes each number with a probability and divides the others by what remains of 1. It follows from an
integer seed and a number's place (philox.py): the same on every device, and made again in the backward pass.
Sources: Ba et al. 2016, arXiv 1607.06450; Zhang and Sennrich 2019, arXiv 1910.07467; Srivastava et al. 2014
(dropout). docs/coverage.md, row B9.
"""

from __future__ import annotations

from typing import Literal

import torch
from einops import reduce
from torch import Tensor
from torch.nn import functional as F

from memlib_kernels.launch import runs_triton
from memlib_kernels.norm_op import norm_op
from memlib_kernels.philox import uniform
from memlib_kernels.rms_norm import rms_norm
from memlib_kernels.tiles import has_tiles


def fused_norm(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    *,
    kind: Literal["rms", "layer"] = "rms",
    residual: Tensor | None = None,
    dropout: float = 0.0,
    seed: int | None = None,
    activation: Literal["relu", "silu"] | None = None,
    eps: float = 1e-6,
) -> Tensor | tuple[Tensor, Tensor]:
    """y: [… d] of x's dtype; with a residual the pair (y, x + residual), the new residual stream.

    x, residual: […  d]; weight, bias: [d]; dropout: a probability, for which a seed must be given, 0 … 2^63-1
    and another one in each step and layer. Statistics in float32 at least. Differentiable in all tensors.
    Raises ValueError for arguments that do not fit.
    """
    check(x, weight, bias, kind, residual, dropout, seed, activation)
    if runs_triton(x, weight, bias, residual) and has_tiles("norm", x.dtype, x.shape[-1]):
        y, total = norm_op(x, weight, bias, residual, kind, dropout, seed or 0, activation or "none", eps)
        return y if residual is None else (y, total)
    total = x if residual is None else x + residual
    if kind == "layer":
        shift = None if bias is None else bias.to(x.dtype)
        y = F.layer_norm(total, weight.shape, weight.to(x.dtype), shift, eps)
    else:
        y = rms_norm(total, weight, eps)
        y = y if bias is None else y + bias.to(y.dtype)
    y = activated(dropped(y, dropout, seed), activation)
    return y if residual is None else (y, total)


def fused_norm_reference(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    *,
    kind: Literal["rms", "layer"] = "rms",
    residual: Tensor | None = None,
    dropout: float = 0.0,
    seed: int | None = None,
    activation: Literal["relu", "silu"] | None = None,
    eps: float = 1e-6,
) -> Tensor | tuple[Tensor, Tensor]:
    """`fused_norm` as its formula says."""
    check(x, weight, bias, kind, residual, dropout, seed, activation)
    total = x if residual is None else x + residual
    wide = total.to(torch.promote_types(total.dtype, torch.float32))
    if kind == "layer":
        wide = wide - reduce(wide, "... d -> ... 1", "mean")
    y = wide * torch.rsqrt(reduce(wide.square(), "... d -> ... 1", "mean") + eps) * weight
    y = activated(dropped(y if bias is None else y + bias, dropout, seed), activation).to(x.dtype)
    return y if residual is None else (y, total)


def dropped(y: Tensor, dropout: float, seed: int | None) -> Tensor:
    """y with dropout."""
    if not dropout or seed is None:
        return y
    keep = uniform(seed, y.shape, y.device) >= dropout
    return torch.where(keep, y / (1 - dropout), 0.0)


def activated(y: Tensor, activation: str | None) -> Tensor:
    return {None: lambda y: y, "relu": F.relu, "silu": F.silu}[activation](y)


def check(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    kind: str,
    residual: Tensor | None,
    dropout: float,
    seed: int | None,
    activation: str | None,
) -> None:
    """Raise ValueError where the arguments of `fused_norm` do not fit."""
    if kind not in ("rms", "layer"):
        raise ValueError(f"kind = {kind!r}: must be 'rms' or 'layer'")
    if activation not in (None, "relu", "silu"):
        raise ValueError(f"activation = {activation!r}: must be None, 'relu' or 'silu'")
    for name, tensor in (("weight", weight), ("bias", bias)):
        if tensor is not None and tensor.shape != x.shape[-1:]:
            raise ValueError(f"{name} {list(tensor.shape)}: must be [d], here {list(x.shape[-1:])}")
    if residual is not None and (residual.shape, residual.dtype) != (x.shape, x.dtype):
        raise ValueError(
            f"residual {list(residual.shape)} {residual.dtype}: must have x's shape and dtype, "
            f"{list(x.shape)} {x.dtype}"
        )
    if not 0.0 <= dropout < 1.0:
        raise ValueError(f"dropout = {dropout}: a probability, at least 0 and less than 1")
    if dropout and seed is None:
        raise ValueError(f"dropout = {dropout} without a seed: give an integer, another one in each step")
    if seed is not None and not 0 <= seed < 2**63:
        raise ValueError(f"seed = {seed}: must be 0 … 2^63-1")
